"""Compares two tensors element by element, in bounded memory."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from neox_bridge.errors import UsageError
from neox_bridge.execution.context import Context
from neox_bridge.execution.transform import blocks, boxes, replica
from neox_bridge.tensors.dtypes import FLOAT8, FLOATING, itemsize, to_numpy
from neox_bridge.tensors.flat import placed_segments
from neox_bridge.tensors.pieces import OutputTensor, Shape, Whole, cut
from neox_bridge.verification.equal import equal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_T = TypeVar("_T")
DifferenceKind = Literal[
    "equal", "values", "bytes", "shape", "dtype", "only-first", "only-second", "replicas"
]
ONE_SIDED = {"only-first": "only in the first", "only-second": "only in the second"}  # kinds
BLOCK_BYTES = 4 << 20  # bytes of each side at a time
# lossless casts; others may overflow
_EXACT = {
    ("float16", "float32"),
    ("bfloat16", "float32"),
    *((dtype, "float64") for dtype in ("float16", "bfloat16", "float32")),
    *((dtype, dtype) for dtype in FLOATING),
    *((small, dtype) for small in FLOAT8 for dtype in FLOATING),
}
_WIDER = ("float16", "bfloat16", "float32", "float64")
MEASURED_ELEMENTS = 1 << 16  # elements per block if several float64 copies are needed


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of comparing one tensor of two checkpoints.

    Attributes:
        kind: How it differs. "bytes": it cannot be decoded, and its bytes differ.
        differing: The number of elements whose bits differ; of "bytes", the number of bytes.
        largest: The largest absolute difference.
        mean: The mean absolute difference.
        relative: ``largest`` divided by the largest absolute value of the first.
        detail: Shapes, dtypes or ranks, for display.
    """

    name: str
    kind: DifferenceKind
    elements: int = 0
    differing: int = 0
    largest: float = 0.0
    mean: float = 0.0
    relative: float = 0.0
    detail: str = ""


def compare(name: str, first: Whole, second: Whole, context: Context) -> Difference:
    """Compare two tensors bit by bit.

    If dtypes differ, the first is cast to the dtype of the second, as a conversion would do.
    """
    elements = prod(first.shape)
    if first.shape != second.shape:
        detail = f"{list(first.shape)} and {list(second.shape)}"
        return Difference(name, "shape", elements, detail=detail)
    first, second = without_reduction(first, context), without_reduction(second, context)
    if equal(first, second, context):
        return Difference(name, "equal", elements)
    difference = _measure(name, first, second, context)
    return difference if difference.differing else Difference(name, "equal", elements)


def without_reduction(whole: Whole, context: Context) -> Whole:
    """The tensor without its reduction, if one piece equals the result bit for bit.

    For a tensor in segments, one piece per segment.
    """
    if whole.reduce == "none":
        return whole
    pieces = []
    for to, part in placed_segments(whole):
        tensor = OutputTensor("", part.dtype, part.shape, part.pieces, part.reduce)
        only = replica(tensor, context)
        if only is None:
            return whole
        pieces.append(replace(only, to=to))
    return replace(whole, pieces=tuple(pieces), reduce="none", shards=(), parts=())


def values(whole: Whole, dtype: str, start: Shape, shape: Shape, context: Context) -> "Array":
    """A box of the tensor in a dtype, flat."""
    import numpy as np

    pieces = cut(whole, start, shape, (0,) * len(shape))
    placed = placed_segments(Whole(dtype, shape, pieces, whole.reduce))
    if len(placed) > 1:
        out: Array = np.empty(shape, to_numpy(dtype))
        for to, part in placed:
            box = tuple(slice(t, t + n) for t, n in zip(to, part.shape, strict=True))
            out[box] = _read(part, context).reshape(part.shape)
        return out.reshape(-1)
    return _read(placed[0][1], context)


