"""Cuts tensors of an output file into parts that the executor can write.

Most of them are flat partitions. A flat partition is one tensor of its file and contains many
parameters, each split or joined in its own way. The plan therefore has one tensor for each part, at
its offset in the file. Parts that are adjacent in the source too are joined.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import prod

from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.flat import Flat, boxes_of, part_size, placed_segments, segments
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import (
    OutputFile,
    OutputTensor,
    Piece,
    Shape,
    Whole,
    byte_range,
    cut,
)
from neox_bridge.tensors.tensor_ref import TensorRef, row_major

Parts = Sequence[OutputTensor]  # their offsets are relative to the tensor that they replace


def partition(
    name: str, tensors: Mapping[str, OutputTensor], flat: Flat, rank: int, *, padded: bool
) -> list[OutputTensor]:
    """A rank's partition of a group, as parts. padded: whether it ends with zeros as padding."""
    dtype = next(iter(tensors.values())).dtype
    parts: list[OutputTensor] = []
    for fragment in flat.fragments(rank):
        at = fragment.start * itemsize(dtype)
        tensor, end = tensors[fragment.name], fragment.low + fragment.numel
        parts += [part.at(at + part.offset) for part in cut_out(tensor, fragment.low, end)]
    used, zeros = flat.used(rank), flat.partition - flat.used(rank)
    if padded and zeros:
        fill = OutputTensor("padding", dtype, (zeros,), (constant((zeros,), 0.0),))
        parts.append(replace(fill, offset=used * itemsize(dtype)))
    return [replace(part, name=f"{name}#{n}") for n, part in enumerate(joined(parts))]


def rank_parts(
    name: str, tensors: Mapping[str, OutputTensor], dp: int, rank: int
) -> list[OutputTensor]:
    """A rank's part of every parameter at ZeRO stage 3, each padded with zeros."""
    dtype = next(iter(tensors.values())).dtype
    parts: list[OutputTensor] = []
    at, size = 0, itemsize(dtype)
    for tensor in tensors.values():
        count, numel = part_size(tensor.shape, dp), prod(tensor.shape)
        low, high = min(rank * count, numel), min(rank * count + count, numel)
        parts += [part.at(at * size + part.offset) for part in cut_out(tensor, low, high)]
        if zeros := count - (high - low):
            fill = OutputTensor("padding", dtype, (zeros,), (constant((zeros,), 0.0),))
            parts.append(replace(fill, offset=(at + high - low) * size))
        at += count
    return [replace(part, name=f"{name}#{n}") for n, part in enumerate(joined(parts))]


def cut_out(tensor: OutputTensor, low: int, high: int) -> Iterator[OutputTensor]:
    """The elements from ``low`` to ``high`` of a tensor in row-major order, as ordered parts."""
    inner, size = row_major(tensor.shape), itemsize(tensor.dtype)
    for start, shape in boxes_of(tensor.shape, low, high):
        at = sum(a * b for a, b in zip(start, inner, strict=True)) - low
        whole = Whole(tensor.dtype, tensor.shape, tensor.pieces, tensor.reduce)
        pieces = cut(whole, start, shape, (0,) * len(shape))
        box = replace(tensor, shape=shape, pieces=pieces, offset=at * size)
        yield from _readable(box)


def _readable(box: OutputTensor) -> Iterator[OutputTensor]:
    """Cut a box into boxes whose reductions have one piece of every rank, or into runs of bytes."""
    strides, size = row_major(box.shape), itemsize(box.dtype)
    if box.reduce != "none":
        whole = Whole(box.dtype, box.shape, box.pieces, box.reduce)
        for to, part in placed_segments(whole):
            at = sum(a * b for a, b in zip(to, strides, strict=True)) * size
            yield replace(box, shape=part.shape, pieces=part.pieces, offset=box.offset + at)
        return
    runs = [_run(piece, box) for piece in box.pieces]
    if any(run is None for run in runs):
        yield box
        return
    yield from sorted(filter(None, runs), key=lambda run: run.offset)


def _run(piece: Piece, box: OutputTensor) -> OutputTensor | None:
    """A piece as a part of one dimension; None if it is not one run of bytes in its source."""
    source, place = piece.source, byte_range(piece, box.shape)
    if source is None or place is None or source.dtype != box.dtype or box.divisor != 1:
        return None
    start, to, size = place
    numel = size // itemsize(box.dtype)
    ref = TensorRef(source.file, start, box.dtype, (numel,))
    pieces = (Piece(ref, (0,), (0,), (numel,)),)
    return OutputTensor(box.name, box.dtype, (numel,), pieces, offset=box.offset + to)


def joined(parts: Iterable[OutputTensor]) -> Iterator[OutputTensor]:
    """The ordered parts, with those joined that are adjacent in one source."""
    last: OutputTensor | None = None
    for part in parts:
        if last is not None and (both := _both(last, part)) is not None:
            last = both
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last


def _both(first: OutputTensor, second: OutputTensor) -> OutputTensor | None:
    if not (_is_run(first) and _is_run(second)) or first.dtype != second.dtype:
        return None
    a, b = first.pieces[0].source, second.pieces[0].source
    assert a is not None
    assert b is not None
    if a.file != b.file or a.offset + a.nbytes != b.offset:
        return None
    if first.offset + first.nbytes != second.offset:
        return None
    numel = (first.shape[0] + second.shape[0],)
    pieces = (Piece(replace(a, shape=numel), (0,), (0,), numel),)
    return replace(first, shape=numel, pieces=pieces)


def _is_run(tensor: OutputTensor) -> bool:
    return (
        tensor.reduce == "none"
        and tensor.divisor == 1
        and len(tensor.shape) == len(tensor.pieces) == 1
        and tensor.pieces[0].source is not None
        and tensor.pieces[0].scale == 1
        and tensor.pieces[0].shape == tensor.shape == tensor.pieces[0].source.shape
    )


def stand_in(name: str, dtype: str, shape: Shape, parts: Parts) -> OutputTensor:
    """A tensor for a format to place instead of the parts. It has their size and first source."""
    first = next(iter(parts), None)
    piece = constant(shape, 0.0)
    if first is not None and _is_run(first) and len(shape) == 1:
        piece = first.pieces[0]
    return OutputTensor(name, dtype, shape, (piece,))


def put(file: OutputFile, parts: Mapping[str, Parts]) -> OutputFile:
    """The file with tensors replaced by their parts. parts: by the names of the tensors."""
    return replace(
        file,
        tensors=tuple(
            chain.from_iterable(
                (
                    [part.at(tensor.offset + part.offset) for part in parts[tensor.name]]
                    if tensor.name in parts
                    else [tensor]
                )
                for tensor in file.tensors
            )
        ),
    )


def cut_reductions(file: OutputFile) -> OutputFile:
    """The file with each reduction of several pieces per rank replaced by parts."""
    parts: dict[str, Parts] = {}
    for tensor in file.tensors:
        whole = Whole(tensor.dtype, tensor.shape, tensor.pieces, tensor.reduce)
        if tensor.reduce == "none" or len(segments(whole)) == 1:
            continue
        place = replace(tensor, offset=0, crc_at=())
        parts[tensor.name] = [
            replace(part, name=f"{tensor.name}#{n}")
            for n, part in enumerate(cut_out(place, 0, prod(tensor.shape)))
        ]
    return put(file, parts) if parts else file
