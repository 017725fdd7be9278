"""Makes the tensors whose bytes change: strided, cast, summed, averaged, filled, random.

Block after block of rows, so that memory stays bounded whatever the tensor's size.
"""

import mmap
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context
from neox_bridge.formats.dtypes import itemsize, to_numpy
from neox_bridge.formats.tensor_ref import TensorRef, row_major
from neox_bridge.planning.pieces import OutputTensor, Piece

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 4 << 20


def blocks(tensor: OutputTensor, context: Context) -> "Iterator[Array]":
    """The tensor's elements in its dtype, a contiguous block of rows at a time, in order."""
    if tensor.random is not None:
        yield from random_blocks(tensor)
    elif tensor.reduce == "none":
        yield from _finish(tensor, _assembled(tensor), context)
    else:
        yield from _finish(tensor, _reduced(tensor, context), context)


def replica(tensor: OutputTensor) -> Piece | None:
    """The piece whose bits are the result of a reduction, or None where it must be computed.

    "replica": the first, where all are the same bits. "sum": the only one that isn't -0.0
    throughout, since x + -0.0 is x for every x, NaNs with their payloads included.
    """
    if tensor.reduce == "replica":
        same = all(_equal(tensor, piece) for piece in tensor.pieces[1:])
        return tensor.pieces[0] if same else None
    rest = [piece for piece in tensor.pieces if not _negative_zero(tensor, piece)]
    if len(rest) > 1:
        return None
    return rest[0] if rest else tensor.pieces[0]


