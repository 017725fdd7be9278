"""The public verbs: they compose opening, planning, execution and verification."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neox_bridge.conversion import (
    comparison_of,
    conversion_check,
    open_checkpoint,
    plan,
    plan_conversion,
    verify_comparison,
)
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.fused import GqaOrder

if TYPE_CHECKING:
    from neox_bridge.batches.row import BatchResult
    from neox_bridge.execution.digests import HashName
    from neox_bridge.execution.result import Result
    from neox_bridge.findings import Finding
    from neox_bridge.optimizer.options import Resharding
    from neox_bridge.verification.audit import Audit
    from neox_bridge.verification.compare import Difference
    from neox_bridge.verification.verify import Verification

__all__ = [
    "audit",
    "batch",
    "convert",
    "diagnose",
    "diff",
    "execute",
    "open_checkpoint",
    "plan",
    "reshard",
    "verify",
]
Progress = Callable[[int], None]
_DEFAULTS = Options()


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
    """Execute a plan atomically, and compare the result with the source.

    If a run is killed, execute the same plan again to resume it.

    Args:
        plan: What ``plan`` returned.
        target: The folder or URL to write.
        overwrite: Replace an existing target, if it is a checkpoint or output of this package.
        verify: Read the result back and compare it with the source before it appears at ``target``.
        workers: Number of threads. Default: the number of cores plus one, at most 5.
        hash_name: The hash of each file in ``neox_bridge.json``; None for none.
        progress: Called with the number of bytes just written or compared.

    Raises:
        Unverified: The result differs from the source. It is kept for inspection.
        BridgeError: The target exists, the disk is full, or the source is damaged or changed.
    """
    from neox_bridge.execution.execute import execute as write

    check = None
    if verify and plan.checkpoint is not None:
        check = conversion_check(plan, progress, workers=workers)
    return write(
        plan,
        target,
        overwrite=overwrite,
        workers=workers,
        hash_name=hash_name,
        progress=progress,
        check=check,
    )


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
    return execute(
        plan_conversion(checkpoint, options, target),
        target,
        overwrite=overwrite,
        verify=verify,
        workers=workers,
        hash_name=hash_name,
        progress=progress,
    )


def batch(
    sources: str | Iterable[str],
    target: str,
    options: Options = _DEFAULTS,
    *,
    steps: str = "all",
    configs: Sequence[str] = (),
    masters: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    retries: int = 2,
    workers: int | None = None,
    hash_name: "HashName | None" = "xxh3_128",
    private: bool = False,
    progress: Progress | None = None,
) -> "BatchResult":
    """Convert many checkpoints. Those that are already converted and still intact are skipped.

    Each checkpoint is written to ``target/stepN`` (``target/RUN/stepN`` for several runs)
    atomically. A checkpoint that fails is retried, and the others continue. The work runs in
    processes, so a script that calls this needs ``if __name__ == "__main__":``.

    Args:
        sources: Runs, folders of steps, single checkpoints, their URLs, or models on the Hub.
        target: The folder or URL to write to, or ``hf://ORG/NAME``, which gets a branch per
            checkpoint.
        options: What to write, and how; by default the other format, in the source's dtype.
        steps: Which steps, such as ``0-143000:1000``; see ``neox-bridge batch --help``.
        configs: The yml files of training runs whose GPT-NeoX checkpoints contain none.
        masters: Read the optimizer's fp32 master weights instead of the stored weights.
        overwrite: Replace an existing target, if it is a checkpoint or output of this package.
        verify: Read each result back and compare it with its source.
        retries: How often to retry a checkpoint that failed.
        workers: Number of worker processes. Default: the number of cores plus one.
        hash_name: The hash of each file in ``neox_bridge.json``; None for none.
        private: Create the repository on the Hub as private.
        progress: Called with the number of bytes just written or compared, by any thread.

    Returns:
        One row per checkpoint. The row of a failed checkpoint contains its error.

    Raises:
        UsageError: ``steps`` matches no step, or an option does not apply to the first checkpoint
            of a run.
        BridgeError: No source contains a checkpoint, or two would get the same name in the target.
    """
    from contextlib import closing

    from neox_bridge.batches.items import check_first, find_items
    from neox_bridge.batches.on_hub import hub_model
    from neox_bridge.batches.row import BatchResult
    from neox_bridge.batches.run import Batch, Event, run_batch
    from neox_bridge.execution.executors import Processes, default_slots

    def tell(event: Event) -> None:
        if progress is not None and event.kind == "written":
            progress(event.size)

    named = (sources,) if isinstance(sources, str) else tuple(sources)
    items, findings = find_items(
        named,
        steps,
        configs=configs,
        gqa_order=options.gqa_order,
        masters=masters,
    )
    check_first(items, options)
    settings = Batch(
        target,
        options,
        overwrite=overwrite,
        verify=verify,
        retries=retries,
        hash_name=hash_name,
        hub=hub_model(target, private=private),
        tell=tell,
    )
    with closing(Processes(workers or default_slots())) as pool:
        rows = {row.name: row for row in run_batch(items, settings, pool)}
    ordered = tuple(rows[item.name] for item in items)
    return BatchResult(target, ordered, tuple(findings), named)


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
    """Move a GPT-NeoX run, optimizer included, to other ranks or another GPT-NeoX version.

    Args:
        source: An opened checkpoint of a run, or anything that ``open_checkpoint`` accepts.
        target: The folder to write to. To resume training, use its ``resume.yml``.
        options: The ranks, ZeRO stage and era; by default those of the source.
        overwrite: Replace an existing target, if it is a checkpoint or output of this package.
        verify: Read weights and states back and compare them with the source.
        workers: Threads.
        progress: Called with the number of bytes just written or compared.

    Raises:
        Refused: The model or the batch does not fit these ranks.
        BridgeError: The source has no optimizer states, or see ``execute``.
    """
    from neox_bridge.conversion import plan_resharding
    from neox_bridge.execution.execute import execute as write
    from neox_bridge.optimizer.options import Resharding

    checkpoint = _opened(source)
    resharded, make_check = plan_resharding(
        checkpoint, options or Resharding(), target, workers=workers
    )
    result = write(
        resharded,
        target,
        overwrite=overwrite,
        workers=workers,
        progress=progress,
        check=make_check(progress) if verify else None,
    )
    return replace(result, source=checkpoint.source)


def verify(
    source: str | Checkpoint,
    target: str | Checkpoint,
    *,
    optimizer: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "Verification":
    """Compare a converted checkpoint with its source: every tensor bit by bit, and the config.

    Changes that the conversion declares do not count as differences: a cast, rows of padding,
    biases that are split over ranks.

    Args:
        source: The source of the conversion: opened, or anything that ``open_checkpoint`` accepts.
        target: The result of the conversion, opened or not.
        optimizer: Also compare the optimizer states of two GPT-NeoX checkpoints.
        workers: Threads.
        progress: Called with the number of bytes just compared.

    Raises:
        UsageError: ``optimizer`` is set for a Hugging Face model.
        BridgeError: A checkpoint is missing or damaged.
    """
    comparison = comparison_of(_opened(source), _opened(target), optimizer=optimizer)
    return verify_comparison(comparison, progress, workers=workers)


def diff(
    first: str | Checkpoint,
    second: str | Checkpoint,
    *,
    pattern: str = "*",
    workers: int | None = None,
    progress: Progress | None = None,
) -> "list[Difference]":
    """Compare two checkpoints tensor by tensor, in any formats and layouts.

    Args:
        first: A checkpoint: opened, or anything that ``open_checkpoint`` accepts.
        second: The other one.
        pattern: Compare only tensors whose Hugging Face names match this glob.
        workers: Threads.
        progress: Called with the number of bytes just compared.

    Returns:
        One entry per tensor of either side, including equal ones, largest relative difference
        first.

    Raises:
        BridgeError: A checkpoint is missing or damaged.
    """
    from neox_bridge.verification.diff import diff as compare

    return compare(
        _opened(first), _opened(second), pattern=pattern, workers=workers, progress=progress
    )


def diagnose(checkpoint: str | Checkpoint, target: str | None = None) -> "list[Finding]":
    """Diagnose a checkpoint: what wrote it, what is wrong with it, and whether a target loads it.

    Args:
        checkpoint: An opened checkpoint, or what ``open_checkpoint`` opens.
        target: What ``--for`` names, such as ``neox@2024-03`` or ``transformers@4.48``; by default
            the framework and version that the checkpoint fits best.

    Returns:
        Findings. A finding of severity "error" means that the checkpoint does not load, or loads as
        a different model.

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
    """Compare all checkpoints of training runs with each other, and report broken ones.

    Args:
        folders: Folders or URLs of runs, of suites of runs, or models on the Hub.
        steps: Which steps, such as ``0-1000`` or ``1,2,4``; see ``neox-bridge audit --help``.
        configs: The yml files of training runs whose GPT-NeoX checkpoints contain none.
        same_init: Report runs of the same shape whose initial weights differ.
        optimizer: Also audit the optimizer states.
        cache: A folder that caches fingerprints of unchanged files; None for no cache.
        workers: Threads.
        progress: Called with the number of bytes just read.

    Raises:
        BridgeError: The folders contain no checkpoint.
        UsageError: ``steps`` is malformed or matches no step.
    """
    from neox_bridge.verification.audit import audit as compare
    from neox_bridge.verification.opened import open_places
    from neox_bridge.verification.runs import known_runs
    from neox_bridge.verification.step_choice import check_ranges, check_steps, with_steps

    check_steps(steps)
    sources = tuple(folders)
    runs, faults = known_runs(sources)
    check_ranges(steps, runs)
    result = compare(
        open_places([with_steps(run, steps) for run in runs], configs),
        faults=faults,
        same_init=same_init,
        optimizer=optimizer,
        cache=cache,
        workers=workers,
        progress=progress,
    )
    return replace(result, sources=sources)


def _opened(checkpoint: str | Checkpoint, gqa_order: GqaOrder | None = None) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return open_checkpoint(checkpoint, gqa_order=gqa_order)
