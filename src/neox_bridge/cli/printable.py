"""Text that came from files, made fit for a terminal: it can't move the cursor or forge a line."""

import io
import sys

_LONGEST = 4000  # characters of a message
# C0 and C1 controls, separators of lines, and what turns the direction of writing
_CONTROLS = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F))
_CONTROLS = (*_CONTROLS, *range(0x2066, 0x206A))
_ESCAPES = {n: f"\\x{n:02x}" if n < 256 else f"\\u{n:04x}" for n in _CONTROLS if n not in (9, 10)}


def printable(text: str) -> str:
    """The text with controls, but for tabs and line ends, as escapes that can be read."""
    return text.translate(_ESCAPES)


def plain(text: str) -> str:
    """A name as it is within a line of a table: line ends and tabs are escapes too."""
    steps = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(steps)


def one_line(message: str) -> str:
    """A message as one line, cut where it is longer than anybody reads."""
    text = " ".join(message[: 2 * _LONGEST].splitlines())
    return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …")


class _Stream(io.TextIOWrapper):
    def write(self, text: str) -> int:
        return super().write(printable(text))


def protect_stdout() -> None:
    """Let nothing else reach stdout; stderr has colours of its own, and ``one_line``."""
    old = sys.stdout
    if isinstance(old, io.TextIOWrapper):
        buffered, encoding = old.line_buffering, old.encoding
        sys.stdout = _Stream(
            old.detach(), encoding, errors="backslashreplace", line_buffering=buffered
        )
