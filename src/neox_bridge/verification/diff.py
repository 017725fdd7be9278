"""``neox-bridge diff``: compares two checkpoints tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from neox_bridge.architectures.rows import Row
from neox_bridge.documents import document
from neox_bridge.execution.context import Context
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.head import as_stored
from neox_bridge.optimizer.states import tensor_of
from neox_bridge.tensors.geometry import with_rows
from neox_bridge.tensors.pieces import Whole
from neox_bridge.verification.compare import (
    Difference,
    DifferenceKind,
    compare,
    each,
    matching,
    zero_beyond,
)


@dataclass(frozen=True, slots=True)
class Diff:
    """Two checkpoints, compared tensor by tensor.

    Attributes:
        first: The first checkpoint as the caller named it.
        second: The second one.
        tensors: Every tensor of either side, including equal ones, largest relative difference
            first.
    """

    first: str
    second: str
    tensors: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether no tensor differs."""
        return all(difference.kind == "equal" for difference in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The document that ``diff --json`` prints."""
        return document(
            first=self.first, second=self.second, equal=self.equal, tensors=self.tensors
        )


def diff(
    first: Checkpoint,
    second: Checkpoint,
    *,
    pattern: str = "*",
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Difference]:
    """Compare all tensors by Hugging Face name, largest relative difference first.

    Shards are assembled and row biases summed. Rows of zeros at the end of only one vocabulary
    count as padding. If dtypes differ, this is reported, and values are compared in the second
    dtype.
    pattern: a glob of names. Raises Refused if a checkpoint stores two different values of one
    tensor.
    """
    first, second = (as_stored(check_copies(one)) for one in (first, second))
    table = max(first, second, key=lambda one: one.config.layers).by_name
    names = sorted({*first.tensors, *second.tensors})
    context = Context(progress)

    def one(name: str) -> Difference:
        a, b = first.tensors.get(name), second.tensors.get(name)
        difference = _one(name, a, b, table.get(tensor_of(name)), context)
        context.wrote(sum(whole.nbytes for whole in (a, b) if whole), "copied")
        return difference

    return sorted(each(matching(pattern, names), one, context, workers), key=_weight)


def _weight(difference: Difference) -> tuple[int, float, str]:
    order = ("only-first", "only-second", "shape", "values", "dtype", "replicas", "equal")
    return order.index(difference.kind), -difference.relative, difference.name


def _one(
    name: str, a: Whole | None, b: Whole | None, row: Row | None, context: Context
) -> Difference:
    if a is None or b is None:
        there = a or b
        assert there is not None
        kind: DifferenceKind = "only-first" if b is None else "only-second"
        return Difference(name, kind, prod(there.shape), detail=f"{kind}, {list(there.shape)}")
    rows = min(a.shape[0], b.shape[0]) if a.shape and b.shape else 0
    padded = row is not None and row.weight.split == "vocab" and a.shape[0] != b.shape[0]
    if padded and all(zero_beyond(whole, rows, context) for whole in (a, b)):
        a, b = with_rows(a, rows), with_rows(b, rows)
    difference = compare(name, a, b, context)
    if a.dtype != b.dtype and difference.kind in ("equal", "values"):
        other: DifferenceKind = "dtype" if difference.kind == "equal" else "values"
        return replace(difference, kind=other, detail=f"{a.dtype} and {b.dtype}")
    return difference
