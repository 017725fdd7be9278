"""DeepSpeed's flat partitions.

At ZeRO stages 1 and 2, DeepSpeed concatenates the parameters of a group, pads them, and cuts the
result into equal parts. At stage 3, it pads and cuts each parameter.
Sources: DeepSpeed 0.16 runtime/zero/stage_1_and_2.py; runtime/bf16_optimizer.py, which pads a group
to a multiple of twice the data-parallel size (``nccl_start_alignment_factor``);
utils/mixed_precision_linkage.py, which decides which parameters a partition contains; and, for
stage 3, runtime/zero/partition_parameters.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.pieces import Piece, Shape, Whole, cut
from neox_bridge.tensors.tensor_ref import TensorRef, row_major

_ALIGNMENT = 2  # elements, times the data-parallel size


@dataclass(frozen=True, slots=True)
class Fragment:
    """The elements of a parameter that a partition contains.

    Attributes:
        name: The name of the parameter.
        start: The first element in the partition.
        low: The first element in the parameter.
        numel: The number of elements.
    """

    name: str
    start: int
    low: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """One group of parameters of one model-parallel rank.

    Attributes:
        shapes: The shape of each parameter by its name, in the order of the group.
        dp: The number of data-parallel ranks.
    """

    shapes: Mapping[str, Shape]
    dp: int

    @cached_property
    def numel(self) -> int:
        """The number of elements without padding."""
        return sum(prod(shape) for shape in self.shapes.values())

    @cached_property
    def partition(self) -> int:
        """The number of elements of each partition, with padding."""
        step = _ALIGNMENT * self.dp
        return -(-self.numel // step) * step // self.dp

    def used(self, rank: int) -> int:
        """The number of elements of a rank's partition without padding."""
        return max(0, min(self.partition, self.numel - rank * self.partition))

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """The fragments in a rank's partition, in order."""
        first, at = rank * self.partition, 0
        for name, shape in self.shapes.items():
            low, high = max(at, first), min(at + prod(shape), first + self.partition)
            if low < high:
                yield Fragment(name, low - first, low - at, high - low)
            at += prod(shape)

    def wholes(self, parts: Sequence[TensorRef]) -> dict[str, Whole]:
        """The parameters of the group.

        Args:
            parts: The partition of each rank, of one dimension, with or without padding.
        """
        used = [replace(part, shape=(self.used(rank),)) for rank, part in enumerate(parts)]
        return wholes_of(self.shapes, [part for part in used if part.nbytes] or used)


def wholes_of(shapes: Mapping[str, Shape], parts: Sequence[TensorRef]) -> dict[str, Whole]:
    """The parameters of a group whose parts, concatenated, have no padding between them."""
    runs = _runs([prod(shape) for shape in shapes.values()], parts)
    dtype = parts[0].dtype if parts else "float32"
    wholes = {}
    for (name, shape), parameter_runs in zip(shapes.items(), runs, strict=True):
        pieces = [piece for run in parameter_runs for piece in _boxed(shape, *run)]
        wholes[name] = Whole(dtype, shape, tuple(pieces))
    return wholes


