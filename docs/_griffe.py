"""Shows options in the Python API as attributes: their default, and what their help says."""

from dataclasses import fields
from typing import Any

from griffe import Attribute, Docstring, Extension, Function

import neox_bridge


class OptionsAsAttributes(Extension):
    """Rewrites what a reader of the source has to look up elsewhere.

    ``name: type = option(default, text, …)`` becomes ``name: type = default``, with the text.
    """

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        if attr.parent is None or attr.parent.name not in ("Options", "Resharding"):
            return
        exported = getattr(neox_bridge, attr.parent.name)
        declared = {field.name: field for field in fields(exported)}.get(attr.name)
        if declared is not None:
            attr.value = repr(declared.default)
            attr.docstring = Docstring(declared.metadata["option"].text, parent=attr)

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        for parameter in func.parameters:
            if str(parameter.default) == "_DEFAULTS":
                parameter.default = "Options()"
