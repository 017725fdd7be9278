"""The proof that a plan writes every byte of every output exactly once."""

from collections.abc import Iterable, Sequence
from math import prod
from operator import add, le

from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece


class CoverageError(AssertionError):
    """A plan leaves a gap or writes twice. This is a bug of neox-bridge, never a user's mistake."""


def check_files(files: Sequence[OutputFile]) -> None:
    """Raise CoverageError unless every output byte is written exactly once."""
    paths = [file.path for file in files]
    if len(set(paths)) != len(paths):
        raise CoverageError(f"a file is planned twice: {sorted(paths)}")
    for file in files:
        if file.copy_of is None:
            _check_file(file)
        for tensor in file.tensors:
            _check_tensor(file.path, tensor)


def _check_file(file: OutputFile) -> None:
    spans = [(offset, offset + len(data)) for offset, data in file.literals]
    spans += [(t.offset, t.offset + t.nbytes) for t in file.tensors]
    end = 0
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if start != end:
            raise CoverageError(f"{file.path}: bytes {end} to {start} are planned 0 or 2 times")
        end = stop
    if end != file.size:
        raise CoverageError(f"{file.path}: planned up to byte {end} of {file.size}")


def _check_tensor(path: str, tensor: OutputTensor) -> None:
    where = f"{path}: {tensor.name}"
    if tensor.inline is not None:
        if len(tensor.inline) != tensor.nbytes or tensor.pieces:
            raise CoverageError(f"{where}: the inline bytes have another size than the tensor")
        return
    if tensor.random is not None:
        return
    for piece in tensor.pieces:
        if len(piece.to) != len(tensor.shape):
            raise CoverageError(f"{where}: a piece has other dimensions than the tensor")
        if not _inside(piece):
            raise CoverageError(f"{where}: a piece reaches beyond its source")
    if tensor.reduce != "none":
        groups: Iterable[Sequence[Piece]] = [[piece] for piece in tensor.pieces]
        if not tensor.pieces:
            raise CoverageError(f"{where}: no source")
    else:
        groups = [tensor.pieces]
    for group in groups:
        if not tiles(tensor.shape, group):
            raise CoverageError(f"{where}: the pieces leave a gap or overlap")


def _inside(piece: Piece) -> bool:
    if piece.source is None:
        return True
    size = piece.source.shape
    if not len(piece.start) == len(piece.shape) == len(size):
        return False
    return all(map(le, map(add, piece.start, piece.shape), size))


def tiles(shape: tuple[int, ...], pieces: Sequence[Piece]) -> bool:
    """Whether the pieces cover a tensor of this shape, each element exactly once."""
    if len(pieces) == 1 and pieces[0].shape == shape and not any(pieces[0].to):  # as most are
        return True
    if sum(prod(piece.shape) for piece in pieces) != prod(shape):
        return False
    for piece in pieces:
        if any(t + s > n for t, s, n in zip(piece.to, piece.shape, shape, strict=True)):
            return False
    filled = sorted((p for p in pieces if prod(p.shape)), key=lambda p: p.to)
    return not any(
        _overlap(a, b) for i, a in enumerate(filled) for b in _candidates(a, filled[i + 1 :])
    )


def _candidates(piece: Piece, later: Sequence[Piece]) -> Iterable[Piece]:
    for other in later:
        if other.to and other.to[0] >= piece.to[0] + piece.shape[0]:
            return
        yield other


def _overlap(a: Piece, b: Piece) -> bool:
    dims = range(len(a.shape))
    return all(a.to[d] < b.to[d] + b.shape[d] and b.to[d] < a.to[d] + a.shape[d] for d in dims)
