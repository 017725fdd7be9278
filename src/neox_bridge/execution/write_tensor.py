"""Writes one tensor: unchanged rows through the kernel, other rows through numpy."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from math import prod
from operator import itemgetter

from zlib_ng.zlib_ng import crc32

from neox_bridge.execution.context import Context, How
from neox_bridge.execution.movers import BUFFER_BYTES, Target, move, send, write
from neox_bridge.execution.transform import blocks, element, replica
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.pieces import OutputTensor, Piece, Whole, byte_range, cut

_TOGETHER_BYTES = 8 << 20
ByteRun = tuple[str, int, int, int]  # file, offset in it, offset in the tensor, bytes
Band = tuple[int, int, list[Piece]]  # first row, last row, the pieces that fill these rows


def write_tensor(tensor: OutputTensor, path: str, context: Context) -> None:
    """Write a tensor into its file, and its CRC-32 if the file stores one and it is known.

    path: a file with its final size, not yet written where the tensor goes, so that zeros may stay
    a hole. Raises BridgeError for a damaged source, OSError if writing fails.
    """
    context.check()
    with context.files.writing(path) as fd:
        fill_tensor(tensor, fd, context)


def fill_tensor(tensor: OutputTensor, target: Target, context: Context) -> None:
    """``write_tensor`` into an open file or into the zeroed bytes of a small file in memory."""
    crc = _write(tensor, target, context, 0 if tensor.crc_at else None)
    if crc is not None:
        for place in tensor.crc_at:
            write(target, crc.to_bytes(4, "little"), place)


def _write(tensor: OutputTensor, fd: Target, context: Context, crc: int | None) -> int | None:
    """Write the bytes of the tensor. crc: as in ``move``."""
    if tensor.inline is not None:
        return _known(tensor.inline, "copied", tensor.offset, fd, context, crc)
    if tensor.reduce != "none" and (only := replica(tensor, context)) is not None:
        tensor = replace(tensor, pieces=(only,), reduce="none")
    if tensor.random is not None or tensor.reduce != "none" or tensor.divisor != 1:
        return _made(tensor, fd, context, crc)
    if (data := _constant(tensor)) is not None:
        return _known(data, "transformed", tensor.offset, fd, context, crc)
    for part in _parts(tensor):
        if isinstance(part, int):
            crc = _hole(part, context, crc)
        elif isinstance(part, OutputTensor):
            crc = _made(part, fd, context, crc)
        else:
            source, start, to, size = part
            crc = move(source, start, fd, tensor.offset + to, size, context, crc)
    return crc


def _known(
    data: bytes, how: How, offset: int, fd: Target, context: Context, crc: int | None
) -> int | None:
    write(fd, data, offset)
    context.wrote(len(data), how)
    return None if crc is None else crc32(data, crc)


def _constant(tensor: OutputTensor) -> bytes | None:
    """The bytes of a small constant tensor; None for others, and for a hole."""
    if len(tensor.pieces) != 1:
        return None
    (piece,) = tensor.pieces
    if piece.source is not None or tensor.nbytes > BUFFER_BYTES:
        return None
    return None if _is_zero(piece) else element(tensor.dtype, piece.fill) * prod(tensor.shape)


def _made(tensor: OutputTensor, fd: Target, context: Context, crc: int | None) -> int | None:
    """Write blocks from numpy, and send several of them to disk together."""
    sent = offset = tensor.offset
    for block in blocks(tensor, context, reuse=True):
        context.check()
        data = block.reshape(-1).view("u1").data
        write(fd, data, offset)
        if crc is not None:
            crc = crc32(data, crc)
        context.wrote(len(data), "transformed")
        offset += len(data)
        if offset - sent >= _TOGETHER_BYTES:
            sent = _send(fd, sent, offset)
    _send(fd, sent, offset)
    return crc


def _send(fd: Target, start: int, end: int) -> int:
    if isinstance(fd, int):
        send(fd, start, end - start)
    return end


def _hole(size: int, context: Context, crc: int | None) -> int | None:
    """Skip zeros, which a new file already contains."""
    zeros = bytes(min(size, BUFFER_BYTES)) if crc is not None else b""
    context.wrote(size, "transformed")
    while crc is not None and size:
        context.check()
        crc = crc32(memoryview(zeros)[:size], crc)
        size -= min(size, BUFFER_BYTES)
    return crc


def _run(tensor: OutputTensor, piece: Piece) -> ByteRun | None:
    """The source bytes of a piece as one run, unless numpy must compute it."""
    if piece.source is None or piece.source.dtype != tensor.dtype:
        return None
    span = byte_range(piece, tensor.shape)
    return span and (piece.source.file, *span)


def _parts(tensor: OutputTensor) -> Iterator[ByteRun | int | OutputTensor]:
    """Runs of source bytes, holes, and tensors for numpy, in file order."""
    runs = [run for piece in tensor.pieces if (run := _run(tensor, piece)) is not None]
    if len(runs) == len(tensor.pieces):
        yield from sorted(runs, key=itemgetter(2))
        return
    if len(tensor.pieces) == 1:
        yield tensor.nbytes if _is_zero(tensor.pieces[0]) else tensor
        return
    kept = runs or any(piece.source is None for piece in tensor.pieces)
    if not tensor.shape or not kept:
        yield tensor
        return
    row = prod(tensor.shape[1:]) * itemsize(tensor.dtype)
    rest = (0,) * (len(tensor.shape) - 1)
    kinds = ((_kind(tensor, band, row), band) for band in _bands(tensor))
    for alike, group in groupby(kinds, key=lambda item: item[0] is None):
        if not alike:
            yield from (kind for kind, _ in group if kind is not None)
            continue
        bands = [band for _, band in group]
        low, high = bands[0][0], bands[-1][1]
        shape = (high - low, *tensor.shape[1:])
        touching = {id(piece): piece for band in bands for piece in band[2]}
        whole = Whole(tensor.dtype, tensor.shape, tuple(touching.values()))
        pieces = cut(whole, (low, *rest), shape, (0, *rest))
        yield replace(tensor, shape=shape, pieces=pieces, offset=tensor.offset + low * row)


def _kind(tensor: OutputTensor, band: Band, row: int) -> ByteRun | int | None:
    low, high, pieces = band
    if len(pieces) > 1:
        return None
    (piece,) = pieces
    if piece.source is None:
        return (high - low) * row if _is_zero(piece) else None
    return _run(tensor, piece)  # a piece that is alone in its rows covers their full width


def _is_zero(piece: Piece) -> bool:
    """Whether a piece is +0.0, whose bytes equal a hole."""
    return piece.source is None and piece.fill == 0 and math.copysign(1, piece.fill) > 0


def _bands(tensor: OutputTensor) -> list[Band]:
    """The rows, split wherever a piece begins or ends."""
    filled = [piece for piece in tensor.pieces if prod(piece.shape)]
    ends = {end for p in filled for end in (p.to[0], p.to[0] + p.shape[0])}
    cuts = sorted(ends)
    bands: list[Band] = [(low, high, []) for low, high in pairwise(cuts)]
    for piece in filled:
        first = bisect_left(cuts, piece.to[0])
        for band in bands[first : bisect_left(cuts, piece.to[0] + piece.shape[0])]:
            band[2].append(piece)
    return bands
