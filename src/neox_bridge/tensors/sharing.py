"""Chooses offsets of tensors at which the file system can share blocks with the source file.

A reflink (FICLONERANGE, man 2 ioctl_ficlonerange) shares whole blocks. The bytes must have the same
offset within a block in both files.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

from neox_bridge.tensors.pieces import OutputTensor, byte_range

BLOCK_BYTES = 4096  # the default of XFS, btrfs and bcachefs
LEAST_SHARED_BYTES = 64 << 10  # a reflink of fewer bytes costs more than a copy
_ALIGNMENT_BYTES = 8  # torch and safetensors map tensors, so every dtype must be aligned

Groups = dict[int, deque[OutputTensor]]


def residue(tensor: OutputTensor) -> int | None:
    """The offset modulo 4096 at which most of the tensor's bytes can be shared; None if none can.

    At such an offset, the elements of every dtype are aligned. Of two equal ones, that of the first
    piece is chosen.
    """
    if tensor.nbytes < LEAST_SHARED_BYTES or tensor.reduce == "sum" or tensor.divisor != 1:
        return None
    votes: Counter[int] = Counter()
    # the replicas are equal, so the first one is read
    for piece in tensor.pieces[:1] if tensor.reduce == "replica" else tensor.pieces:
        if piece.source is None or piece.source.dtype != tensor.dtype:
            continue
        run = byte_range(piece, tensor.shape)
        if (
            run is not None
            and run[2] >= LEAST_SHARED_BYTES
            and (run[0] - run[1]) % _ALIGNMENT_BYTES == 0
        ):
            votes[(run[0] - run[1]) % BLOCK_BYTES] += run[2]
    return max(votes, key=votes.__getitem__) if votes else None


def whole_blocks(start: int, to: int, size: int) -> tuple[int, int]:
    """The part of a run of bytes that is whole blocks in both files.

    Args:
        start: The offset of the run in the source file.
        to: The offset of the run in the target file.
        size: The bytes of the run.

    Returns:
        The begin and the end of the part, relative to the run; (0, 0) if there is none.
    """
    low = -start % BLOCK_BYTES
    high = low + (size - low) // BLOCK_BYTES * BLOCK_BYTES
    return (0, 0) if (start - to) % BLOCK_BYTES or low >= high else (low, high)


def by_residue(tensors: Iterable[OutputTensor]) -> dict[int | None, list[OutputTensor]]:
    """The tensors, in order, grouped by their ``residue``."""
    groups: dict[int | None, list[OutputTensor]] = {}
    for tensor in tensors:
        groups.setdefault(residue(tensor), []).append(tensor)
    return groups


def shared_together(tensors: Sequence[OutputTensor]) -> list[list[OutputTensor]]:
    """The tensors in groups with equal ``residue``, each of which a file can share completely.

    The largest group also contains the tensors that cannot be shared, and the groups that have less
    than a hundredth of all bytes.
    """
    groups = by_residue(tensors)
    rest = groups.pop(None, [])
    sizes = {at: sum(tensor.nbytes for tensor in group) for at, group in groups.items()}
    most = max(sizes, key=sizes.__getitem__, default=None)
    limit = sum(sizes.values()) // 100
    for at in [at for at, size in sizes.items() if size < limit]:
        rest += groups.pop(at)
    groups.setdefault(most, []).extend(rest)
    return list(groups.values())


def arranged(tensors: Sequence[OutputTensor]) -> tuple[int | None, list[OutputTensor]]:
    """Order tensors, without gaps between them, so that most bytes can be shared.

    A tensor that does not fill whole blocks moves all tensors behind it. It becomes the last one of
    its residue, and small tensors are placed where they move others to a shared offset. If the
    given order shares as much, it is kept.

    Returns:
        The offset modulo 4096 of the first tensor, None for any, and the ordered tensors.
    """
    groups = by_residue(tensors)
    places = {id(tensor): at for at, group in groups.items() for tensor in group}
    small: Groups = {}
    for tensor in groups.pop(None, ()):
        small.setdefault(tensor.nbytes % BLOCK_BYTES, deque()).append(tensor)
    if not groups:
        return None, list(tensors)
    left = {at: sum(t.nbytes for t in group) for at, group in groups.items() if at is not None}
    waiting: Groups = {
        at: deque(sorted(group, key=lambda tensor: tensor.nbytes % BLOCK_BYTES != 0))
        for at, group in groups.items()
        if at is not None
    }
    start = at = max(left, key=left.__getitem__)
    order: list[OutputTensor] = []
    while waiting or small:
        home, key = (waiting, at) if at in waiting else _next(at, left, waiting, small)
        tensor = home[key].popleft()
        if not home[key]:
            del home[key]
        if home is waiting:
            left[key] -= tensor.nbytes
        order.append(tensor)
        at = (at + tensor.nbytes) % BLOCK_BYTES
    as_they_are = _as_they_are(tensors, places)
    if as_they_are is not None and _shared(tensors, places, as_they_are) >= _shared(
        order, places, start
    ):
        return as_they_are, list(tensors)
    return start, order


def _as_they_are(tensors: Sequence[OutputTensor], places: Mapping[int, int | None]) -> int | None:
    """The offset of the first tensor at which the first shareable one is shared, in this order."""
    before = 0
    for tensor in tensors:
        place = places[id(tensor)]
        if place is not None:
            start = (place - before) % BLOCK_BYTES
            return start if start % _ALIGNMENT_BYTES == 0 else None
        before += tensor.nbytes
    return None


def _shared(order: Sequence[OutputTensor], places: Mapping[int, int | None], at: int) -> int:
    """The number of shared bytes if the first tensor is at this offset."""
    shared = 0
    for tensor in order:
        shared += tensor.nbytes if places[id(tensor)] == at % BLOCK_BYTES else 0
        at += tensor.nbytes
    return shared


def _next(at: int, left: dict[int, int], waiting: Groups, small: Groups) -> tuple[Groups, int]:
    """The group of the next tensor, at an offset where none can be shared.

    Of the small tensors, one is chosen that moves the most bytes to a shared offset.
    """
    leading = max(small, key=lambda size: left.get((at + size) % BLOCK_BYTES, 0), default=None)
    if leading is not None and (left.get((at + leading) % BLOCK_BYTES) or not waiting):
        return small, leading
    moving = [size for size in small if size]
    if moving:
        return small, moving[0]
    return waiting, min(waiting, key=left.__getitem__)
