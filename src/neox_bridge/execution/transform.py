"""Computes tensors whose bytes change: strided, cast, scaled, summed, averaged, filled, random.

It works in blocks, each a contiguous run of the tensor, so that memory is bounded for any size and
shape.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from math import frexp, prod
from typing import TYPE_CHECKING, Any

from neox_bridge.execution import movers
from neox_bridge.execution.buffers import room
from neox_bridge.execution.casts import cast
from neox_bridge.execution.context import Context
from neox_bridge.execution.files import ended_early, unreadable
from neox_bridge.stores.paths import is_local
from neox_bridge.tensors.dtypes import itemsize, to_numpy
from neox_bridge.tensors.pieces import OutputTensor, Piece, Shape, Whole, byte_range, cut
from neox_bridge.tensors.tensor_ref import TensorRef, halves, row_major

if TYPE_CHECKING:
    import numpy as np

    from neox_bridge.stores.ranges import Remote

    Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_BYTES = 4 << 20  # read per block at most, including gaps in the source
GAPS = 4  # a box is read as one run if that is at most this many times its bytes, otherwise mapped
STEP_BYTES = BLOCK_BYTES // GAPS  # per write; larger blocks cost page faults (measured)
_SPARSE, _LITTLE_BYTES = 16, 256 << 10  # for objects: gaps in a run that is read, bytes of any run
_FETCHED_BYTES = 32 << 20  # of a transposed object; ranges.MEMORY is shared by all threads
WIDE_BYTES = 4  # size of an element for this limit if there are intermediates of up to 8 bytes


def blocks(tensor: OutputTensor, context: Context, *, reuse: bool = False) -> "Iterator[Array]":
    """The elements of the tensor in its dtype, in contiguous blocks, in file order.

    reuse: each block is in a buffer of this thread, which the next block overwrites. Counts finite
    values that became infinite in a cast, and values that were multiplied by a power of two and do
    not fit the dtype exactly.
    """
    import numpy as np

    if tensor.random is not None:
        yield from random_blocks(tensor)
        return
    lost: list[int] = []
    rounded = 0
    by_power_of_two = _by_power_of_two(tensor)
    reduced = tensor.reduce != "none"
    blocks_made = _reduced(tensor, context) if reduced else _assembled(tensor, context, lost, reuse)
    for values in blocks_made:
        if tensor.divisor != 1:
            values = values.astype(np.float64) / tensor.divisor
        out = _counted(values, to_numpy(tensor.dtype), lost)
        if by_power_of_two:
            rounded += int(np.count_nonzero(np.isfinite(values) & (out != values)))
        yield np.ascontiguousarray(out)
    if lost:
        context.overflow(tensor, sum(lost))
    if rounded:
        context.round_scaled(tensor.name, rounded)


def replica(tensor: OutputTensor, context: Context) -> Piece | None:
    """The piece whose bits are the result of a reduction; None if it must be computed.

    "replica": the first, if all have equal bits. "sum": the only one that is not -0.0 everywhere,
    because x + -0.0 is x for every x, including NaNs with their payloads; 0 for integers.
    """
    if tensor.reduce == "replica":
        first, *others = tensor.pieces
        known = _small(tensor, first, context)
        same = all(_equal(tensor, piece, known, context) for piece in others)
        return first if same else None
    rest = [piece for piece in tensor.pieces if not _negative_zero(tensor, piece, context)]
    if len(rest) > 1:
        return None
    return rest[0] if rest else tensor.pieces[0]


def random_blocks(tensor: OutputTensor) -> "Iterator[Array]":
    """Random values of a seed: finite and below 0.04 in size; floating dtypes only."""
    import numpy as np

    assert tensor.random is not None
    rng = np.random.Generator(np.random.SFC64(tensor.random))
    left, dtype = prod(tensor.shape), to_numpy(tensor.dtype)
    if tensor.dtype == "float16":
        while left:
            count = min(left, STEP_BYTES // 2)
            words = np.frombuffer(rng.bytes(count * 2), np.uint16)
            # sign, mantissa, and of the exponent only what keeps it at or below 9: |x| < 2**-5
            yield (words & np.uint16(0xA7FF)).view(np.float16)
            left -= count
        return
    while left:
        count = min(left, STEP_BYTES // 8)
        yield ((rng.random(count, np.float32) - np.float32(0.5)) * np.float32(0.078)).astype(dtype)
        left -= count


def load(
    ref: TensorRef,
    start: Shape,
    shape: Shape,
    context: Context,
    give: "Callable[[int], Array] | None" = None,
) -> "Array":
    """A box of a source tensor, strided as it is in the file.

    give: returns a uint8 buffer of a size to read into; by default, new memory. Raises BridgeError
    if the file is too short or cannot be read.
    """
    import numpy as np

    dtype, size = to_numpy(ref.dtype), itemsize(ref.dtype)
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = ref.strides or row_major(ref.shape)
    first = ref.offset + size * sum(a * b for a, b in zip(start, strides, strict=True))
    extent = size * (1 + sum((n - 1) * b for n, b in zip(shape, strides, strict=True)))
    steps = tuple(size * stride for stride in strides)
    data: Any
    with _reading(ref, extent, context) as (fd, before):
        first -= before
        most = BLOCK_BYTES if extent <= _SPARSE * size * prod(shape) else _LITTLE_BYTES
        if not isinstance(fd, int) and extent > most:
            # a box with large gaps in an object, which cannot be mapped
            far: Array = np.empty(shape, dtype)
            for begin, part, place in halves(start, shape, strides):
                far[place] = load(ref, begin, part, context)
            return far
        gaps = 1 if context.maps_gaps else GAPS
        if not isinstance(fd, int) or extent <= gaps * size * prod(shape):
            data, at = give(extent) if give else np.empty(extent, np.uint8), 0
            movers.read(fd, ref.file, data.data, first)
        else:
            at = first % mmap.ALLOCATIONGRANULARITY
            try:
                data = mmap.mmap(fd, at + extent, access=mmap.ACCESS_READ, offset=first - at)
            except ValueError:
                raise ended_early(ref.file, extent) from None
            except OSError as error:
                raise unreadable(ref.file, error) from None
    box: Array = np.ndarray(shape, dtype, data, at, steps)
    return box


@contextmanager
def _reading(ref: TensorRef, extent: int, context: Context) -> "Iterator[tuple[int | Remote, int]]":
    """A source that is open for reading, and the offset in ``ref.file`` at which it starts.

    extent: the bytes of ``ref.file`` between the first and the last byte of a box. A transposed
    matrix of an object whose ranges do not fit into memory is copied first, because each of its
    blocks would fetch all of it.
    """
    strides = ref.strides or (1,)
    stored = itemsize(ref.dtype) * (
        1 + sum((n - 1) * stride for n, stride in zip(ref.shape, strides, strict=False))
    )
    is_spread = strides[-1] != 1 and extent > BLOCK_BYTES and stored > _FETCHED_BYTES
    if is_spread and not is_local(ref.file):
        with context.files.copied(ref.file, ref.offset, stored) as fd:
            yield fd, ref.offset
    else:
        with context.files.reading(ref.file) as source:
            yield source, 0


def piece_values(
    piece: Piece, context: Context, give: "Callable[[int], Array] | None" = None
) -> "Array":
    """The values of a piece that has a source: unchanged, or scaled in float64."""
    import numpy as np

    assert piece.source is not None
    values = load(piece.source, piece.start, piece.shape, context, give)
    if piece.scale == 1:
        return values
    with np.errstate(all="ignore"):
        scaled: Array = values.astype(np.float64) * piece.scale
    return scaled


def _by_power_of_two(tensor: OutputTensor) -> bool:
    """Whether pieces are scaled only by powers of two, which is exact."""
    scales = {piece.scale for piece in tensor.pieces} - {1.0}
    return bool(scales) and all(frexp(scale)[0] == 0.5 for scale in scales)


def boxes(shape: Shape, limit: int) -> Iterator[tuple[Shape, Shape]]:
    """(start, shape) of boxes of up to ``limit`` elements, each one run of a row-major tensor."""
    dim, inner = 0, prod(shape)
    while dim < len(shape) and inner > limit:
        inner //= shape[dim]
        dim += 1
    if dim == 0:
        if inner:
            yield (0,) * len(shape), shape
        return
    ahead, rest = shape[: dim - 1], shape[dim:]
    step = max(1, limit // inner)
    for index in product(*map(range, ahead)):
        for low in range(0, shape[dim - 1], step):
            count = min(step, shape[dim - 1] - low)
            yield (*index, low, *(0 for _ in rest)), (*(1 for _ in ahead), count, *rest)


def block_elements(tensor: OutputTensor) -> int:
    """The number of elements per block of a tensor."""
    dtypes = {piece.source.dtype for piece in tensor.pieces if piece.source is not None}
    is_plain = dtypes == {tensor.dtype} and tensor.divisor == 1 and tensor.reduce == "none"
    is_changed = not is_plain or any(piece.scale != 1 for piece in tensor.pieces)
    return max(1, STEP_BYTES // (WIDE_BYTES if is_changed else itemsize(tensor.dtype)))


def _assembled(
    tensor: OutputTensor, context: Context, lost: list[int], reuse: bool
) -> "Iterator[Array]":
    """Blocks assembled from their pieces, in the source's dtype if all pieces have the same."""
    import numpy as np

    dtypes = {piece.source.dtype for piece in tensor.pieces if piece.source is not None}
    scaled = any(piece.scale != 1 for piece in tensor.pieces)
    mixed = "float64" if scaled or tensor.divisor != 1 else tensor.dtype
    dtype = to_numpy(next(iter(dtypes)) if len(dtypes) == 1 and not scaled else mixed)
    limit = block_elements(tensor)
    whole = Whole(tensor.dtype, tensor.shape, tensor.pieces)
    for start, shape in boxes(tensor.shape, limit):
        context.check()
        pieces = cut(whole, start, shape, (0,) * len(shape))
        give = room(0) if reuse else None
        if len(pieces) == 1 and pieces[0].source is not None:
            yield _counted(piece_values(pieces[0], context, give), dtype, lost)
            continue
        out: Array = np.empty(shape, dtype)
        for piece in pieces:
            place = tuple(slice(t, t + n) for t, n in zip(piece.to, piece.shape, strict=True))
            if piece.source is None:
                out[place] = piece.fill
            else:
                values = piece_values(piece, context, give)
                out[place] = _counted(values, dtype, lost)
        yield out


