"""Protects stdout and stderr against control characters from files and against write errors.

Everything that is written is escaped (``wording``). A closed pipe (``| head``) or a full disk does
not stop the work: the rest of the output is dropped, the command finishes, and it reports a full
disk at the end.
"""

import errno
import io
import os
import sys
from typing import Any, TextIO, cast

from neox_bridge.wording import wording


class _Stream(io.TextIOWrapper):
    """A protected stream. failure: the first error while writing."""

    failure: OSError | None = None

    def write(self, text: str) -> int:
        return self.write_as_is(wording(text))

    def write_as_is(self, text: str) -> int:
        """Write without escaping: for colors and progress bars."""
        try:
            return super().write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        """Discard all further output, including what is still buffered."""
        self.failure = self.failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _Unprotected:
    """A protected stream for progress bars, which keeps their control codes."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self.write = stream.write_as_is

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_streams() -> None:
    """Protect stdout and stderr, even if the process was started without them (``>&-``)."""
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # one of the three was closed, so the next opened file would have become stdout
    os.close(opened)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is None:
            stream = io.TextIOWrapper(open(number, "wb", closefd=False))  # noqa: SIM115
            setattr(sys, name, stream)
            old = stream
        if isinstance(old, io.TextIOWrapper) and not isinstance(old, _Stream):
            buffered, encoding = old.line_buffering, old.encoding
            new = _Stream(
                old.detach(), encoding, errors="backslashreplace", line_buffering=buffered
            )
            setattr(sys, name, new)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115


def for_progress() -> TextIO:
    """stderr for a progress bar."""
    stream = sys.stderr
    return cast(TextIO, _Unprotected(stream)) if isinstance(stream, _Stream) else stream


def write_color(code: str) -> None:
    """Write a terminal code for a color to stderr, if that is a terminal."""
    stream = sys.stderr
    (stream.write_as_is if isinstance(stream, _Stream) else stream.write)(code)


def stdout_failure() -> str:
    """Why output was lost; empty if nothing was lost or the reader closed the pipe."""
    stream = sys.stdout
    stream.flush()
    failure = stream.failure if isinstance(stream, _Stream) else None
    if failure is None or failure.errno == errno.EPIPE:
        return ""
    return failure.strerror or str(failure)
