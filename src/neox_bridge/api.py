"""The public verbs: they compose opening, planning, execution and verification.

``batch`` lies in a room above this one, since it runs these verbs for many checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.fused import GqaOrder

if TYPE_CHECKING:
    from neox_bridge.execution.digests import HashName
    from neox_bridge.execution.result import Result
    from neox_bridge.findings import Finding
    from neox_bridge.optimizer.options import Resharding
    from neox_bridge.verification.audit import Audit
    from neox_bridge.verification.compare import Difference
    from neox_bridge.verification.verify import Verification

Progress = Callable[[int], None]
_DEFAULTS = Options()


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

    Args:
        source: A folder of either kind, its URL, or ``ORG/NAME[@REVISION]`` on the Hub.
        revision: A branch, tag or commit of a model on the Hub.
        step: The step of a GPT-NeoX run; by default the one that ``latest`` names.
        configs: The yml files of a GPT-NeoX checkpoint that has none of its own.
        gqa_order: The order of the rows of grouped-query attention, if the files do not tell it.
        masters: Read the optimizer's fp32 master weights in place of the stored weights.

    Raises:
        BridgeError: The source is missing, damaged, or no checkpoint that this package knows.
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
    """Say everything that a conversion will write, before a byte is written.

    Args:
        checkpoint: What ``open_checkpoint`` returned.
        options: What to write, and how.
        target: The folder or URL to be written; the yml of a GPT-NeoX target names it.

    Raises:
        Refused: The target cannot express the source; the message has every reason.
        UsageError: Options that do not apply to this conversion, or contradict each other.
    """
    from neox_bridge.planning.make import make_plan

    if options.optimizer != "fresh":
        return make_plan(checkpoint, options, target)
    from neox_bridge.optimizer.fresh import fresh

    return make_plan(checkpoint, options, target, fresh)


def execute(
    plan: Plan,
    target: str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    workers: int | None = None,
    hash_name: "HashName | None" = "xxh3_128",
    progress: Progress | None = None,
) -> "Result":
    """Write what a plan says, whole or not at all, and compare the result with the source.

    A run that was killed continues when the same plan is executed again.

    Args:
        plan: What ``plan`` returned.
        target: The folder or URL to write.
        overwrite: Replace what is there, if it is a checkpoint or the output of this package.
        verify: Read the result back before it gets its name, and compare it with the source.
        workers: Threads; by default as many as the machine keeps busy.
        hash_name: The hash of each file in ``neox_bridge.json``; None for none.
        progress: Called with the number of bytes just written or compared.

    Raises:
        Unverified: The result is not what the source says. It is kept for inspection.
        BridgeError: The target exists, the disk is full, or the source is damaged or changed.
    """
    from neox_bridge.execution.execute import execute as write

    check = None
    if verify and plan.checkpoint is not None:
        check = conversion_check(plan, workers=workers, progress=progress)
    return write(
        plan,
        target,
        overwrite=overwrite,
        workers=workers,
        hash_name=hash_name,
        progress=progress,
        check=check,
    )


def conversion_check(
    plan: Plan, *, workers: int | None = None, progress: Progress | None = None
) -> Callable[[str], None]:
    """A check for the executor: it raises Unverified if a finished folder is not the plan's source.

    Raises:
        ValueError: The plan has no source checkpoint.
    """
    from neox_bridge.verification.optimizer import fresh_checker
    from neox_bridge.verification.verify import checker

    if plan.checkpoint is None:
        raise ValueError("this plan has no source checkpoint to compare the result with")
    check = checker(plan.checkpoint, workers=workers, progress=progress)
    if plan.asked.get("optimizer") == "fresh":
        check = fresh_checker(plan.checkpoint, check, workers=workers)
    return check


def convert(
    source: str | Checkpoint,
    target: str,
    options: Options = _DEFAULTS,
    *,
    overwrite: bool = False,
    verify: bool = True,
    workers: int | None = None,
    hash_name: "HashName | None" = "xxh3_128",
    progress: Progress | None = None,
) -> "Result":
    """Convert a checkpoint between Hugging Face and GPT-NeoX, or between GPT-NeoX layouts.

    Args:
        source: An opened checkpoint, or what ``open_checkpoint`` opens.
        target: The folder or URL to write.
        options: What to write, and how; by default the other format, in the source's dtype.
        overwrite: See ``execute``, as for the other arguments.
        verify: Read the result back and compare it with the source.
        workers: Threads.
        hash_name: The hash of each file in ``neox_bridge.json``; None for none.
        progress: Called with the number of bytes just written or compared.

    Raises:
        Refused: The target cannot express the source; the message has every reason.
        UsageError: Options that do not apply to this conversion, or contradict each other.
        BridgeError: See ``open_checkpoint`` and ``execute``.
    """
    checkpoint = _opened(source, options.gqa_order)
    if options.tokenizer is None:
        from neox_bridge.layouts.hub_tokenizer import with_published_tokenizer

        checkpoint = with_published_tokenizer(checkpoint)
    return execute(
        plan(checkpoint, options, target),
        target,
        overwrite=overwrite,
        verify=verify,
        workers=workers,
        hash_name=hash_name,
        progress=progress,
    )


def reshard(
    source: str | Checkpoint,
    target: str,
    options: "Resharding | None" = None,
    *,
    overwrite: bool = False,
    verify: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "Result":
    """Write a GPT-NeoX run with its optimizer for other ranks, or for another GPT-NeoX.

    Args:
        source: An opened checkpoint of a run, or what ``open_checkpoint`` opens.
        target: The folder to write; training continues with its ``resume.yml``.
        options: The ranks, ZeRO stage and era; by default those of the source.
        overwrite: Replace what is there, if it is a checkpoint or the output of this package.
        verify: Read weights and states back and compare them with the source.
        workers: Threads.
        progress: Called with the number of bytes just written or compared.

    Raises:
        Refused: The model or the batch does not fit these ranks.
        BridgeError: The source has no optimizer states, or see ``execute``.
    """
    from neox_bridge.execution.execute import execute as write
    from neox_bridge.layouts.hub_tokenizer import with_published_tokenizer
    from neox_bridge.optimizer.options import Resharding
    from neox_bridge.optimizer.read_files import read_optimizer
    from neox_bridge.optimizer.reshard import plan_reshard, target_states
    from neox_bridge.stores.paths import absolute
    from neox_bridge.verification.optimizer import checker

    checkpoint = with_published_tokenizer(_opened(source))
    options = options or Resharding()
    optimizer = read_optimizer(checkpoint)
    check = None
    if verify:
        states = target_states(checkpoint, optimizer, options, None)
        check = checker(checkpoint, *states, workers=workers, progress=progress)
    return write(
        plan_reshard(checkpoint, optimizer, options, absolute(target)),
        target,
        overwrite=overwrite,
        workers=workers,
        progress=progress,
        check=check,
    )


def verify(
    source: str | Checkpoint,
    target: str | Checkpoint,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "Verification":
    """Compare a converted checkpoint with its source: every tensor bit by bit, and the config.

    Declared changes are no differences: a cast, rows of padding, biases spread over ranks.

    Args:
        source: The source of the conversion, opened or as ``open_checkpoint`` opens it.
        target: What was written, likewise.
        workers: Threads.
        progress: Called with the number of bytes just compared.

    Raises:
        BridgeError: A checkpoint is missing or damaged.
    """
    from neox_bridge.optimizer.masters import as_it_was_converted
    from neox_bridge.verification.verify import verify as compare

    first, second = _opened(source), _opened(target)
    first, conversion_findings = as_it_was_converted(first, second)
    result = compare(first, second, workers=workers, progress=progress)
    return replace(result, findings=(*conversion_findings, *result.findings))


def diff(
    first: str | Checkpoint,
    second: str | Checkpoint,
    *,
    pattern: str = "*",
    workers: int | None = None,
    progress: Progress | None = None,
) -> "list[Difference]":
    """Compare two checkpoints of any kinds and layouts in the model's own tensors.

    Args:
        first: A checkpoint, opened or as ``open_checkpoint`` opens it.
        second: The other one.
        pattern: A glob of Hugging Face names: only these tensors are compared.
        workers: Threads.
        progress: Called with the number of bytes just compared.

    Returns:
        One entry for each tensor of either, equal ones too, largest relative difference first.

    Raises:
        BridgeError: A checkpoint is missing or damaged.
    """
    from neox_bridge.verification.diff import diff as compare

    return compare(
        _opened(first), _opened(second), pattern=pattern, workers=workers, progress=progress
    )


def diagnose(checkpoint: str | Checkpoint, target: str | None = None) -> "list[Finding]":
    """Say what wrote a checkpoint, what is wrong with it, and whether a target loads it.

    Args:
        checkpoint: An opened checkpoint, or what ``open_checkpoint`` opens.
        target: What ``--for`` names, such as ``neox@2024-03`` or ``transformers@4.48``; by default
            the framework and era that the checkpoint looks made for.

    Returns:
        Findings; one of severity "error" means that it does not load, or as another model.

    Raises:
        BridgeError: The checkpoint cannot be opened, or there is no such target.
    """
    from neox_bridge.doctor.diagnose import diagnose as judge
    from neox_bridge.frameworks.targets import target_named

    return judge(_opened(checkpoint), target_named(target) if target is not None else None)


def audit(
    folders: Iterable[str],
    *,
    steps: str = "all",
    configs: Sequence[str] = (),
    same_init: bool = False,
    optimizer: bool = False,
    cache: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "Audit":
    """Compare the many checkpoints of runs with each other, and say which are broken.

    Args:
        folders: Folders or URLs of runs, of suites of runs, or models on the Hub.
        steps: Which steps, such as ``0-1000`` or ``1,2,4``; see ``neox-bridge audit --help``.
        configs: The yml files of GPT-NeoX checkpoints that have none of their own.
        same_init: Runs of the same shapes must begin with the same weights.
        optimizer: Read the optimizer states too.
        cache: A folder that remembers fingerprints of files that have not changed; None for none.
        workers: Threads.
        progress: Called with the number of bytes just read.

    Raises:
        BridgeError: There is no checkpoint in these folders.
        UsageError: ``steps`` is malformed or matches no step.
    """
    from neox_bridge.verification.audit import audit as compare
    from neox_bridge.verification.opened import open_places
    from neox_bridge.verification.runs import known_runs
    from neox_bridge.verification.step_choice import check_ranges, check_steps, with_steps

    check_steps(steps)
    runs, faults = known_runs(folders)
    check_ranges(steps, runs)
    return compare(
        open_places([with_steps(run, steps) for run in runs], configs),
        faults=faults,
        same_init=same_init,
        optimizer=optimizer,
        cache=cache,
        workers=workers,
        progress=progress,
    )


def _opened(checkpoint: str | Checkpoint, gqa_order: GqaOrder | None = None) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return open_checkpoint(checkpoint, gqa_order=gqa_order)