def _values(tensor: OutputTensor, piece: Piece, context: Context) -> "Iterator[Array]":
    """The values of a piece of a reduction, in small blocks. The piece covers the whole tensor."""
    import numpy as np

    for start, shape in boxes(tensor.shape, block_elements(tensor)):
        context.check()
        if piece.source is None:
            yield np.full(shape, piece.fill, to_numpy(tensor.dtype))
        else:
            at = tuple(a + b for a, b in zip(piece.start, start, strict=True))
            yield piece_values(replace(piece, start=at, shape=shape), context)


def _reduced(tensor: OutputTensor, context: Context) -> "Iterator[Array]":
    """Sums or means in float64, in the order of the ranks."""
    import numpy as np

    largest = 0.0
    for parts in zip(*(_values(tensor, piece, context) for piece in tensor.pieces), strict=True):
        with np.errstate(all="ignore"):
            total = parts[0].astype(np.float64)
            for part in parts[1:]:
                total += part.astype(np.float64)
            if tensor.reduce == "replica":
                total /= len(parts)
                largest = max(largest, _settle(total, parts))
        yield total
    if tensor.reduce == "replica":
        source = tensor.pieces[0].source
        context.deviate(tensor.name, source.file if source else "", largest)


def _settle(mean: "Array", parts: "tuple[Array, ...]") -> float:
    """The largest deviation from the mean. Where all values are equal, the mean becomes that value.

    So the mean of equal -0.0, infinities or huge values is exact. A NaN or an infinity that only
    some ranks have counts as an infinite deviation.
    """
    import numpy as np

    first = parts[0].astype(np.float64)
    equal = np.ones(mean.shape, bool)
    for part in parts[1:]:
        equal &= (part == parts[0]) | (np.isnan(part) & np.isnan(first))
    np.copyto(mean, first, where=equal)
    largest = 0.0
    for part in parts:
        apart = np.abs(part.astype(np.float64) - mean)
        apart[equal] = 0
        apart[np.isnan(apart)] = np.inf
        largest = max(largest, float(apart.max(initial=0)))
    return largest


