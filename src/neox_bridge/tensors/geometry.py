"""How tensor parallelism divides a tensor over its ranks. Both directions use it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from neox_bridge.tensors.pieces import (
    OutputTensor,
    Piece,
    Reduce,
    Shape,
    Whole,
    box,
    cut,
)
from neox_bridge.tensors.tensor_ref import TensorRef

Split = Literal[
    "column", "row", "vocab", "replicated", "row_bias", "fused", "gated", "zero", "derived"
]


_SPLIT_DIM: dict[str, int] = {"column": 0, "vocab": 0, "row": 1}


@lru_cache(4096)  # all blocks have equal shapes
def share(split: Split, shape: Shape, tp: int, rank: int) -> tuple[Shape, Shape]:
    """The start and the shape of the box of a whole tensor that one of ``tp`` ranks holds."""
    part, start, dim = shard_shape(split, shape, tp), [0] * len(shape), _dim(split, shape)
    if dim is not None:
        start[dim] = rank * part[dim]
    return tuple(start), part


def shard_shape(split: Split, shape: Shape, tp: int) -> Shape:
    """The shape of one rank's part. ``tp`` must divide the split dimension."""
    part, dim = list(shape), _dim(split, shape)
    if dim is not None:
        part[dim] //= tp
    return tuple(part)


def _dim(split: Split, shape: Shape) -> int | None:
    """The dimension that is split; None if the tensor does not have it."""
    dim = _SPLIT_DIM.get(split)
    return dim if dim is not None and dim < len(shape) else None


def whole_shape(split: Split, shape: Shape, tp: int) -> Shape:
    """The shape of the whole tensor, from that of one rank's part."""
    whole, dim = list(shape), _dim(split, shape)
    if dim is not None:
        whole[dim] *= tp
    return tuple(whole)


def gather(split: Split, shards: Sequence[TensorRef], row_bias_sums: bool) -> Whole:
    """One tensor from the shards of all ranks.

    Args:
        split: How the ranks share the tensor.
        shards: The tensor of each rank.
        row_bias_sums: Whether a row bias is the sum of the ranks' biases. With gpt_j_residual each
            rank adds its row bias before the all-reduce. Without it each rank holds the whole bias
            (GPT-NeoX megatron/model/transformer.py, ParallelTransformerLayer.forward).
    """
    tp = len(shards)
    shape = whole_shape(split, shards[0].shape, tp)
    if tp > 1 and split not in _SPLIT_DIM:
        reduce: Reduce = "sum" if split == "row_bias" and row_bias_sums else "replica"
        pieces = tuple(box(ref) for ref in shards)
        return Whole(shards[0].dtype, shape, pieces, reduce, tuple(shards))
    zero = (0,) * len(shape)
    boxes = [share(split, shape, tp, rank) for rank in range(tp)]
    pieces = tuple(
        Piece(ref, zero, start, part) for ref, (start, part) in zip(shards, boxes, strict=True)
    )
    return Whole(shards[0].dtype, shape, pieces, shards=tuple(shards))


def scatter(
    name: str, split: Split, whole: Whole, tp: int, rank: int, *, row_bias: str
) -> OutputTensor:
    """One rank's part of a tensor.

    Args:
        name: The name of the part.
        split: How the ranks share the tensor.
        whole: The tensor.
        tp: The number of tensor-parallel ranks.
        rank: The rank.
        row_bias: How a row bias is written. "whole": all of it on rank 0, and -0.0 on the others,
            so that the sum is exact for every bit pattern. "split": divided by ``tp`` on each rank.
            "replicated": all of it on each rank.
    """
    stored = [ref.shape for ref in whole.shards]
    # Meta splits embeddings by columns
    if stored == [shard_shape(split, whole.shape, tp)] * tp:
        ref = whole.shards[rank]
        return OutputTensor(name, whole.dtype, ref.shape, (box(ref),))
    if len(whole.parts) == tp:
        part = whole.parts[rank]
        return OutputTensor(name, whole.dtype, part.shape, part.pieces)
    start, shape = share(split, whole.shape, tp, rank)
    biased = split == "row_bias" and tp > 1
    if biased and row_bias == "whole" and rank > 0:
        return OutputTensor(name, whole.dtype, shape, (constant(shape, -0.0),), random=whole.random)
    pieces = cut(whole, start, shape, (0,) * len(shape))
    divisor = tp if biased and row_bias == "split" else 1
    return OutputTensor(
        name, whole.dtype, shape, pieces, whole.reduce, divisor, random=whole.random
    )


def constant(shape: Shape, value: float, to: Shape | None = None) -> Piece:
    """A box of a constant. to: its place in the destination, by default the start."""
    zero = (0,) * len(shape)
    return Piece(None, zero, to or zero, shape, value)


def with_rows(whole: Whole, rows: int) -> Whole:
    """The tensor with only its first rows, or with rows of zeros added at its end."""
    have = whole.shape[0]
    if rows == have:
        return whole
    shape = (rows, *whole.shape[1:])
    zero = (0,) * len(shape)
    kept = (min(rows, have), *shape[1:])
    pieces = cut(whole, zero, kept, zero)
    if rows > have:
        added = (rows - have, *shape[1:])
        pieces += (constant(added, 0.0, (have, *zero[1:])),)
    return replace(whole, shape=shape, pieces=pieces, shards=(), parts=())
