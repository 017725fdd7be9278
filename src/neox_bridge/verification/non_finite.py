"""NaN and infinities in logits: on one side alone they are another model, on both no comparison."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from neox_bridge.execution.context import Context
from neox_bridge.execution.transform import boxes
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.tensors.pieces import Whole
from neox_bridge.verification.compare import MEASURED, values


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Logits that are NaN or infinite.

    Attributes:
        tokens: How many tokens have such logits on either side.
        first: How many logits are not finite in the first model.
        second: The same in the second model, or in the recorded logits.
        same_places: Whether these are the same logits on both sides.
        tensor: The first weight that explains it, in the order of the model: one that is not
            finite on one side alone, else one that is not on both. "" where every weight is finite.
        tensor_first: How many values of that weight are not finite in the first model.
        tensor_second: The same in the second model.
    """

    tokens: int
    first: int
    second: int
    same_places: bool
    tensor: str = ""
    tensor_first: int = 0
    tensor_second: int = 0


def count_non_finite(whole: Whole, context: Context) -> int:
    """How many values of a tensor are NaN or infinite, read block by block."""
    count = 0
    for start, shape in boxes(whole.shape, MEASURED):
        block = values(whole, whole.dtype, start, shape, context)
        count += int(block.size - np.count_nonzero(np.isfinite(block)))
    return count


def describe_non_finite(
    first: Tensor, second: Tensor, checkpoints: tuple[Checkpoint, ...]
) -> NonFinite | None:
    """What is not finite in logits [tokens, vocabulary], and where it comes from; None if all are.

    checkpoints: the models whose weights are searched: both, or the first alone.
    """
    bad = ~first.isfinite(), ~second.isfinite()
    either = bad[0] | bad[1]
    if not bool(either.any()):
        return None
    same = bool((bad[0] == bad[1]).all())
    tensor, counts = _first_weight(checkpoints, same)
    tokens = int(either.any(-1).sum())
    return NonFinite(tokens, int(bad[0].sum()), int(bad[1].sum()), same, tensor, *counts)


def _first_weight(checkpoints: tuple[Checkpoint, ...], same: bool) -> tuple[str, tuple[int, int]]:
    """The first weight that is not finite, and how many of its values are not on each side."""
    context = Context()
    fallback: tuple[str, tuple[int, int]] = ("", (0, 0))
    try:
        for name in checkpoints[0].by_name:
            counts = [
                count_non_finite(one.tensors[name], context) if name in one.tensors else 0
                for one in checkpoints
            ]
            pair = (counts[0], counts[-1] if len(counts) > 1 else 0)
            if len(counts) == 1 or same:
                if any(counts):
                    return name, pair
            elif pair[0] != pair[1]:
                return name, pair
            elif any(counts) and not fallback[0]:
                fallback = (name, pair)
    finally:
        context.files.close()
    return fallback