def _counted(values: "Array", dtype: "np.dtype[Any]", lost: list[int]) -> "Array":
    """Call ``cast``, and append to ``lost`` how many finite values became infinite or NaN."""
    if values.dtype == dtype:
        return values
    import numpy as np

    out = cast(values, dtype)
    with np.errstate(all="ignore"):
        if _narrower(values.dtype, dtype) and not _finite(out):
            count = int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(out)))
            lost += [count] if count else []
    return out


def _finite(values: "Array") -> bool:
    """Whether all values are finite; 16-bit floats are checked by their bits, in half the time."""
    import numpy as np

    if values.dtype.kind in "Vf" and values.dtype.itemsize == 2:
        infinity = np.array(np.inf, values.dtype).view(np.uint16)
        return bool((values.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0) < infinity)
    return bool(np.isfinite(values).all())


def _narrower(source: "np.dtype[Any]", dtype: "np.dtype[Any]") -> bool:
    """Whether a finite value may become infinite in this cast."""
    order = [to_numpy(name) for name in ("float16", "bfloat16", "float32", "float64")]
    known = source in order and dtype in order
    return source != dtype and not (known and order.index(source) < order.index(dtype))


def _bits(values: "Array") -> "Array":
    import numpy as np

    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _small(tensor: OutputTensor, piece: Piece, context: Context) -> tuple[str, bytearray] | None:
    """Dtype and bytes of a piece that covers the whole tensor, if they are few and contiguous.

    For comparing norms and biases of many ranks, which would take numpy twice as long.
    """
    source = piece.source
    if source is None or prod(tensor.shape) * itemsize(source.dtype) > STEP_BYTES:
        return None
    run = byte_range(piece, tensor.shape)
    if run is None:
        return None
    data = bytearray(run[2])
    with context.files.reading(source.file) as fd:
        movers.read(fd, source.file, memoryview(data), run[0])
    return source.dtype, data