def _read(whole: Whole, context: Context) -> "Array":
    import numpy as np

    tensor = OutputTensor("", whole.dtype, whole.shape, whole.pieces, whole.reduce)
    parts = [part.reshape(-1) for part in blocks(tensor, context)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def common_dtype(dtypes: Iterable[str]) -> str | None:
    """The smallest dtype to which all of these can be cast losslessly."""
    kinds = set(dtypes)
    exact = (wider for wider in _WIDER if all((kind, wider) in _EXACT for kind in kinds))
    return next(exact, None)


def overflowed(first: Whole, second: Whole, context: Context) -> int:
    """How many finite values of a tensor became infinite or NaN in a cast.

    The second is the first in another dtype. The first is read only if needed.
    """
    import numpy as np

    if first.shape != second.shape or (first.dtype, second.dtype) in _EXACT:
        return 0
    count = 0
    for start, shape in boxes(second.shape, MEASURED_ELEMENTS):
        lost = ~np.isfinite(values(second, second.dtype, start, shape, context))
        if lost.any():
            before = values(first, first.dtype, start, shape, context)
            count += int(np.count_nonzero(np.isfinite(before[lost])))
    return count


def zero_beyond(whole: Whole, rows: int, context: Context) -> bool:
    """Whether every element from this row on is +0.0."""
    shape = (whole.shape[0] - rows, *whole.shape[1:])
    return not any(
        values(whole, whole.dtype, (rows + at, *rest), size, context).view("u1").any()
        for (at, *rest), size in boxes(shape, max(1, BLOCK_BYTES // itemsize(whole.dtype)))
    )


def each(
    names: Iterable[str], one: Callable[[str], _T], context: Context, workers: int | None
) -> list[_T]:
    """``one`` for every name, in threads; the context's files are closed at the end."""
    try:
        if workers == 1:
            return [one(name) for name in names]
        with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
            try:
                return list(pool.map(one, names))
            except BaseException:  # also on Ctrl-C: threads need not finish their tensors
                context.stop.set()
                raise
    finally:
        context.files.close()


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names of tensors that match a glob such as ``*.bias``, in their order.

    Raises UsageError if none does, so that an empty comparison does not pass.
    """
    known = list(names)
    chosen = [name for name in known if fnmatchcase(name, pattern)]
    if not chosen and known:
        word = pattern.strip("*")
        near = next((name for name in known if word in name), "")
        near = near or (get_close_matches(pattern, known, 1, 0) or known)[0]
        fix = f"The pattern must match a whole name, such as {near}."
        if word and word in near:
            fix += f" Use '*{word}*'."
        raise UsageError(["tensor"], f"no tensor matches {pattern!r}", fix)
    return chosen


def _measure(name: str, first: Whole, second: Whole, context: Context) -> Difference:
    import numpy as np

    differing, largest, total, scale, finite = 0, 0.0, 0.0, 0.0, 0
    width = itemsize(second.dtype)
    bits = np.dtype(f"u{min(width, 8)}")
    for start, shape in boxes(first.shape, MEASURED_ELEMENTS):
        context.check()
        a = values(first, second.dtype, start, shape, context)
        b = values(second, second.dtype, start, shape, context)
        apart = a.view(bits) != b.view(bits)
        if width > 8:
            apart = apart.reshape(-1, width // 8).any(axis=1)
        differing += int(np.count_nonzero(apart))
        exact = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
        with np.errstate(all="ignore"):
            a, b = a.astype(exact), b.astype(exact)
            gap = np.abs(a - b)
            size = np.abs(a)
        odd = np.isnan(gap)
        if odd.any():
            gap[odd] = np.where(np.isnan(a[odd]) & np.isnan(b[odd]), 0.0, np.inf)  # 0: payloads
        largest = max(largest, float(gap.max(initial=0.0)))
        known = gap[np.isfinite(gap)]
        total, finite = total + float(known.sum()), finite + known.size
        scale = max(scale, float(size[np.isfinite(size)].max(initial=0.0)))
    relative = largest / scale if scale else (float("inf") if largest else 0.0)
    mean = total / finite if finite else float("inf")
    count = prod(first.shape)
    return Difference(name, "values", count, differing, largest, mean, relative)
