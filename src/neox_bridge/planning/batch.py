"""The batch of a run on another number of data-parallel ranks: the global one stays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox_bridge.errors import Refused


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences: of a step on all ranks, of a rank's forward pass; forward passes a step."""

    total: int
    micro: int
    accumulation: int


def batch_of(config: Mapping[str, Any], raw: Mapping[str, Any], dp: int) -> Batch:
    """The batch of a run, as its ds_config says, else its yml."""
    micro = int(
        config.get("train_micro_batch_size_per_gpu")
        or raw.get("train_micro_batch_size_per_gpu")
        or 1
    )
    told = config.get("gradient_accumulation_steps") or raw.get("gradient_accumulation_steps")
    accumulation = int(told or raw.get("gas") or 1)
    total = int(config.get("train_batch_size") or micro * accumulation * dp)
    return Batch(total, micro, max(1, total // (micro * dp)))


def spread(batch: Batch, dp: int, micro: int | None, accumulation: int | None = None) -> Batch:
    """The same global batch on ``dp`` ranks, a rank's forward pass at most as large as it was.

    Args:
        batch: the source's.
        dp: data-parallel ranks.
        micro: the size of a forward pass to take instead.
        accumulation: forward passes a step to choose where that needs no larger ones; by default
            as few as possible.

    Raises:
        Refused: with the numbers that would fit, where the global batch can't be spread so.
    """
    if batch.total % dp:
        fits = [n for n in range(1, batch.total + 1) if batch.total % n == 0]
        raise Refused(
            f"--dp {dp} doesn't divide the global batch of {batch.total} sequences, which the "
            f"learning-rate schedule was made for. These do: {', '.join(map(str, fits))}."
        )
    share = batch.total // dp
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if micro is not None and micro not in sizes:
        raise Refused(
            f"--micro-batch {micro} doesn't divide the {share} sequences of a rank's step, with "
            f"{batch.total} in all on {dp} ranks. These do: {', '.join(map(str, sizes))}."
        )
    fitting = [size for size in sizes if size <= batch.micro]
    wanted = [size for size in fitting if size * (accumulation or 0) == share]
    chosen = micro or max(wanted or fitting)
    return Batch(batch.total, chosen, share // chosen)
