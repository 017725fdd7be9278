"""A plan as plain data: boxes of source tensors, output tensors and output files."""

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
    """A box of a source tensor, and its place in the destination.

    Source and destination have the same number of dimensions.

    Attributes:
        source: The source tensor; None for a constant.
        start: The start of the box in the source, in elements for each dimension.
        to: The start of the box in the destination.
        shape: The shape of the box.
        fill: The value of a constant: 0.0, or -0.0, which keeps sums exact.
        scale: The values of the source are multiplied by it, in float64
            (``optimizer/gradient_scale``).
    """

    source: TensorRef | None
    start: Shape
    to: Shape
    shape: Shape
    fill: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of the model, whatever files its pieces are in.

    Attributes:
        dtype: The dtype of its values. Pieces of another dtype are cast.
        shape: The shape of the whole tensor.
        pieces: The boxes of source tensors that form it.
        reduce: "none": the pieces tile the tensor. "sum" and "replica": each tensor-parallel rank
            holds all of it. The value is then their sum, or any of them, and their mean if they
            differ.
        shards: The tensors of the source by tensor-parallel rank, if it has ranks.
        parts: What each such rank holds, if that is not one tensor of a file.
        random: The seed of a made-up tensor (``neox-bridge toy``).
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

    Attributes:
        name: Its name in the file.
        dtype: The dtype in the file. Sources of another dtype are cast.
        shape: The shape in the file.
        pieces: See ``Whole``.
        reduce: See ``Whole``.
        divisor: The values are divided by it (row biases that are split over ranks).
        inline: Its bytes, for the few tensors that are computed.
        random: See ``Whole``.
        offset: Bytes from the start of the file, once a format has placed it.
        crc_at: The offsets at which the file contains the CRC-32 of its bytes (zip containers).
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
        """The tensor at a place in a file. ``dataclasses.replace`` takes five times as long."""
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

    Attributes:
        path: The path relative to the target.
        size: The size in bytes.
        literals: Offsets and bytes: headers, pickles, small text files.
        tensors: The tensors of the file.
        copy_of: The absolute path of a file that is copied unchanged; None for other files.
        seals: Whether it is the record, a JSON object to which the sizes and hashes of all other
            files are added.
    """

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...] = ()
    tensors: tuple[OutputTensor, ...] = ()
    copy_of: str | None = None
    seals: bool = False


def scaled(whole: Whole, scale: float) -> Whole:
    """The tensor with every value multiplied by ``scale``. It has no ``shards``."""
    pieces = tuple(
        Piece(piece.source, piece.start, piece.to, piece.shape, piece.fill, piece.scale * scale)
        for piece in whole.pieces
    )
    parts = tuple(scaled(part, scale) for part in whole.parts)
    return replace(whole, pieces=pieces, shards=(), parts=parts)


def transposed(whole: Whole) -> Whole:
    """The tensor with its dimensions in reverse order. It has no ``shards``."""
    pieces = tuple(
        Piece(
            _reversed(piece.source),
            piece.start[::-1],
            piece.to[::-1],
            piece.shape[::-1],
            piece.fill,
            piece.scale,
        )
        for piece in whole.pieces
    )
    return replace(whole, shape=whole.shape[::-1], pieces=pieces, shards=(), parts=())


def _reversed(ref: TensorRef | None) -> TensorRef | None:
    """The same bytes, read with the dimensions in reverse order."""
    if ref is None:
        return None
    strides = (ref.strides or row_major(ref.shape))[::-1]
    shape = ref.shape[::-1]
    contiguous = is_contiguous(shape, strides)
    return TensorRef(ref.file, ref.offset, ref.dtype, shape, None if contiguous else strides)


def whole_of(ref: TensorRef) -> Whole:
    """A source tensor as a whole tensor."""
    return Whole(ref.dtype, ref.shape, (box(ref),))


def box(ref: TensorRef) -> Piece:
    """All of a source tensor, at the start of the destination."""
    zero = (0,) * len(ref.shape)
    return Piece(ref, zero, zero, ref.shape)


def cut(whole: Whole, start: Shape, shape: Shape, to: Shape) -> tuple[Piece, ...]:
    """The pieces of a box of ``whole``, moved so that the box starts at ``to``."""
    if shape == whole.shape and not any(to) and all(shape):  # nothing is cut off or moved
        return whole.pieces
    if len(whole.pieces) == 1 and not any(whole.pieces[0].to):
        only = whole.pieces[0]
        if (
            only.shape == whole.shape and not any(only.start) and all(shape)
        ):  # true for most tensors
            return (Piece(only.source, start, to, shape, only.fill, only.scale),)
    return tuple(_clip(whole.pieces, start, shape, to))


def _clip(pieces: Iterable[Piece], start: Shape, shape: Shape, to: Shape) -> Iterable[Piece]:
    end = tuple(map(add, start, shape))
    above, below = (start[0], end[0]) if start else (0, 1)
    for piece in pieces:
        if start and (piece.to[0] >= below or piece.to[0] + piece.shape[0] <= above):
            continue  # rejects most of the many pieces of a flat group by one dimension
        low = tuple(map(max, piece.to, start))
        high = tuple(map(min, map(add, piece.to, piece.shape), end))
        size = tuple(map(sub, high, low))
        if any(n <= 0 for n in size):
            continue
        first = tuple(map(add, piece.start, map(sub, low, piece.to)))
        place = tuple(map(add, to, map(sub, low, start)))
        yield Piece(piece.source, first, place, size, piece.fill, piece.scale)


def byte_range(piece: Piece, shape: Shape) -> tuple[int, int, int] | None:
    """The place of a piece that is one run of bytes in the source and in the destination.

    Args:
        piece: The piece.
        shape: The shape of the destination tensor.

    Returns:
        The offset in the source file, the offset in the destination tensor, and the number of
        bytes; None if the piece is strided on either side, scaled, or a constant.
    """
    ref = piece.source
    if ref is None or piece.scale != 1:
        return None
    if ref.strides is None and piece.shape[1:] == ref.shape[1:] == shape[1:]:  # whole rows
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