def part_size(shape: Shape, dp: int) -> int:
    """Elements that each of ``dp`` ranks has of a parameter at ZeRO stage 3, with padding."""
    return -(-prod(shape) // dp)


def wholes_of_parts(
    shapes: Mapping[str, Shape], ranks: Sequence[Sequence[TensorRef]]
) -> dict[str, Whole]:
    """The parameters at ZeRO stage 3, where each rank has an equal part of every parameter.

    ranks: by data-parallel rank, flat tensors in which the rank's parts lie one behind the other.
    """
    dp = len(ranks)
    sizes = [part_size(shape, dp) for shape in shapes.values()]
    by_rank = [list(_runs(sizes, parts)) for parts in ranks]
    wholes = {}
    for index, (name, shape) in enumerate(shapes.items()):
        pieces: list[Piece] = []
        for rank, runs in enumerate(by_rank):
            for ref, low in runs[index]:
                begin = rank * sizes[index] + low
                count = min(ref.shape[0], prod(shape) - begin)  # the rest is padding
                if count > 0:
                    pieces += _boxed(shape, replace(ref, shape=(count,)), begin)
        wholes[name] = Whole(ranks[0][0].dtype, shape, tuple(pieces))
    return wholes


def _boxed(shape: Shape, run: TensorRef, low: int) -> Iterator[Piece]:
    """The pieces that a run of elements is of a parameter. low: its first element there."""
    offset = run.offset
    for start, box in boxes_of(shape, low, low + run.shape[0]):
        ref = TensorRef(run.file, offset, run.dtype, box)
        yield Piece(ref, (0,) * len(box), start, box)
        offset += prod(box) * itemsize(run.dtype)


def _runs(
    sizes: Sequence[int], parts: Sequence[TensorRef]
) -> Iterator[list[tuple[TensorRef, int]]]:
    """The runs of elements of each parameter in the parts, with their starts in the parameter."""
    number, at = 0, 0  # the current part, and its next element
    for size in sizes:
        parameter_runs, low = [], 0
        while low < size:
            part = parts[number]
            count = min(size - low, part.shape[0] - at)
            offset = part.offset + at * itemsize(part.dtype)
            parameter_runs.append((TensorRef(part.file, offset, part.dtype, (count,)), low))
            low, at = low + count, at + count
            if at == part.shape[0]:
                number, at = number + 1, 0
        yield parameter_runs


def boxes_of(shape: Shape, low: int, high: int) -> list[tuple[Shape, Shape]]:
    """The boxes that form a range of elements of a row-major tensor.

    Returns:
        The start and the shape of each box, in the order of their elements.
    """
    if low >= high:
        return []
    if not shape:
        return [((), ())]
    inner = row_major(shape)[0]
    first, last = -(-low // inner), high // inner  # whole rows
    boxes = []
    if first > last:  # the range is within one row
        row, at = divmod(low, inner)
        rest = boxes_of(shape[1:], at, high - row * inner)
        return [((row, *start), (1, *box)) for start, box in rest]
    if low < first * inner:
        rest = boxes_of(shape[1:], low - (first - 1) * inner, inner)
        boxes += [((first - 1, *start), (1, *box)) for start, box in rest]
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if last * inner < high:
        rest = boxes_of(shape[1:], 0, high - last * inner)
        boxes += [((last, *start), (1, *box)) for start, box in rest]
    return boxes


def in_place_of(whole: Whole, shards: Mapping[TensorRef, Whole], *, sums: bool = True) -> Whole:
    """The tensor with other data: each of its stored tensors is replaced.

    Args:
        whole: A weight.
        shards: The new data for each stored tensor.
        sums: Whether the ranks' parts of a bias are added up, as in the weight. False for the
            moments of such a bias: every rank sees the whole gradient, so they are equal.
    """
    pieces: list[Piece] = []
    for piece in whole.pieces:
        if piece.source is None:
            pieces.append(piece)
        else:
            pieces += cut(shards[piece.source], piece.start, piece.shape, piece.to)
    parts = tuple(shards[ref] for ref in whole.shards)
    dtype = next((shards[p.source].dtype for p in whole.pieces if p.source), whole.dtype)
    reduce = "replica" if whole.reduce == "sum" and not sums else whole.reduce
    return Whole(dtype, whole.shape, tuple(pieces), reduce, parts=parts)


def placed_segments(whole: Whole) -> list[tuple[Shape, Whole]]:
    """Cut a tensor so that a reduction of each part has one piece of every rank.

    The data-parallel partitions of tensor-parallel ranks cut a tensor that all of them hold at the
    same elements.

    Returns:
        The start of each part and the part, in row-major order. One part if there is no reduction.
    """
    if whole.reduce == "none":
        return [((0,) * len(whole.shape), whole)]
    groups: dict[tuple[Shape, Shape], list[Piece]] = {}
    for piece in whole.pieces:
        groups.setdefault((piece.to, piece.shape), []).append(piece)
    return [
        (
            to,
            Whole(
                whole.dtype,
                shape,
                tuple(replace(piece, to=(0,) * len(to)) for piece in group),
                whole.reduce,
            ),
        )
        for (to, shape), group in sorted(groups.items(), key=lambda item: item[0])
    ]


def segments(whole: Whole) -> list[Whole]:
    """The parts of ``placed_segments`` without their starts."""
    return [segment for _, segment in placed_segments(whole)]
