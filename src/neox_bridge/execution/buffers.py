"""Per-thread read buffers, reused because new pages cost as much as filling them."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

ROOM_BYTES = 4 << 20
_kept = threading.local()


def buffer(number: int, size: int) -> bytearray:
    """This thread's buffer with this number, of ``size`` bytes and arbitrary content.

    0 and 1: the two sides of a comparison. 2: hashing. 3: copying.
    """
    buffers: dict[tuple[int, int], bytearray] = _kept.__dict__.setdefault("buffers", {})
    if (number, size) not in buffers:
        buffers[number, size] = bytearray(size)
    return buffers[number, size]


def room(number: int) -> "Callable[[int], Array]":
    """Returns an allocator of uint8 parts of this thread's buffer; new memory once it is used up.

    Parts from an earlier ``room`` with the same number are overwritten.
    """
    import numpy as np

    rooms: dict[int, Array] = _kept.__dict__.setdefault("rooms", {})
    if number not in rooms:
        # numpy requests huge pages for allocations of at least this size
        rooms[number] = np.empty(ROOM_BYTES, np.uint8)
    kept, used = rooms[number], 0

    def give(size: int) -> "Array":
        nonlocal used
        if used + size > ROOM_BYTES:
            return np.empty(size, np.uint8)
        at, used = used, (used + size + 63) // 64 * 64
        return kept[at : at + size]

    return give
