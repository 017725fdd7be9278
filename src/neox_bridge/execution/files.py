"""Files that are open: few at a time, shared by threads, the same at the end as at the start."""

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
    from neox_bridge.stores.ranges import Ranges, Remote

LIMIT = 64  # open files that are kept; threads that use more than these at once get them all
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)

Identity = tuple[int, int | str]


@dataclass
class _Handle:
    """An open file, for as long as a ``with`` block uses it."""

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
    """Descriptors by path and flags; the one that was used longest ago is closed for another."""

    _open: "OrderedDict[tuple[str, int], _Handle]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ranges: "Ranges | None" = None

    def reading(self, path: str) -> "AbstractContextManager[int | Remote]":
        """A descriptor of a source, or what stands for it where that is a URL, in a ``with``.

        Raises BridgeError, naming it, where it can't be opened.
        """
        if not is_local(path):
            return nullcontext(self._remote(path))
        try:
            return self._take((path, os.O_RDONLY))
        except OSError as error:
            raise unreadable(path, error) from None

    def writing(self, path: str) -> AbstractContextManager[int]:
        """A descriptor of an output file that exists already, in a ``with``."""
        return self._take((path, os.O_WRONLY))

    def close(self) -> None:
        """Close all, at the end, when no thread runs any more."""
        if self._ranges is not None:
            self._ranges.close()
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].fd)

    def _remote(self, url: str) -> "Remote":
        from neox_bridge.stores.ranges import Ranges, Remote

        with self._lock:
            self._ranges = self._ranges or Ranges()
        return Remote(url, self._ranges)

    def _take(self, key: tuple[str, int]) -> _Handle:
        with self._lock:
            handle = self._open.get(key)
            if handle is None:
                self._make_room()
                fd = os.open(key[0], key[1] | _CLOEXEC)
                handle = self._open[key] = _Handle(fd, self._lock)
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
    """What to say where a source can't be read."""
    return BridgeError(f"{path} cannot be read: {error.strerror}. Check the file and its disk.")


def ended_early(path: str, missing: int) -> BridgeError:
    """What to say where a source is shorter than it was."""
    return BridgeError(f"{path} ended {missing:,} bytes early: it changed while it was read.")


def identities(paths: Collection[str]) -> dict[str, Identity]:
    """Size in bytes and modification time of each file; size and tag of an object.

    Raises BridgeError for one that is gone.
    """
    return {path: (s.size, s.tag or s.modified_ns) for path, s in states(paths).items()}


def check_same(before: dict[str, Identity]) -> None:
    """Raise BridgeError, naming the file, unless all are as they were."""
    now = identities(before)
    for path, identity in before.items():
        if now[path] != identity:
            raise BridgeError(
                f"{path} changed while it was read. Convert again when no other process writes to "
                "it."
            )