def random_blocks(tensor: OutputTensor) -> "Iterator[Array]":
    """Finite values below 0.04 in size, the same for the same seed; floating dtypes only."""
    import numpy as np

    assert tensor.random is not None
    rng = np.random.Generator(np.random.SFC64(tensor.random))
    left, dtype = prod(tensor.shape), to_numpy(tensor.dtype)
    if tensor.dtype == "float16":
        while left:
            count = min(left, BLOCK // 2)
            words = np.frombuffer(rng.bytes(count * 2), np.uint16)
            # sign, mantissa, and of the exponent only what keeps it at or below 9: |x| < 2**-5
            yield (words & np.uint16(0xA7FF)).view(np.float16)
            left -= count
        return
    while left:
        count = min(left, BLOCK // 8)
        yield ((rng.random(count, np.float32) - np.float32(0.5)) * np.float32(0.078)).astype(dtype)
        left -= count


def view(ref: TensorRef, start: tuple[int, ...], shape: tuple[int, ...]) -> "Array":
    """A box of a source tensor, mapped, not read; dimensions and strides are the ref's own."""
    import numpy as np

    size = itemsize(ref.dtype)
    strides = ref.strides or row_major(ref.shape)
    if 0 in shape:
        return np.empty(shape, to_numpy(ref.dtype))
    first = ref.offset + size * sum(a * b for a, b in zip(start, strides, strict=True))
    last = first + size * (1 + sum((n - 1) * b for n, b in zip(shape, strides, strict=True)))
    page = first - first % mmap.ALLOCATIONGRANULARITY
    with open(ref.file, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), last - page, access=mmap.ACCESS_READ, offset=page)
        except ValueError:
            raise BridgeError(f"{ref.file} changed while it was read: it is shorter now.") from None
    steps = tuple(size * stride for stride in strides)
    found: Array = np.ndarray(shape, to_numpy(ref.dtype), data, first - page, steps)
    return found


def _row_blocks(tensor: OutputTensor) -> Iterator[tuple[int, int]]:
    rows = tensor.shape[0]
    row = max(1, tensor.nbytes // max(rows, 1))
    step = max(1, BLOCK // row)
    for low in range(0, rows, step):
        yield low, min(rows, low + step)


def _assembled(tensor: OutputTensor) -> "Iterator[Array]":
    """Rows put together from every piece that touches them, in the source's dtype if all agree."""
    import numpy as np

    dtypes = {piece.source.dtype for piece in tensor.pieces if piece.source is not None}
    dtype = to_numpy(dtypes.pop() if len(dtypes) == 1 else tensor.dtype)
    if not tensor.shape:
        (piece,) = tensor.pieces
        yield np.array([_box(piece, (), ())]).astype(dtype)
        return
    for low, high in _row_blocks(tensor):
        out = np.empty((high - low, *tensor.shape[1:]), dtype)
        for piece in tensor.pieces:
            first = max(low, piece.to[0])
            last = min(high, piece.to[0] + piece.shape[0])
            if first < last:
                start = (piece.start[0] + first - piece.to[0], *piece.start[1:])
                shape = (last - first, *piece.shape[1:])
                place = [slice(first - low, last - low)]
                place += [slice(t, t + n) for t, n in zip(piece.to[1:], shape[1:], strict=True)]
                out[tuple(place)] = _box(piece, start, shape)
        yield out


def _box(piece: Piece, start: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    return piece.fill if piece.source is None else view(piece.source, start, shape)


def _rows(tensor: OutputTensor, piece: Piece) -> "Iterator[Array]":
    """A reduction's piece, which holds the whole tensor, in the blocks of the tensor."""
    assert piece.source is not None
    if not tensor.shape:
        yield view(piece.source, (), ())
        return
    for low, high in _row_blocks(tensor):
        start = (piece.start[0] + low, *piece.start[1:])
        yield view(piece.source, start, (high - low, *tensor.shape[1:]))


def _reduced(tensor: OutputTensor, context: Context) -> "Iterator[Array]":
    """Sums or means in float64, in the order of the ranks."""
    import numpy as np

    largest = 0.0
    for parts in zip(*(_rows(tensor, piece) for piece in tensor.pieces), strict=True):
        with np.errstate(all="ignore"):
            total = np.zeros(parts[0].shape, np.float64)
            for part in parts:
                total = total + part.astype(np.float64)
            if tensor.reduce == "replica":
                total = total / len(parts)
                apart = max(float(np.nanmax(np.abs(p.astype(np.float64) - total))) for p in parts)
                largest = max(largest, apart)
        yield total
    if tensor.reduce == "replica":
        source = tensor.pieces[0].source
        context.deviate(tensor.name, source.file if source else "", largest)


def _finish(tensor: OutputTensor, made: "Iterator[Array]", context: Context) -> "Iterator[Array]":
    """Divided and cast; values that a cast made infinite are counted."""
    import numpy as np

    dtype, lost = to_numpy(tensor.dtype), 0
    for values in made:
        if tensor.divisor != 1:
            values = values.astype(np.float64) / tensor.divisor
        if values.dtype == dtype:
            yield values
            continue
        with np.errstate(all="ignore"):
            # bfloat16 and float16 have no direct way to each other that rounds once
            middle = values.astype(np.float32) if values.dtype.itemsize == 2 else values
            out = middle.astype(dtype)
        if not np.isfinite(out).all():
            lost += int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(out)))
        yield out
    if lost:
        context.overflow(tensor.name, lost)


def _bits(values: "Array") -> "Array":
    import numpy as np

    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _equal(tensor: OutputTensor, other: Piece) -> bool:
    import numpy as np

    first = _rows(tensor, tensor.pieces[0])
    pairs = zip(first, _rows(tensor, other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b)) for a, b in pairs)


def _negative_zero(tensor: OutputTensor, piece: Piece) -> bool:
    import numpy as np

    assert piece.source is not None
    size = itemsize(piece.source.dtype)
    pattern = np.frombuffer(bytes(size - 1) + b"\x80", np.uint8)  # little-endian
    parts: Sequence[Any] = [_bits(a).reshape(-1, size) for a in _rows(tensor, piece)]
    return all(bool((part == pattern).all()) for part in parts)