def _equal(
    tensor: OutputTensor, other: Piece, known: tuple[str, bytearray] | None, context: Context
) -> bool:
    """Whether a piece equals the first piece bit for bit. known: ``_small`` of the first."""
    import numpy as np

    context.check()
    if known is not None and (data := _small(tensor, other, context)) is not None:
        return data == known
    first = _values(tensor, tensor.pieces[0], context)
    pairs = zip(first, _values(tensor, other, context), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b)) for a, b in pairs)


def _negative_zero(tensor: OutputTensor, piece: Piece, context: Context) -> bool:
    import numpy as np

    context.check()
    piece = replace(piece, scale=1.0)  # which keeps zeros and signs
    zero = element(piece.source.dtype if piece.source is not None else tensor.dtype, -0.0)
    if (data := _small(tensor, piece, context)) is not None:
        return data[1] == zero * (len(data[1]) // len(zero))
    bits = np.frombuffer(zero, np.uint8)
    return all(
        (_bits(values).reshape(-1, len(zero)) == bits).all()
        for values in _values(tensor, piece, context)
    )


@cache  # which treats 0.0 and -0.0 as equal; 0.0 is a hole and never requested
def element(dtype: str, value: float) -> bytes:
    """The bytes of one element."""
    import numpy as np

    return np.full((), value, to_numpy(dtype)).tobytes()
