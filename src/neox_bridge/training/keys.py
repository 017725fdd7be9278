"""The keys that neox-bridge adds to GPT-NeoX's yml, and their registration in ``NeoXArgs``.

GPT-NeoX refuses keys that no dataclass of ``megatron.neox_arguments`` declares
(neox_arguments/arguments.py, ``validate_keys``). The fields are added to one of its classes, and
the classes are made anew, so that the launcher passes the values on to every rank.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

# the type of each key's value; the default is None, with which the feature is off
KEYS: Mapping[str, type] = {
    "save_hf": str,  # folder in which saved steps are written in Hugging Face format too
    "save_hf_interval": int,  # iterations between exports; otherwise every saved step is exported
    "save_hf_keep": int,  # how many exported steps to keep; otherwise all
    "push_to_hub": str,  # ORG/NAME, to which exports are pushed as branches
}


def register(arguments: ModuleType) -> None:
    """Add the keys to ``NeoXArgs``, unless the tree declares them.

    arguments: ``megatron.neox_arguments.arguments``.
    """
    args: Any = arguments.NeoXArgs
    missing = [name for name in KEYS if name not in args.__dataclass_fields__]
    if not missing:
        return
    owner: Any = arguments.NeoXArgsTraining
    for name in missing:
        owner.__annotations__[name] = KEYS[name]
        setattr(owner, name, None)
    for cls in (owner, args):
        del cls.__init__  # dataclass() keeps one that exists
        dataclasses.dataclass(cls)
