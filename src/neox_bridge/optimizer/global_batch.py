"""Splits the global batch of a run over another number of data-parallel ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from neox_bridge.errors import BridgeError, Refused

_SHOWN = 40  # valid values that a message lists


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch size per step on all ranks, the micro-batch size, and micro-batches per step."""

    total: int
    micro: int
    accumulation: int


def batch_of(config: Mapping[str, Any], raw: Mapping[str, Any], dp: int, path: str) -> Batch:
    """The batch of a run, from its ds_config or its yml. path: the file with ds_config.

    gradient_accumulation_steps is 1 by default, and the yml's ``gas`` has no effect; see
    ``setting_defaults.COMPUTED_KEYS``.

    Raises BridgeError for numbers that contradict each other.
    """
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, accumulation, total = (int(config.get(key) or raw.get(key) or 0) for key in keys)
    accumulation = accumulation or 1
    micro = micro or max(1, total // dp // accumulation)
    total = total or micro * accumulation * dp
    if total % (micro * dp):
        raise BridgeError(
            f"{path}: ds_config.train_batch_size is {total}, which is not a multiple of "
            f"train_micro_batch_size_per_gpu {micro} on {dp} data-parallel ranks. DeepSpeed would "
            "not start with these values, so the files are from different saves. Copy them again."
        )
    return Batch(total, micro, total // (micro * dp))


def spread(batch: Batch, dp: int, micro: int | None, accumulation: int | None = None) -> Batch:
    """Split the same global batch over ``dp`` ranks, without larger micro-batches.

    Args:
        micro: A micro-batch size to use instead.
        accumulation: Preferred number of micro-batches per step, if the micro-batches need not
            grow; by default as few as possible.

    Raises:
        Refused: The global batch cannot be split like this. The message lists valid values.
    """
    if batch.total % dp:
        fits = _listed(_divisors(batch.total))
        raise Refused(
            f"`dp={dp}`: the global batch of {batch.total} sequences cannot be split evenly over "
            f"{dp} data-parallel ranks. It must stay the same, because the learning-rate schedule "
            f"depends on it. Valid values: {fits}."
        )
    share = batch.total // dp
    sizes = _divisors(share)
    if micro is not None and micro not in sizes:
        raise Refused(
            f"`micro_batch={micro}`: the {share} sequences of a rank's step ({batch.total} on {dp} "
            f"ranks) cannot be split into micro-batches of {micro}. Valid values: {_listed(sizes)}."
        )
    fitting = [size for size in sizes if size <= batch.micro]
    wanted = [size for size in fitting if size * (accumulation or 0) == share]
    chosen = micro or max(wanted or fitting)
    return Batch(batch.total, chosen, share // chosen)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{shown} and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else shown
