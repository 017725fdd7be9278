"""The plan as plain data: boxes of source tensors, output tensors, output files."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from operator import add, sub
from typing import Literal

from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.tensor_ref import TensorRef, is_contiguous, packed, row_major

Shape = tuple[int, ...]
Reduce = Literal["none", "sum", "replica"]


@packed
@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a source tensor, and where in the destination it goes.

    source: None for a constant, whose value is ``fill`` (0.0, or -0.0 which keeps sums exact).
    start, to, shape: in elements, one number a dimension; source and destination have the same
        number of dimensions.
    scale: the source's values are multiplied by it, in float64 (``optimizer/gradient_scale``).
    """

    source: TensorRef | None
    start: Shape
    to: Shape
    shape: Shape
    fill: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of the model as one, wherever its pieces lie.

    reduce: "none": the pieces tile the tensor. "sum", "replica": every source holds all of it, one
        for each tensor-parallel rank; the value is their sum, or any of them (their mean where
        they differ).
    shards: the source's own tensors by tensor-parallel rank, where it has ranks.
    parts: what each such rank holds, where it isn't one tensor of a file.
    random: a seed, for a tensor that is made up (``neox-bridge toy``).
    """

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...] = ()
    reduce: Reduce = "none"
    shards: tuple[TensorRef, ...] = ()
    parts: "tuple[Whole, ...]" = ()
    random: int | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@packed
@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of an output file.

    offset: bytes from the file's start, once a format has placed it.
    dtype: that of the output; sources of another dtype are cast.
    divisor: the values are divided by it (row biases split over ranks).
    inline: the bytes themselves, for the few derived ones.
    crc_at: where in the file the CRC-32 of the tensor's bytes belongs (zip containers).
    """

    name: str
    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...] = ()
    reduce: Reduce = "none"
    divisor: int = 1
    inline: bytes | None = None
    random: int | None = None
    offset: int = 0
    crc_at: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    def at(self, offset: int, crc_at: tuple[int, ...] = ()) -> "OutputTensor":
        """The tensor with its place in a file; ``dataclasses.replace`` takes five times as long."""
        return OutputTensor(
            self.name,
            self.dtype,
            self.shape,
            self.pieces,
            self.reduce,
            self.divisor,
            self.inline,
            self.random,
            offset,
            crc_at,
        )


@packed
@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file below the target: literal bytes and tensors, or a copy of another file.

    path: relative to the target.
    literals: (offset, bytes): headers, pickles, small text files.
    copy_of: an absolute path, for files that are taken over as they are.
    seals: whether it is the record, a JSON object to which the others' sizes and hashes are added.
    """

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...] = ()
    tensors: tuple[OutputTensor, ...] = ()
    copy_of: str | None = None
    seals: bool = False


def scaled(whole: Whole, scale: float) -> Whole:
    """The tensor with every value multiplied by ``scale``. Its ``shards`` are left out."""
    pieces = tuple(
        Piece(piece.source, piece.start, piece.to, piece.shape, piece.fill, piece.scale * scale)
        for piece in whole.pieces
    )
    parts = tuple(scaled(part, scale) for part in whole.parts)
    return replace(whole, pieces=pieces, shards=(), parts=parts)


def whole_of(ref: TensorRef) -> Whole:
    """A source tensor as the whole of a tensor."""
    return Whole(ref.dtype, ref.shape, (box(ref),))


def box(ref: TensorRef) -> Piece:
    """All of a source tensor, at the destination's start."""
    zero = (0,) * len(ref.shape)
    return Piece(ref, zero, zero, ref.shape)


def cut(whole: Whole, start: Shape, shape: Shape, to: Shape) -> tuple[Piece, ...]:
    """The pieces of a box of ``whole``, moved so that the box's corner lies at ``to``."""
    if shape == whole.shape and not any(to) and all(shape):  # nothing is cut off or moved
        return whole.pieces
    if len(whole.pieces) == 1 and not any(whole.pieces[0].to):
        only = whole.pieces[0]
        if only.shape == whole.shape and not any(only.start) and all(shape):  # as most are
            return (Piece(only.source, start, to, shape, only.fill, only.scale),)
    return tuple(_clip(whole.pieces, start, shape, to))


def _clip(pieces: Iterable[Piece], start: Shape, shape: Shape, to: Shape) -> Iterable[Piece]:
    end = tuple(map(add, start, shape))
    above, below = (start[0], end[0]) if start else (0, 1)
    for piece in pieces:
        if start and (piece.to[0] >= below or piece.to[0] + piece.shape[0] <= above):
            continue  # most of the many pieces of a flat group, by one dimension
        low = tuple(map(max, piece.to, start))
        high = tuple(map(min, map(add, piece.to, piece.shape), end))
        size = tuple(map(sub, high, low))
        if any(n <= 0 for n in size):
            continue
        first = tuple(map(add, piece.start, map(sub, low, piece.to)))
        place = tuple(map(add, to, map(sub, low, start)))
        yield Piece(piece.source, first, place, size, piece.fill, piece.scale)


def byte_range(piece: Piece, shape: Shape) -> tuple[int, int, int] | None:
    """(source offset, destination offset, bytes) of a piece that is one run of bytes on both sides.

    shape: that of the destination tensor; its offset is counted from the tensor's first byte.
    None if the piece is strided on either side, scaled, or a constant.
    """
    ref = piece.source
    if ref is None or piece.scale != 1:
        return None
    if ref.strides is None and piece.shape[1:] == ref.shape[1:] == shape[1:]:  # whole rows, as most
        row = prod(shape[1:]) * itemsize(ref.dtype)
        first, to, rows = (piece.start[0], piece.to[0], piece.shape[0]) if shape else (0, 0, 1)
        return ref.offset + first * row, to * row, rows * row
    strides = ref.strides or row_major(ref.shape)
    to_strides = row_major(shape)
    if not (is_contiguous(piece.shape, strides) and is_contiguous(piece.shape, to_strides)):
        return None
    size = itemsize(ref.dtype)
    first = sum(a * b for a, b in zip(piece.start, strides, strict=True))
    target = sum(a * b for a, b in zip(piece.to, to_strides, strict=True))
    return ref.offset + first * size, target * size, prod(piece.shape) * size
