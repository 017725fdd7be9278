"""``neox-bridge verify``: compares a converted checkpoint with its source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from neox_bridge.architectures.base import ModelConfig, Weight
from neox_bridge.architectures.rows import Row
from neox_bridge.documents import document, plain_data
from neox_bridge.errors import Unverified
from neox_bridge.execution.context import Context
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.derived_values import mismatch_finding
from neox_bridge.layouts.head import as_stored, head_as_in
from neox_bridge.layouts.open import open_checkpoint
from neox_bridge.layouts.rank_biases import drifted_biases
from neox_bridge.layouts.unknown_keys import undecided
from neox_bridge.optimizer.states import tensor_of
from neox_bridge.planning.casts import Cast, count_casts, equality, overflow_finding
from neox_bridge.planning.to_hf import hf_model
from neox_bridge.tensors.dtypes import FLOAT8, FLOATING
from neox_bridge.tensors.geometry import with_rows
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.verification.compare import (
    ONE_SIDED,
    Difference,
    compare,
    each,
    overflowed,
    without_reduction,
    zero_beyond,
)
from neox_bridge.wording import plural, verb

# the relative rounding of one addition or division
_EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, and what differs.

    Attributes:
        source: The source as the caller named it.
        target: The target as the caller named it.
        tensors: How many tensors the target has.
        size: Bytes of the target's tensors.
        differences: Differences, without the declared changes of a conversion.
        findings: Findings about the settings.
        casts: The dtypes that the source's tensors were cast to.
        overflows: Finite values that became infinite in a cast, by tensor.
        read_by: Whether the tensors were read with the knowledge of a family, or by their names
            alone, as they are stored.
    """

    source: str
    target: str
    tensors: int
    size: int
    differences: tuple[Difference, ...]
    findings: tuple[Finding, ...]
    casts: tuple[Cast, ...] = ()
    overflows: Mapping[str, int] = field(default_factory=dict)
    read_by: Literal["family", "names"] = "family"

    @property
    def verdict(self) -> str:
        """The result in words. A cast is mentioned, because it changes bits."""
        return equality(self.casts) if self.holds else "DIFFERS from the source"

    @property
    def holds(self) -> bool:
        """Whether the target equals the source."""
        return not self.differences and all(f.severity != "error" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The document that ``verify --json`` prints."""
        return document(**plain_data(self), verdict=self.verdict, holds=self.holds)


def verify(
    source: Checkpoint,
    target: Checkpoint,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    part: tuple[int, int] = (0, 1),
    count_overflows: bool = True,
) -> Verification:
    """Compare every tensor of the target with the converted source, and the configs.

    part: (K, N): every N-th tensor from the K-th on, if N processes share the work.

    Casts to the target dtype, padding and dropped rows of the vocabulary, norms that are written
    twice, and row biases that are split over ranks do not count as differences. progress: called
    with the bytes of each tensor compared. count_overflows: count finite values that became
    infinite in a cast, which reads tensors of the target again.
    """
    known_findings = source.findings
    source, target = as_one_model(source, target)
    wholes, config = source.tensors, source.config
    if target.kind == "hf":
        wholes, config, _, _ = hf_model(source)
    rows = min(source.vocab_rows, target.vocab_rows)
    findings = [finding for finding in source.findings if finding not in known_findings]
    findings += undecided(source, target)
    findings += _config_findings(config, target.config)
    if rows < source.vocab_rows:
        cut = f"vocabulary rows {rows} to {source.vocab_rows - 1} of the source"
        text = (
            f"{cut} are not in {target.path}: they are padding, or were cut by "
            "`vocab_rows=tokenizer`"
        )
        findings.append(Finding("rows-not-compared", "info", text))
    if target.inv_freq_mismatch is not None:
        findings.append(mismatch_finding(target.inv_freq_mismatch))
    if part[0] == 0:
        findings += _drifted(source, target)
    context = Context(progress)
    casting = {
        name: (whole.dtype, target.tensors[name].dtype)
        for name, whole in wholes.items()
        if name in target.tensors and whole.dtype != target.tensors[name].dtype
    }
    names = sorted({*wholes, *target.tensors})[part[0] :: part[1]]

    overflows: dict[str, int] = {}

    def one(name: str) -> Difference:
        difference = _compare(name, wholes, target, source.by_name, rows, context)
        cast_here = name in casting and difference.kind == "equal" and count_overflows
        if cast_here and (count := _overflow(wholes[name], target.tensors[name], context)):
            overflows[name] = count
        if name in target.tensors:
            context.wrote(target.tensors[name].nbytes, "copied")
        return difference

    differences = each(names, one, context, workers)
    if overflows:
        findings.append(overflow_finding(overflows))
    return Verification(
        source.source or source.path,
        target.source or target.path,
        len(target.tensors),
        target.size,
        tuple(difference for difference in differences if difference.kind != "equal"),
        tuple(findings),
        count_casts(casting.values()),
        dict(sorted(overflows.items())),
    )


def _drifted(source: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """Findings for biases that differ between ranks of one side; the other side has the mean."""
    for one, other in ((source, target), (target, source)):
        ranks = (one.neox and one.neox.tp, other.neox and other.neox.tp)
        if ranks[0] != ranks[1] and (drifted := drifted_biases(one)):
            yield drifted.finding(f"{other.path} is compared with the mean of the ranks")


def as_one_model(source: Checkpoint, target: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints as the models to compare, if they store a tensor twice.

    If the config of a source ties a stored head, the target decides which head is used; see
    ``head_as_in``. Raises Refused if either stores two values of one tensor.
    """
    target = as_stored(check_copies(target))
    return head_as_in(check_copies(source), target), target


def checker(
    source: Checkpoint,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Callable[[str], None]:
    """A check for ``execute``: raises Unverified if a finished folder differs from the source."""

    def check(folder: str) -> None:
        target = open_checkpoint(folder)
        verification = verify(
            source,
            target,
            workers=workers,
            progress=progress,
            part=part,
            count_overflows=False,  # counted when the tensors were written
        )
        if not verification.holds:
            raise mismatch(source, summary(verification))

    return check


def mismatch(source: Checkpoint, difference: str) -> Unverified:
    """The error for a result that differs from its source. difference: a part of a sentence."""
    return Unverified(
        f"The result does not match {source.path}: {difference}. The disk or the memory of this "
        "machine, or neox-bridge, has a fault. Convert again, and report it if it happens again."
    )


def summary(verification: Verification) -> str:
    """The differences, in one sentence."""
    parts = [describe(difference) for difference in verification.differences[:3]]
    if len(verification.differences) > 3:
        count = len(verification.differences) - 3
        parts.append(f"{plural(count, 'more tensor')} {verb(count, 'differ')}")
    parts += [finding.message for finding in verification.findings if finding.severity == "error"]
    return "; ".join(parts)


def describe(difference: Difference) -> str:
    """A difference as text."""
    name = difference.name
    if difference.kind in ONE_SIDED:
        return f"{name} is {ONE_SIDED[difference.kind]}"
    if difference.detail:
        return f"{name}: {difference.detail}"
    return (
        f"{name}: {difference.differing:,} of {plural(difference.elements, 'element')} "
        f"{verb(difference.differing, 'differ')}, by {difference.largest:.3g} at most (relative "
        f"{difference.relative:.2g}, mean {difference.mean:.3g})"
    )


def _compare(
    name: str,
    wholes: Mapping[str, Whole],
    target: Checkpoint,
    table: Mapping[str, Row],
    rows: int,
    context: Context,
) -> Difference:
    if name not in target.tensors:
        return Difference(name, "only-first", prod(wholes[name].shape))
    second = target.tensors[name]
    if name not in wholes:
        return Difference(name, "only-second", prod(second.shape))
    first, weight = wholes[name], table[tensor_of(name)].weight
    dtypes = {first.dtype, second.dtype}
    if len(dtypes) > 1 and not dtypes <= {*FLOATING, *FLOAT8}:
        detail = f"{first.dtype} and {second.dtype}: only floating-point numbers can be cast"
        return Difference(name, "values", prod(second.shape), detail=detail)
    if weight.split == "vocab":
        if not zero_beyond(second, rows, context):
            detail = f"rows {rows} to {second.shape[0] - 1} are padding, but are not zero"
            padding = (second.shape[0] - rows) * prod(second.shape[1:])
            return Difference(name, "values", padding, detail=detail)
        first, second = with_rows(first, rows), with_rows(second, rows)
    alone = without_reduction(second, context) if second.reduce == "replica" else second
    difference = divided(compare(name, first, alone, context), weight, second)
    differ = second.reduce == "replica" and alone.reduce != "none"
    if difference.kind == "equal" and differ and not _same_on_each_rank(first, second, context):
        return replace(difference, kind="replicas", detail="the target's ranks differ")
    return difference


def _same_on_each_rank(first: Whole, second: Whole, context: Context) -> bool:
    """Whether both have equally many ranks with equal values, as in a GPT-NeoX source."""
    return len(first.shards) == len(second.shards) and all(
        compare("", whole_of(one), whole_of(other), context).kind == "equal"
        for one, other in zip(first.shards, second.shards, strict=True)
    )


def _overflow(first: Whole, second: Whole, context: Context) -> int:
    rows = min(first.shape[0], second.shape[0]) if first.shape else 0
    if first.shape != second.shape and first.shape[1:] == second.shape[1:]:
        first, second = with_rows(first, rows), with_rows(second, rows)
    return overflowed(first, second, context)


def divided(difference: Difference, weight: Weight, second: Whole) -> Difference:
    """Treat a bias that was divided over ranks as equal if it differs only by rounding."""
    if difference.kind == "values" and weight.split == "row_bias" and second.reduce == "sum":
        allowed = (len(second.pieces) + 1) * _EPSILON.get(second.dtype, 0.0)
        if difference.relative <= allowed:
            return replace(difference, kind="equal")
    return difference


def _config_findings(want: ModelConfig, have: ModelConfig) -> Iterable[Finding]:
    target_meaning = have.meaning()
    for name, wanted in want.meaning().items():
        if wanted != target_meaning[name]:
            text = f"{name}: the source has {wanted}, the target {target_meaning[name]}"
            remedy = "convert again, or correct the config of the target"
            yield Finding("config-differs", "error", text, remedy)
    for dim in ("hidden", "ffn"):
        size, target_size = want.dims.get(dim), have.dims.get(dim)
        if size != target_size:
            text = f"{dim} size: the source has {size}, the target {target_size}"
            yield Finding("config-differs", "error", text, "they are different models")
