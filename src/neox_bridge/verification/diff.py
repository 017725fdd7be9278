"""``neox-bridge diff``: compares two checkpoints tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from neox_bridge.architectures.rows import Row
from neox_bridge.documents import document
from neox_bridge.execution.context import Context
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.head import as_stored
from neox_bridge.optimizer.states import tensor_of
from neox_bridge.tensors.geometry import with_rows
from neox_bridge.tensors.pieces import Shape, Whole
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
        read_by: Whether the tensors were read with the knowledge of a family, or by their names
            alone, as they are stored.
    """

    first: str
    second: str
    tensors: tuple[Difference, ...]
    read_by: Literal["family", "names"] = "family"

    @property
    def equal(self) -> bool:
        """Whether no tensor differs."""
        return all(difference.kind == "equal" for difference in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The document that ``diff --json`` prints."""
        return document(
            first=self.first,
            second=self.second,
            read_by=self.read_by,
            equal=self.equal,
            tensors=self.tensors,
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

    return sorted(each(matching(pattern, names), one, context, workers), key=weight_of)


def weight_of(difference: Difference) -> tuple[int, float, str]:
    """The key by which differences are sorted, largest first."""
    order = ("only-first", "only-second", "shape", "values", "bytes", "dtype", "replicas", "equal")
    return order.index(difference.kind), -difference.relative, difference.name


def one_sided(name: str, shape: Shape, *, is_first: bool) -> Difference:
    """The difference for a tensor that only one side has."""
    kind: DifferenceKind = "only-first" if is_first else "only-second"
    return Difference(name, kind, prod(shape), detail=f"{kind}, {list(shape)}")


def with_dtypes(difference: Difference, first: str, second: str) -> Difference:
    """The difference, with both dtypes if they differ and nothing else explains it."""
    if first == second or difference.detail or difference.kind not in ("equal", "values"):
        return difference
    kind: DifferenceKind = "dtype" if difference.kind == "equal" else "values"
    return replace(difference, kind=kind, detail=f"{first} and {second}")


def _one(
    name: str, a: Whole | None, b: Whole | None, row: Row | None, context: Context
) -> Difference:
    if a is None or b is None:
        there = a or b
        assert there is not None
        return one_sided(name, there.shape, is_first=b is None)
    rows = min(a.shape[0], b.shape[0]) if a.shape and b.shape else 0
    padded = row is not None and row.weight.split == "vocab" and a.shape[0] != b.shape[0]
    if padded and all(zero_beyond(whole, rows, context) for whole in (a, b)):
        a, b = with_rows(a, rows), with_rows(b, rows)
    return with_dtypes(compare(name, a, b, context), a.dtype, b.dtype)
