"""Names in state dicts, which come from files and go into messages, tables and other files."""

from collections.abc import Iterable

from neox_bridge.errors import BridgeError

_LONGEST = 512  # characters


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
