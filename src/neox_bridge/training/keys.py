"""The keys that neox-bridge adds to GPT-NeoX's yml, and their registration in ``NeoXArgs``.

GPT-NeoX refuses keys that no dataclass of ``megatron.neox_arguments`` declares
(neox_arguments/arguments.py, ``validate_keys``). The fields are added to one of its classes, and
the classes are made anew, so that the launcher passes the values on to every rank.
"""

import dataclasses
from types import ModuleType
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One key. Its default is None: the feature is off.

    Attributes:
        kind: The type of its value.
        text: The docstring of the field in GPT-NeoX.
    """

    name: str
    kind: type
    text: str


KEYS = (
    Key("save_hf", str, "Folder in which saved steps are written in Hugging Face format too."),
    Key("save_hf_interval", int, "Iterations between exports. Default: every saved step."),
    Key("save_hf_keep", int, "How many exported steps to keep. Default: all."),
    Key("push_to_hub", str, "Repository ORG/NAME to which exports are pushed, as branches."),
)


def register(arguments: ModuleType) -> None:
    """Add the keys to ``NeoXArgs``, unless the tree declares them.

    arguments: ``megatron.neox_arguments.arguments``.
    """
    args: Any = arguments.NeoXArgs
    missing = [key for key in KEYS if key.name not in args.__dataclass_fields__]
    if not missing:
        return
    owner: Any = arguments.NeoXArgsTraining
    for key in missing:
        owner.__annotations__[key.name] = key.kind
        setattr(owner, key.name, None)
    for cls in (owner, args):
        del cls.__init__  # dataclass() keeps one that exists
        dataclasses.dataclass(cls)
