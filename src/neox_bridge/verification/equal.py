"""Checks whether two tensors have equal bits, without assembling or copying them.

Each side is read from its files into buffers of the thread. The overlaps of pieces of both sides
are compared inside these buffers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from neox_bridge.execution import movers
from neox_bridge.execution.buffers import buffer, room
from neox_bridge.execution.casts import cast
from neox_bridge.execution.context import Context
from neox_bridge.execution.extents import same_blocks
from neox_bridge.execution.transform import boxes, piece_values
from neox_bridge.tensors.dtypes import itemsize, to_numpy
from neox_bridge.tensors.pieces import Piece, Shape, Whole, byte_range, cut
from neox_bridge.tensors.sharing import LEAST_SHARED_BYTES, whole_blocks

if TYPE_CHECKING:
    import numpy as np

    from neox_bridge.stores.ranges import Remote

    Array = np.ndarray[Any, np.dtype[Any]]
    _Side = tuple[int | Remote, str, int]  # descriptor, path, offset

STEP_BYTES = 1 << 19  # bytes of a box, so that those of both sides stay in the cache (measured)


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of a file; offset and size in bytes."""

    file: str
    offset: int
    size: int


def equal(first: Whole, second: Whole, context: Context) -> bool:
    """Whether the first tensor, cast to the second dtype, equals the second bit by bit.

    Shapes must be equal. Returns False for reductions, random values and tensors that pieces do not
    cover. Raises BridgeError if a file is too short or cannot be read.
    """
    if any(whole.reduce != "none" or whole.random is not None for whole in (first, second)):
        return False
    runs = _runs(first, second) if first.dtype == second.dtype else None
    if runs is not None:
        return all(_run_same(*run, context) for run in runs)
    limit = max(1, STEP_BYTES // max(itemsize(first.dtype), itemsize(second.dtype)))
    return all(
        _same(
            _read(first, second.dtype, start, shape, room(0), context),
            _read(second, second.dtype, start, shape, room(1), context),
            prod(shape),
            context,
        )
        for start, shape in boxes(first.shape, limit)
    )


def _runs(first: Whole, second: Whole) -> list[tuple[_Run, _Run]] | None:
    """Runs of bytes that tile both tensors; None if a piece is not contiguous or has no source.

    Uses few Python steps per megabyte, because other threads wait for the interpreter.
    """
    runs = []
    elements = prod(first.shape)
    for piece in first.pieces:
        for other in cut(second, piece.to, piece.shape, piece.to):
            start = tuple(
                s + q - p for s, p, q in zip(piece.start, piece.to, other.to, strict=True)
            )
            part = replace(piece, start=start, to=other.to, shape=other.shape)
            if part.source is None or other.source is None:
                return None
            if part.source.dtype != other.source.dtype or part.source.dtype != first.dtype:
                return None
            a, b = byte_range(part, first.shape), byte_range(other, second.shape)
            if a is None or b is None:
                return None
            runs.append((_Run(part.source.file, a[0], a[2]), _Run(other.source.file, b[0], b[2])))
            elements -= prod(other.shape)
    return runs if elements == 0 else None


def _run_same(a: _Run, b: _Run, context: Context) -> bool:
    """Disk blocks that both files share are equal and are not read."""
    files = context.files
    with files.reading(a.file) as one, files.reading(b.file) as other:
        sides = (one, a.file, a.offset), (other, b.file, b.offset)
        low, high = _shared(*sides, a.size)
        return all(_bytes_same(*sides, *part, context) for part in ((0, low), (high, a.size)))


def _shared(a: "_Side", b: "_Side", size: int) -> tuple[int, int]:
    """(begin, end) of the range in shared blocks, relative to the start of both runs."""
    (one, _, start), (other, _, to) = a, b
    if size < LEAST_SHARED_BYTES or not isinstance(one, int) or not isinstance(other, int):
        return 0, 0
    low, high = whole_blocks(start, to, size)
    same = same_blocks(one, start + low, other, to + low, high - low)
    return (low, high) if same else (0, 0)


def _bytes_same(a: "_Side", b: "_Side", start: int, end: int, context: Context) -> bool:
    """Compare with memcmp (through bytearray), which is faster than numpy and needs no import."""
    right = memoryview(buffer(1, STEP_BYTES))
    for at in range(start, end, STEP_BYTES):
        context.check()
        size = min(STEP_BYTES, end - at)
        left = buffer(0, STEP_BYTES) if size == STEP_BYTES else bytearray(size)
        for (fd, path, offset), into in ((a, memoryview(left)), (b, right[:size])):
            movers.read(fd, path, into, offset + at)
        if left != right[:size]:
            return False
    return True


def _read(
    whole: Whole,
    dtype: str,
    start: Shape,
    shape: Shape,
    room: "Callable[[int], Array]",
    context: Context,
) -> "list[tuple[Piece, Array]]":
    """The pieces of a box, each with its elements in a dtype, strided as in its file."""
    import numpy as np

    pieces, wanted = [], to_numpy(dtype)
    for piece in cut(whole, start, shape, (0,) * len(shape)):
        if piece.source is None:
            values: Array = np.full(piece.shape, piece.fill, wanted)
        else:
            values = cast(piece_values(piece, context, room), wanted)
        pieces.append((piece, values))
    return pieces


def _same(
    first: "list[tuple[Piece, Array]]",
    second: "list[tuple[Piece, Array]]",
    elements: int,
    context: Context,
) -> bool:
    """Whether both have these elements with equal bits."""
    context.check()
    for one, a in first:
        for other, b in second:
            low = tuple(map(max, one.to, other.to))
            high = tuple(
                min(p + n, q + m)
                for p, n, q, m in zip(one.to, one.shape, other.to, other.shape, strict=True)
            )
            if any(p >= q for p, q in zip(low, high, strict=True)):
                continue
            size = tuple(q - p for p, q in zip(low, high, strict=True))
            if not _bits_same(_box(a, one, low, size), _box(b, other, low, size)):
                return False
            elements -= prod(size)
    return elements == 0


def _box(values: "Array", piece: Piece, low: Shape, size: Shape) -> "Array":
    starts = zip(low, piece.to, size, strict=True)
    return values[tuple(slice(p - t, p - t + n) for p, t, n in starts)]


def _bits_same(a: "Array", b: "Array") -> bool:
    """Whether two arrays of one dtype and shape have the same bits."""
    import numpy as np

    width = a.dtype.itemsize
    if a.flags.c_contiguous and b.flags.c_contiguous:
        words = 8 if a.nbytes % 8 == 0 else 1
        bits = np.dtype(f"u{words}")
        return bool((a.reshape(-1).view(bits) == b.reshape(-1).view(bits)).all())
    if width > 8:
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    bits = np.dtype(f"u{min(width, 8)}")
    return bool((a.view(bits) == b.view(bits)).all())
