"""Memory that a thread keeps for what it reads: new pages cost as much as filling them."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

ROOM = 4 << 20  # bytes of a buffer
_kept = threading.local()


def buffer(number: int) -> "Array":
    """This thread's buffer of that number: ROOM bytes, uint8, of any content."""
    import numpy as np

    buffers: dict[int, Array] = _kept.__dict__.setdefault("buffers", {})
    if number not in buffers:
        buffers[number] = np.empty(ROOM, np.uint8)
    return buffers[number]


def room(number: int) -> "Callable[[int], Array]":
    """Gives parts of this thread's buffer, and new memory where that is used up.

    What was given before by another ``room`` of the number is overwritten.
    """
    import numpy as np

    kept = buffer(number)
    used = 0

    def give(size: int) -> "Array":
        nonlocal used
        if used + size > ROOM:
            return np.empty(size, np.uint8)
        at, used = used, (used + size + 63) // 64 * 64
        return kept[at : at + size]

    return give
