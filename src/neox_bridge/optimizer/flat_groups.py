"""Assembles a flat group of parameters from the parts of data-parallel ranks.

DeepSpeed 0.3.16 runtime/zero/stage1.py splits a group into communication intervals, and each
interval over the ranks: part i of the group belongs to rank i % ranks and interval i // ranks.
Later versions have one interval. The end of the group is padded with zeros.
"""

from collections.abc import Mapping, Sequence
from math import prod

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.rank_states import INTERVALS, RankStates
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.flat import Flat
from neox_bridge.tensors.pieces import Shape
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural

_OTHER_SAVE = "The files are from another model, layout or save. Copy the checkpoint again."
Parts = Mapping[str, tuple[TensorRef, ...]]
_ALIGNMENT = 2  # elements, multiplied by the number of ranks, since DeepSpeed 0.5.2 (#1328)


def flat_group(
    ranks: Sequence[RankStates], index: int, shapes: Mapping[str, Shape]
) -> tuple[Parts, Parts]:
    """Separate the parts of a group from their padding, by state, in the order of the group.

    Args:
        ranks: The files of one model-parallel rank, by data-parallel rank.
        index: The number of the group.
        shapes: The shapes of its parameters, in order.

    Raises:
        BridgeError: The parts do not match.
    """
    first = ranks[0]
    intervals = len(first.parts[index])
    for states in ranks:
        if len(states.parts[index]) != intervals:
            raise BridgeError(
                f"{states.path}: group {index} has "
                f"{plural(len(states.parts[index]), 'communication interval')} ({INTERVALS}), and "
                f"in {first.path} {intervals}. {_OTHER_SAVE}"
            )
    ordered = [
        (states.path, states.parts[index][interval])
        for interval in range(intervals)
        for states in ranks
    ]
    dtypes = {key: tensor.dtype for key, tensor in ordered[0][1].items()}
    keys = list(dtypes)
    for path, tensors in ordered:
        differing = {(key, tensor.dtype) for key, tensor in tensors.items()} ^ dtypes.items()
        if differing:
            raise BridgeError(
                f"{path}: group {index} has {min(differing)[0]} in another dtype than "
                f"{first.path}, or only one of the two files contains it. {_OTHER_SAVE}"
            )
    sizes = [tensors[MASTER].shape[0] for _, tensors in ordered]
    total = sum(map(prod, shapes.values()))
    where = f"{first.path}: {first.generation.masters}[{index}]"
    if first.is_current:
        _check_padded(ordered, keys, Flat(shapes, len(ranks)))
    elif first.kind == "rigid":
        _check_rigid(sizes, total, len(ranks), where)
    elif first.generation.form == "sub-partitions":
        _check_sub_partitions(sizes, total, where)
    else:
        _check_partitions(sizes, total, where)
    parts, padding = {}, {}
    for key in keys:
        refs = [tensors[key] for _, tensors in ordered]
        parts[key], padding[key] = _cut(refs, total)
    return parts, padding


def _check_padded(
    parts: Sequence[tuple[str, Mapping[str, TensorRef]]], keys: Sequence[str], flat: Flat
) -> None:
    """Check one part per rank. Each state may contain padding or not.

    parts: by rank, each with its file.
    """
    for rank, (path, tensors) in enumerate(parts):
        for key in keys:
            size = tensors[key].shape[0]
            if not flat.used(rank) <= size <= flat.partition:
                raise BridgeError(
                    f"{path}: the partition of {key} has {size:,} elements, but by the model's "
                    f"shapes it should have {flat.partition:,}. {_OTHER_SAVE}"
                )


def _check_rigid(sizes: Sequence[int], total: int, dp: int, where: str) -> None:
    """Check parts of equal size, with less than one interval of extra padding."""
    size = sizes[0]
    padding = size * len(sizes) - total
    if any(other != size for other in sizes):
        raise BridgeError(
            f"{where}: its parts have different sizes, but rigid states have only one size. "
            f"{_OTHER_SAVE}"
        )
    if not 0 <= padding < (size + 1) * dp:
        raise _other_total(where, size * len(sizes), total)


def _check_sub_partitions(sizes: Sequence[int], total: int, where: str) -> None:
    """Check parts of equal size up to the end of the group, without padding.

    With several intervals, DeepSpeed before 0.3.3 removed padding from the wrong parts (7752dc5e,
    #531). Such files have lost elements and are refused.
    """
    if sum(sizes) != total:
        raise _other_total(where, sum(sizes), total)
    left = total
    for number, size in enumerate(sizes):
        if size != min(sizes[0], left):
            raise BridgeError(
                f"{where}: part {number} of the group has {size:,} elements, but by the first "
                f"part it should have {min(sizes[0], left):,}. {_OTHER_SAVE}"
            )
        left -= size


def _check_partitions(sizes: Sequence[int], total: int, where: str) -> None:
    """Check one part per rank, of equal size, with or without padding.

    DeepSpeed before 0.16 subtracts padding only from the last part, even if several parts contain
    padding. Before 0.12 it subtracts the padding to a multiple of the ranks, although it pads to a
    multiple of twice the ranks.
    """
    dp = len(sizes)
    for step in (1, _ALIGNMENT):
        size = -(-total // (step * dp)) * step
        used = [max(0, min(size, total - rank * size)) for rank in range(dp)]
        if all(least <= stored <= size for least, stored in zip(used, sizes, strict=True)):
            return
    raise _other_total(where, sum(sizes), total)


def _other_total(where: str, stored: int, total: int) -> BridgeError:
    return BridgeError(
        f"{where}: its parts on all ranks have {stored:,} elements, but the parameters of this "
        f"group have {total:,}. {_OTHER_SAVE}"
    )


def _cut(
    refs: Sequence[TensorRef], total: int
) -> tuple[tuple[TensorRef, ...], tuple[TensorRef, ...]]:
    """The parts up to the end of the group, and the padding after it."""
    used, padding, left = [], [], total
    for ref in refs:
        size = ref.shape[0]
        count = min(size, left)
        left -= count
        if count:
            used.append(TensorRef(ref.file, ref.offset, ref.dtype, (count,)))
        if count < size:
            offset = ref.offset + count * itemsize(ref.dtype)
            padding.append(TensorRef(ref.file, offset, ref.dtype, (size - count,)))
    return tuple(used), tuple(padding)
