"""Computes statistics of tensors, and finds signs of broken models in them."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from neox_bridge.execution.context import Context
from neox_bridge.execution.transform import boxes
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.head import as_stored
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.optimizer.states import STATE_OF, tensor_of
from neox_bridge.tensors.pieces import Shape, Whole
from neox_bridge.verification.compare import each, matching, values
from neox_bridge.wording import some

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_ELEMENTS = 1 << 18  # elements at a time: 2 MiB of float64, and a few temporaries of that size


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of one logical tensor, computed in float64.

    Attributes:
        minimum: Of the finite values, like the next four; NaN if there is none.
        std: The standard deviation of the population.
        norm: The square root of the sum of squares.
        zeros: The share of elements that are zero, of either sign.
        nans: How many elements are NaN.
        infs: How many elements are infinite.
        dead_rows: Rows of zeros in a matrix that are not padding.
        padding_rows: Rows of zeros of the embedding or the output beyond the vocabulary, or at its
            end.
        constant: Whether there is more than one element, and all are the same finite number.
        decoded: Whether the values could be read. If not, there are no statistics.
    """

    name: str
    dtype: str
    shape: Shape
    elements: int
    minimum: float
    maximum: float
    mean: float
    std: float
    norm: float
    zeros: float
    nans: int
    infs: int
    dead_rows: int
    padding_rows: int
    constant: bool
    decoded: bool = True


def statistics(
    checkpoint: Checkpoint | StoredModel,
    *,
    pattern: str = "*",
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Statistics]:
    """The statistics of every logical tensor of a checkpoint, in the order of the model or files.

    Shards are assembled and row biases summed, as in a conversion to Hugging Face. Every tensor is
    read once, in blocks.

    Args:
        pattern: A glob of Hugging Face names.
        progress: Called with the bytes of each tensor.

    Raises:
        BridgeError: If a file cannot be read.
    """
    undecoded: Collection[str] = ()
    vocab_rows = None
    if isinstance(checkpoint, StoredModel):
        undecoded = {n for n, tensor in checkpoint.stored.items() if not tensor.decoded}
    else:
        checkpoint = as_stored(checkpoint)
        vocab_rows = checkpoint.vocab_rows
    table = checkpoint.by_name
    order = {name: place for place, name in enumerate(table)}
    names = matching(pattern, checkpoint.tensors)
    if order:
        names.sort(key=lambda name: (order.get(name, len(order)), name))
    context = Context(progress)

    def one(name: str) -> Statistics:
        whole = checkpoint.tensors[name]
        row = table.get(tensor_of(name))
        vocabulary = row is not None and row.weight.split == "vocab"
        if name in undecoded:
            numbers = _undecoded(name, checkpoint)
        else:
            numbers = _measure(name, whole, vocab_rows if vocabulary else None, context)
        context.wrote(whole.nbytes, "copied")
        return numbers

    return each(names, one, context, workers)


def _undecoded(name: str, model: Checkpoint | StoredModel) -> Statistics:
    """What is known of a tensor whose dtype cannot be decoded."""
    assert isinstance(model, StoredModel)
    tensor, none = model.stored[name], math.nan
    numbers = (none, none, none, none, none, none)
    return Statistics(
        name, tensor.dtype, tensor.shape, tensor.elements, *numbers, 0, 0, 0, 0, False, False
    )


def findings(stats: Sequence[Statistics], checkpoint: Checkpoint | StoredModel) -> list[Finding]:
    """Signs of broken models: NaN and infinities are errors, dead weights are warnings.

    Norm scales of one, biases of zero and padding are normal.
    """
    return [*_broken(stats), *_dead(stats, checkpoint)]


def _broken(stats: Sequence[Statistics]) -> Iterator[Finding]:
    remedy = "the run diverged, or a cast overflowed; use an earlier step, or convert again"
    broken = (
        ("nan-values", "NaN", [(s, s.nans) for s in stats if s.nans]),
        ("inf-values", "infinities", [(s, s.infs) for s in stats if s.infs]),
    )
    for code, what, counted in broken:
        if counted:
            names = some([f"{s.name} ({count:,} of {s.elements:,})" for s, count in counted])
            message = f"{what} in {len(counted):,} of {len(stats):,} tensors: {names}"
            yield Finding(code, "error", message, remedy)


