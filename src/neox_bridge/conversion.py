"""Combines the stages of a conversion: open, plan, and compare with the source.

The public verbs, the command line and batches all use these functions.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neox_bridge.execution.sink import Check
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.open_stored import read_alike
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.progress import Count
from neox_bridge.tensors.fused import GqaOrder

if TYPE_CHECKING:
    from neox_bridge.frameworks.facts import TransformersFacts
    from neox_bridge.optimizer.options import Resharding
    from neox_bridge.verification.diff import Diff
    from neox_bridge.verification.verify import Verification

MakeCheck = Callable[[Count | None], Check]


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    step: int | None = None,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
    masters: bool = False,
) -> Checkpoint:
    """Open a checkpoint without reading a tensor. Nothing in it is executed.

    Examples:
        >>> from neox_bridge import open_checkpoint
        >>> checkpoint = open_checkpoint("pythia-410m")
        >>> checkpoint.kind, checkpoint.config.layers
        ('hf', 1)

    Args:
        source: A folder in either format, its URL, or ``ORG/NAME[@REVISION]`` on the Hub.
        revision: A branch, tag or commit of a model on the Hub.
        step: The step of a GPT-NeoX run; by default the one that ``latest`` names.
        configs: The yml files of the training run, if the GPT-NeoX checkpoint contains none.
        gqa_order: The row order of grouped-query attention, if the files do not record it.
        masters: Read the optimizer's fp32 master weights instead of the stored weights.

    Raises:
        BridgeError: The source is missing, damaged, or not a known kind of checkpoint.
        Refused: The source is a checkpoint that cannot be represented.
    """
    from neox_bridge.layouts import open as layouts

    checkpoint = layouts.open_checkpoint(
        source, revision=revision, step=step, configs=configs, gqa_order=gqa_order
    )
    if not masters:
        return checkpoint
    from neox_bridge.optimizer.masters import with_masters

    return with_masters(checkpoint)


def plan(checkpoint: Checkpoint, options: Options, target: str) -> Plan:
    """Plan a conversion: everything that it will write, before a byte is written.

    Examples:
        >>> from neox_bridge import Options, open_checkpoint, plan
        >>> conversion = plan(open_checkpoint("pythia-410m"), Options(tp=2), "planned")
        >>> conversion.target["tensor_parallel"], conversion.size > 0
        (2, True)

    Args:
        checkpoint: What ``open_checkpoint`` returned.
        options: What to write, and how.
        target: The folder or URL to write to. The yml of a GPT-NeoX target contains it.

    Raises:
        Refused: The target cannot express the source. The message lists every reason.
        UsageError: Options that do not apply to this conversion, or contradict each other.
    """
    from neox_bridge.planning.make import make_plan

    if options.optimizer != "fresh":
        return with_source_findings(make_plan(checkpoint, options, target), checkpoint)
    from neox_bridge.optimizer.fresh import fresh

    return with_source_findings(make_plan(checkpoint, options, target, fresh), checkpoint)


def with_source_findings(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The plan, with a warning if files of the source changed after neox-bridge wrote them."""
    if not checkpoint.record:
        return plan
    from neox_bridge.execution.execute import sources_of
    from neox_bridge.verification.sealed import source_findings

    findings = source_findings(checkpoint, frozenset(sources_of(plan)))
    return replace(plan, findings=(*findings, *plan.findings))


def plan_conversion(
    checkpoint: Checkpoint,
    options: Options,
    target: str,
    *,
    given: Collection[str] = (),
    version: "TransformersFacts | None" = None,
) -> Plan:
    """``plan`` with the tokenizer of a published run and the limits of a transformers version.

    given: see ``planning.option_checks``. version: the transformers version that must load the
    result.
    """
    if options.tokenizer is None:
        from neox_bridge.layouts.hub_tokenizer import with_published_tokenizer

        checkpoint = with_published_tokenizer(checkpoint)
    if given:
        from neox_bridge.planning.option_checks import check_options

        check_options(checkpoint, options, given)
    conversion = plan(checkpoint, options, target)
    if version is not None:
        from neox_bridge.architectures.transformers_limits import refuse_version

        refuse_version(checkpoint.architecture.name, checkpoint.config, version)
    return conversion


def conversion_check(
    plan: Plan, progress: Count | None = None, *, workers: int | None = None
) -> Check:
    """A check for the executor. Raises ValueError if the plan has no source checkpoint."""
    if plan.checkpoint is None:
        raise ValueError("this plan has no source checkpoint to compare the result with")
    is_fresh = plan.options.get("optimizer") == "fresh"
    return source_check(plan.checkpoint, progress, is_fresh=is_fresh, workers=workers)


