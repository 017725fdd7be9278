"""Temporary files with the bytes of objects that are needed in another order.

A transposed matrix needs bytes of all its rows for each block. If its ranges do not fit into
memory, every block would fetch all of them again.
"""

import os
import tempfile
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neox_bridge.errors import BridgeError
from neox_bridge.execution import movers
from neox_bridge.execution.files import Handle

if TYPE_CHECKING:
    from neox_bridge.stores.ranges import Remote

_KEPT = 2  # copies that no thread uses
_Key = tuple[str, int, int]  # URL, first byte, bytes


@dataclass
class TemporaryCopies:
    """The copies of one execution, shared by its threads."""

    _copies: "OrderedDict[_Key, Handle]" = field(default_factory=OrderedDict)
    _making: dict[_Key, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, source: "Remote", start: int, size: int) -> AbstractContextManager[int]:
        """A descriptor of a file with these bytes of an object, for use in ``with``.

        Raises BridgeError if the object cannot be read, or if the disk has no space.
        """
        key = source.url, start, size
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                handle = self._copies.get(key)
            fd = _copied(source, start, size) if handle is None else -1
            with self._lock:
                handle = self._copies.setdefault(key, Handle(fd, self._lock))
                handle.users += 1
                self._copies.move_to_end(key)
                unused = [key for key, other in self._copies.items() if not other.users]
                for old in unused[:-_KEPT]:
                    os.close(self._copies.pop(old).fd)
                return handle

    def close(self) -> None:
        """Delete all copies. Call it only when no thread is running."""
        with self._lock:
            while self._copies:
                os.close(self._copies.popitem()[1].fd)


def _copied(source: "Remote", start: int, size: int) -> int:
    """A descriptor of a new file, which is deleted when it is closed."""
    block = memoryview(bytearray(min(size, movers.BUFFER_BYTES)))
    try:
        with tempfile.TemporaryFile() as file:
            for at in range(0, size, len(block)):
                part = block[: size - at]
                movers.read(source, source.url, part, start + at)
                file.write(part)
            file.flush()
            return os.dup(file.fileno())
    except OSError as error:
        raise BridgeError(
            f"{source.url}: transposing a matrix needs a temporary file of {size:,} bytes in "
            f"{tempfile.gettempdir()}, but: {error.strerror}. Set TMPDIR to a folder on another "
            "disk."
        ) from None