def _dead(stats: Sequence[Statistics], checkpoint: Checkpoint | StoredModel) -> Iterator[Finding]:
    table = checkpoint.by_name
    stats = [s for s in stats if STATE_OF not in s.name]  # a moment of zero is an ordinary start
    equal = [s for s in stats if s.constant]
    matrices = [s for s in equal if len(s.shape) > 1]
    # a scale of zero makes the output of the norm constant; a bias of zero is an ordinary start
    scales = [s for s in equal if "norm" in s.name and s.name.endswith(".weight")]
    zero = [s.name for s in (*matrices, *scales) if s.maximum == 0]
    if zero:
        remedy = "never trained, or lost in a conversion; compare it with its source"
        yield Finding("all-zero", "warning", f"all zeros: {some(zero)}", remedy)
    same = [f"{s.name} ({s.maximum:g})" for s in matrices if s.maximum != 0]
    if same:
        remedy = "never trained, or newly initialized; compare it with its source"
        yield Finding("all-equal", "warning", f"all elements equal: {some(same)}", remedy)
    dead = [s for s in stats if s.dead_rows and s.name not in zero]
    if dead:
        names = [f"{s.name} ({s.dead_rows:,} of {s.shape[0]:,})" for s in dead]
        inner = any(table[s.name].weight.split != "vocab" for s in dead if s.name in table)
        remedy = "these units compute nothing" if inner else "these tokens were never trained"
        yield Finding("dead-rows", "warning", f"rows of zeros: {some(names)}", remedy)


def _measure(name: str, whole: Whole, vocab_rows: int | None, context: Context) -> Statistics:
    import numpy as np

    elements, matrix = prod(whole.shape), len(whole.shape) == 2
    live = np.zeros(whole.shape[0] if matrix else 0, bool)
    low, high, squares, zeros, nans, infs = math.inf, -math.inf, 0.0, 0, 0, 0
    count, mean, spread = 0, 0.0, 0.0
    for start, shape in boxes(whole.shape, BLOCK_ELEMENTS):
        context.check()
        block: Array = values(whole, whole.dtype, start, shape, context)
        block = block.astype(np.float64)
        nonzero = block != 0
        zeros += block.size - int(np.count_nonzero(nonzero))
        if matrix:
            live[start[0] : start[0] + shape[0]] |= nonzero.reshape(shape).any(axis=1)
        total = _squares(block)
        if not math.isfinite(total):
            nan, finite = np.isnan(block), np.isfinite(block)
            nans += int(np.count_nonzero(nan))
            infs += int(np.count_nonzero(~finite & ~nan))
            block = block[finite]
            total = _squares(block)
        if not block.size:
            continue
        low, high = min(low, float(block.min())), max(high, float(block.max()))
        squares += total
        block_mean = float(block.mean())
        block -= block_mean
        # combine two sets of values (Chan, Golub and LeVeque 1979), without subtracting large sums
        # of squares
        apart, joined = block_mean - mean, count + block.size
        spread += _squares(block) + apart * apart * (count * block.size / joined)
        mean += apart * (block.size / joined)
        count = joined
    padding = _padding(live, vocab_rows)
    none = math.nan
    return Statistics(
        name,
        whole.dtype,
        whole.shape,
        elements,
        low if count else none,
        high if count else none,
        mean if count else none,
        math.sqrt(spread / count) if count else none,
        math.sqrt(squares) if count else none,
        zeros / elements if elements else 0.0,
        nans,
        infs,
        int(np.count_nonzero(~live)) - padding,
        padding,
        elements > 1 and count == elements and low == high,
    )


def _squares(block: "Array") -> float:
    """The sum of squares, pairwise. A dot product would start threads of BLAS below ours."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are counted
        return float((block * block).sum())


def _padding(live: "Array", vocab_rows: int | None) -> int:
    """Rows of zeros beyond the vocabulary or at the end; None for tensors without a vocabulary."""
    if vocab_rows is None:
        return 0
    filled = live.nonzero()[0]
    end = min(vocab_rows, int(filled[-1]) + 1 if filled.size else 0)
    return int((~live[end:]).sum())
