"""Checks the names in state dicts, which are shown in messages and written to other files."""

from collections.abc import Iterable, Mapping
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.tensors.tensor_ref import TensorRef

_NAME_CHARACTERS = 500


def check_names(names: Iterable[object], file: str) -> None:
    """Raise BridgeError for a name that is not short printable text.

    Control characters could move the cursor of a terminal, and a line end could forge a line of a
    report.
    """
    for name in names:
        if not isinstance(name, str):
            raise BridgeError(
                f"{file} has a key of the type {type(name).__name__} instead of a tensor name, so "
                "it is not a state dict. Download or copy it again."
            )
        if not name.isprintable() or len(name) > _NAME_CHARACTERS:
            raise BridgeError(
                f"{file} has a tensor with the name {name[:60]!r}. Names of tensors are short and "
                "printable, so the file is damaged or malicious. Do not use it."
            )


# keys under which a file may contain the state dict
_KEYS = ("state_dict", "model_state_dict", "model", "module")


def state_dict_of(value: object, file: str) -> Mapping[Any, Any]:
    """The state dict of a file of torch.save. Raises BridgeError if there is none."""
    for key in _KEYS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            if any(isinstance(entry, TensorRef) for entry in value.values()):
                break
            return dict(value[key])
    if not isinstance(value, dict):
        raise BridgeError(
            f"{file} does not contain a state dict. Check that it contains the weights of a model."
        )
    return value


def tensors_of(state: Mapping[Any, Any], file: str) -> dict[str, TensorRef]:
    """The tensors of a state dict by name. Raises BridgeError like ``check_names``."""
    check_names(state, file)
    return {name: value for name, value in state.items() if isinstance(value, TensorRef)}
