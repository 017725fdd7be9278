"""Names in state dicts, which come from files and go into messages, tables and other files."""

from collections.abc import Iterable, Mapping
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.tensor_ref import TensorRef

_LONGEST = 500  # characters


def check_names(names: Iterable[object], file: str) -> None:
    """Raise BridgeError for a name that isn't short printable text, as that of every weight is.

    Control characters could move a terminal's cursor, line ends forge a line of a report.
    """
    for name in names:
        if not isinstance(name, str):
            raise BridgeError(
                f"{file} has a {type(name).__name__} where the name of a tensor should be. It "
                "isn't a state dict."
            )
        if not name.isprintable() or len(name) > _LONGEST:
            raise BridgeError(
                f"{file} has a tensor of the name {name[:60]!r}, which no model has: it isn't "
                "short printable text. Don't use this file."
            )


def tensors_of(state: Mapping[Any, Any], file: str) -> dict[str, TensorRef]:
    """A state dict's tensors by their names. Raises BridgeError as ``check_names`` does."""
    check_names(state, file)
    return {name: value for name, value in state.items() if isinstance(value, TensorRef)}
