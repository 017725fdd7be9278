"""Compares two Hugging Face repositories as they are stored: by name, shape, dtype and bits."""

from collections.abc import Callable

from neox_bridge.execution.context import Context
from neox_bridge.layouts.stored_model import StoredModel, StoredTensor
from neox_bridge.planning.casts import count_casts, overflow_finding
from neox_bridge.tensors.dtypes import FLOAT8, FLOATING
from neox_bridge.tensors.pieces import whole_of
from neox_bridge.verification.compare import Difference, compare, each, matching, overflowed
from neox_bridge.verification.config_differences import config_findings
from neox_bridge.verification.diff import one_sided, weight_of, with_dtypes
from neox_bridge.verification.verify import Verification
from neox_bridge.wording import plural, verb


def diff_stored(
    first: StoredModel,
    second: StoredModel,
    *,
    pattern: str = "*",
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Difference]:
    """Compare all tensors by name, largest relative difference first.

    Args:
        first: The first repository.
        second: The second one.
        pattern: A glob of names.
        workers: Threads.
        progress: Called with the bytes of each tensor that was compared.
    """
    context = Context(progress)

    def one(name: str) -> Difference:
        a, b = first.stored.get(name), second.stored.get(name)
        difference = _compare(name, a, b, context)
        context.wrote(sum(tensor.ref.nbytes for tensor in (a, b) if tensor), "copied")
        if a is None or b is None:
            return difference
        return with_dtypes(difference, a.dtype, b.dtype)

    names = matching(pattern, sorted({*first.stored, *second.stored}))
    return sorted(each(names, one, context, workers), key=weight_of)


def verify_stored(
    source: StoredModel,
    target: StoredModel,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compare every tensor and the configs. A cast between floating dtypes is no difference.

    Args:
        source: The repository that the other one should equal.
        target: The other one.
        workers: Threads.
        progress: Called with the bytes of each tensor that was compared.
    """
    context = Context(progress)
    both = source.stored.keys() & target.stored.keys()
    pairs = {name: (source.stored[name], target.stored[name]) for name in both}
    casting = {name: (a.dtype, b.dtype) for name, (a, b) in pairs.items() if a.dtype != b.dtype}
    overflows: dict[str, int] = {}

    def one(name: str) -> Difference:
        a, b = source.stored.get(name), target.stored.get(name)
        difference = _compare(name, a, b, context)
        if name in casting and difference.kind == "equal":
            first, second = (whole_of(tensor.ref) for tensor in pairs[name])
            overflows[name] = overflowed(first, second, context)
        context.wrote(b.ref.nbytes if b else 0, "copied")
        return difference

    names = sorted({*source.stored, *target.stored})
    differences = [one for one in each(names, one, context, workers) if one.kind != "equal"]
    findings = config_findings(source, target)
    if overflows := {name: count for name, count in sorted(overflows.items()) if count}:
        findings.append(overflow_finding(overflows))
    differing = {difference.name for difference in differences}
    casts = count_casts(pair for name, pair in casting.items() if name not in differing)
    return Verification(
        source.source or source.path,
        target.source or target.path,
        len(target.stored),
        target.size,
        tuple(differences),
        tuple(findings),
        casts,
        overflows,
        read_by="names",
    )


def _compare(
    name: str, a: StoredTensor | None, b: StoredTensor | None, context: Context
) -> Difference:
    if a is None or b is None:
        there = a or b
        assert there is not None
        return one_sided(name, there.shape, is_first=b is None)
    if a.shape != b.shape:
        detail = f"{list(a.shape)} and {list(b.shape)}"
        return Difference(name, "shape", a.elements, detail=detail)
    if a.dtype != b.dtype and not (a.decoded and b.decoded and _can_cast(a.dtype, b.dtype)):
        detail = f"{a.dtype} and {b.dtype}: only floating-point numbers can be cast"
        return Difference(name, "values", a.elements, detail=detail)
    difference = compare(name, whole_of(a.ref), whole_of(b.ref), context)
    if a.decoded:
        return difference
    if difference.kind == "equal":
        return Difference(name, "equal", a.elements)
    detail = (
        f"{difference.differing:,} of {plural(difference.elements, 'byte')} "
        f"{verb(difference.differing, 'differ')} ({a.dtype}, whose values are not decoded)"
    )
    return Difference(name, "bytes", a.elements, difference.differing, detail=detail)


def _can_cast(first: str, second: str) -> bool:
    return {first, second} <= {*FLOATING, *FLOAT8}
