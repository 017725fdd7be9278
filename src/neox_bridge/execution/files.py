"""A pool of open files that threads share. Checks that sources do not change during a run."""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neox_bridge.errors import BridgeError
from neox_bridge.stores.paths import is_local, states

if TYPE_CHECKING:
    from neox_bridge.execution.temporary_copies import TemporaryCopies
    from neox_bridge.stores.ranges import Ranges, Remote

LIMIT = 64  # open files that are kept; threads may open more at once
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)

Identity = tuple[int, int | str]


@dataclass
class Handle:
    """An open file, in use while a ``with`` block holds it."""

    fd: int
    lock: threading.Lock
    users: int = 0

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1


@dataclass
class Files:
    """File descriptors by path and flags. The least recently used one is closed first."""

    _open: "OrderedDict[tuple[str, int], Handle]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ranges: "Ranges | None" = None
    _copies: "TemporaryCopies | None" = None

    def reading(self, path: str) -> "AbstractContextManager[int | Remote]":
        """A descriptor of a source, or a ``Remote`` for a URL, for use in ``with``.

        Raises BridgeError with its name if it cannot be opened.
        """
        if not is_local(path):
            return nullcontext(self._remote(path))
        try:
            return self._take((path, os.O_RDONLY))
        except OSError as error:
            raise unreadable(path, error) from None

    def copied(self, url: str, start: int, size: int) -> AbstractContextManager[int]:
        """A descriptor of a temporary file with some bytes of an object, for use in ``with``.

        Raises BridgeError if it cannot be made.
        """
        from neox_bridge.execution.temporary_copies import TemporaryCopies

        remote = self._remote(url)
        with self._lock:
            self._copies = self._copies or TemporaryCopies()
        return self._copies.take(remote, start, size)

    def writing(self, path: str) -> AbstractContextManager[int]:
        """A descriptor of an existing output file, for use in ``with``."""
        return self._take((path, os.O_WRONLY))

    def close(self) -> None:
        """Close all files. Call it only when no thread is running."""
        if self._ranges is not None:
            self._ranges.close()
        if self._copies is not None:
            self._copies.close()
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].fd)

    def _remote(self, url: str) -> "Remote":
        from neox_bridge.stores.ranges import Ranges, Remote

        with self._lock:
            self._ranges = self._ranges or Ranges()
        return Remote(url, self._ranges)

    def _take(self, key: tuple[str, int]) -> Handle:
        with self._lock:
            handle = self._open.get(key)
            if handle is None:
                self._make_room()
                fd = os.open(key[0], key[1] | _CLOEXEC)
                handle = self._open[key] = Handle(fd, self._lock)
            self._open.move_to_end(key)
            handle.users += 1
            return handle

    def _make_room(self) -> None:
        if len(self._open) < LIMIT:
            return
        for key, handle in self._open.items():
            if not handle.users:
                del self._open[key]
                os.close(handle.fd)
                return


def unreadable(path: str, error: OSError) -> BridgeError:
    """The error for a source that cannot be read."""
    return BridgeError(f"{path} cannot be read: {error.strerror}. Check the file and its disk.")


def ended_early(path: str, missing: int) -> BridgeError:
    """The error for a source that became shorter."""
    return BridgeError(f"{path} ended {missing:,} bytes early: it changed while it was read.")


def identities(paths: Collection[str]) -> dict[str, Identity]:
    """Size in bytes and modification time of each file; size and tag of an object.

    Raises BridgeError if one was deleted.
    """
    return {path: (s.size, s.tag or s.modified_ns) for path, s in states(paths).items()}


def check_same(before: dict[str, Identity]) -> None:
    """Raise BridgeError with the name of the first file that changed."""
    now = identities(before)
    for path, identity in before.items():
        if now[path] != identity:
            raise BridgeError(
                f"{path} changed while it was read. Convert again when no other process writes to "
                "it."
            )