def source_check(
    checkpoint: Checkpoint,
    progress: Count | None = None,
    *,
    is_fresh: bool,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Check:
    """A check of some tensors for the executor; see ``verification.verify.checker``.

    is_fresh: whether the result has a fresh optimizer. It is checked with the first part.
    """
    from neox_bridge.verification.verify import checker

    check = checker(checkpoint, workers=workers, progress=progress, part=part)
    if not is_fresh or part[0] > 0:
        return check
    from neox_bridge.verification.optimizer import fresh_checker

    return fresh_checker(checkpoint, check, workers=workers)


def plan_resharding(
    checkpoint: Checkpoint,
    options: "Resharding",
    target: str,
    *,
    export: str | None = None,
    given: Collection[str] = (),
    workers: int | None = None,
) -> tuple[Plan, MakeCheck]:
    """Plan the resharding of a run. Returns the plan and a factory for the check of the result.

    export: a folder that ``export-optimizer`` wrote, whose states replace those of the run.
    given: names of options that must have an effect.
    """
    from neox_bridge.layouts.hub_tokenizer import with_published_tokenizer
    from neox_bridge.optimizer.read_files import read_optimizer
    from neox_bridge.optimizer.reshard import plan_reshard, target_states
    from neox_bridge.stores.paths import absolute

    checkpoint, edited = with_published_tokenizer(checkpoint), None
    optimizer = read_optimizer(checkpoint)
    if export is not None:
        from neox_bridge.optimizer.read_export import with_export

        checkpoint, edited = with_export(checkpoint, optimizer, export)
    if "row_bias" in given:
        from neox_bridge.optimizer.reshard_target import check_row_bias

        check_row_bias(checkpoint, optimizer, edited, tp=options.tp, universal=options.universal)
    conversion = plan_reshard(checkpoint, optimizer, options, absolute(target), edited)
    conversion = with_source_findings(conversion, checkpoint)

    def make_check(progress: Count | None) -> Check:
        from neox_bridge.verification.optimizer import checker

        states = target_states(checkpoint, optimizer, options, edited)
        return checker(checkpoint, *states, workers=workers, progress=progress)

    return conversion, make_check


@dataclass(frozen=True, slots=True)
class Comparison:
    """The two sides that ``verify`` compares, and findings about them.

    Both sides are of known families, or both are read as they are stored.
    """

    source: Checkpoint | StoredModel
    target: Checkpoint | StoredModel
    findings: tuple[Finding, ...]


def comparison_of(
    source: Checkpoint | StoredModel, target: Checkpoint | StoredModel, *, optimizer: bool = False
) -> Comparison:
    """The source as it was converted, and the target, both read in the same way.

    optimizer: whether to compare states too. Raises Refused if they cannot be compared.
    """
    from neox_bridge.optimizer.masters import (
        as_it_was_converted,
        with_states,
        with_weights_as_masters,
    )
    from neox_bridge.planning.option_checks import check_optimizer

    check_optimizer(optimizer, source, target)
    source, target = read_alike(source, target)
    if isinstance(source, StoredModel) or isinstance(target, StoredModel):
        return Comparison(source, target, ())
    source, findings = as_it_was_converted(source, target)
    if optimizer:
        with_source, with_target = with_states(source), with_states(target)
        target = with_weights_as_masters(target, with_target, with_source)
        source = with_weights_as_masters(source, with_source, with_target)
    return Comparison(source, target, findings)


def verify_comparison(
    comparison: Comparison, progress: Count | None = None, *, workers: int | None = None
) -> "Verification":
    """Compare every tensor and the config of both sides."""
    source, target = comparison.source, comparison.target
    if isinstance(source, StoredModel) and isinstance(target, StoredModel):
        from neox_bridge.verification.stored import verify_stored

        return verify_stored(source, target, workers=workers, progress=progress)
    from neox_bridge.verification.verify import verify

    assert isinstance(source, Checkpoint)
    assert isinstance(target, Checkpoint)
    result = verify(source, target, workers=workers, progress=progress)
    return replace(result, findings=(*comparison.findings, *result.findings))


def diff_sides(
    first: Checkpoint | StoredModel, second: Checkpoint | StoredModel, *, optimizer: bool = False
) -> tuple[Checkpoint | StoredModel, Checkpoint | StoredModel]:
    """Both sides of ``diff``, read in the same way.

    optimizer: add the optimizer states. Raises Refused if they cannot be compared.
    """
    first, second = read_alike(first, second)
    if not optimizer or isinstance(first, StoredModel) or isinstance(second, StoredModel):
        return first, second
    from neox_bridge.optimizer.masters import with_states

    return with_states(first), with_states(second)


def diff_tensors(
    first: Checkpoint | StoredModel,
    second: Checkpoint | StoredModel,
    progress: Count | None = None,
    *,
    pattern: str = "*",
    workers: int | None = None,
) -> "Diff":
    """Compare what ``diff_sides`` returned. pattern: a glob of names."""
    from neox_bridge.verification.diff import Diff, diff

    names = first.source or first.path, second.source or second.path
    if isinstance(first, StoredModel) and isinstance(second, StoredModel):
        from neox_bridge.verification.stored import diff_stored

        tensors = diff_stored(first, second, pattern=pattern, workers=workers, progress=progress)
        return Diff(*names, tuple(tensors), "names")
    assert isinstance(first, Checkpoint)
    assert isinstance(second, Checkpoint)
    tensors = diff(first, second, pattern=pattern, workers=workers, progress=progress)
    return Diff(*names, tuple(tensors))
