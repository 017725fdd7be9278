"""Memory that a thread keeps for what it reads: new pages cost as much as filling them."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

ROOM_BYTES = 4 << 20
_kept = threading.local()


def buffer(number: int, size: int) -> bytearray:
    """This thread's buffer of that number and size in bytes, of any content.

    0 and 1: the two sides of a comparison. 2: of a hash. 3: of what is moved.
    """
    buffers: dict[tuple[int, int], bytearray] = _kept.__dict__.setdefault("buffers", {})
    if (number, size) not in buffers:
        buffers[number, size] = bytearray(size)
    return buffers[number, size]


def room(number: int) -> "Callable[[int], Array]":
    """Gives parts of this thread's buffer, as uint8, and new memory where that is used up.

    What was given before by another ``room`` of the number is overwritten.
    """
    import numpy as np

    rooms: dict[int, Array] = _kept.__dict__.setdefault("rooms", {})
    if number not in rooms:
        rooms[number] = np.empty(ROOM_BYTES, np.uint8)  # which numpy asks to have huge pages
    kept, used = rooms[number], 0

    def give(size: int) -> "Array":
        nonlocal used
        if used + size > ROOM_BYTES:
            return np.empty(size, np.uint8)
        at, used = used, (used + size + 63) // 64 * 64
        return kept[at : at + size]

    return give
