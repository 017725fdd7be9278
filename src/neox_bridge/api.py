"""The public verbs: they compose opening, planning, execution and verification."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neox_bridge.conversion import (
    comparison_of,
    conversion_check,
    diff_sides,
    diff_tensors,
    open_checkpoint,
    plan,
    plan_conversion,
    verify_comparison,
)
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.open_stored import open_any
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.planning.option_checks import check_outside
from neox_bridge.planning.options import Options, with_choices
from neox_bridge.planning.plan import Plan
from neox_bridge.progress import Begin, Count, Phase, Progress, phases_of
from neox_bridge.tensors.fused import GqaOrder

if TYPE_CHECKING:
    from neox_bridge.batches.row import BatchResult
    from neox_bridge.doctor.examination import Examination
    from neox_bridge.execution.result import Result
    from neox_bridge.hub.publish import Published
    from neox_bridge.layouts.record_file import HashName
    from neox_bridge.optimizer.options import Resharding
    from neox_bridge.verification.audit import Audit
    from neox_bridge.verification.diff import Diff
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
    "publish",
    "reshard",
    "verify",
]
Listener = Callable[[Progress], None]
_DEFAULTS = Options()


def execute(
    plan: Plan,
    target: str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    workers: int | None = None,
    hash_name: "HashName | None" = "xxh3_128",
    progress: Listener | None = None,
) -> "Result":
    """Execute a plan atomically, and compare the result with the source.

    If a run is killed, execute the same plan again to resume it.

    Examples:
        >>> from neox_bridge import Options, execute, open_checkpoint, plan
        >>> conversion = plan(open_checkpoint("pythia-410m"), Options(tp=2), "executed")
        >>> execute(conversion, "executed").verified
        True

    Args:
        plan: What ``plan`` returned.
        target: The folder or URL to write.
        overwrite: Replace an existing target, if it is a checkpoint or output of this package.
        verify: Read the result back and compare it with the source before it appears at ``target``.
        workers: Number of threads. Default: the number of cores plus one, at most 5.
        hash_name: The hash of each file in ``neox_bridge.json``; None for none.
        progress: Called with a ``Progress`` whenever bytes were done, by any thread.

    Raises:
        Unverified: The result differs from the source. It is kept for inspection.
        BridgeError: The target exists, the disk is full, or the source is damaged or changed.
    """
    from neox_bridge.execution.execute import execute as write

    if plan.checkpoint is not None:
        check_outside([plan.checkpoint.source], target)
    with _phases(progress) as (count, begin):
        check = None
        if verify and plan.checkpoint is not None:
            check = conversion_check(plan, count, workers=workers)
        return write(
            plan,
            target,
            overwrite=overwrite,
            workers=workers,
            hash_name=hash_name,
            progress=count,
            phase=begin,
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
    progress: Listener | None = None,
    **choices: Any,
) -> "Result":
    """Convert a checkpoint between Hugging Face and GPT-NeoX, or between GPT-NeoX layouts.

    Examples:
        >>> import neox_bridge
        >>> result = neox_bridge.convert("pythia-410m", "pythia-neox", tp=2)
        >>> result.verified, result.target
        (True, 'pythia-neox')
        >>> result.to_json()["target"]["tensor_parallel"]
        2

        With progress, which is told of each phase:

        >>> seen = []
        >>> result = neox_bridge.convert("pythia-neox", "pythia-hf", progress=seen.append)
        >>> list(dict.fromkeys(progress.phase for progress in seen))
        ['writing', 'verifying']

    Args:
        source: An opened checkpoint, or what ``open_checkpoint`` opens.
        target: The folder or URL to write.
        options: What to write, and how; by default the other format, in the source's dtype.
        overwrite: See ``execute``, as for the other arguments.
        verify: Read the result back and compare it with the source.
        workers: Threads.
        hash_name: The hash of each file in ``neox_bridge.json``; None for none.
        progress: Called with a ``Progress`` whenever bytes were done, by any thread.
        choices: Fields of ``options`` by name, such as ``tp=2`` or ``dtype="bfloat16"``.

    Raises:
        Refused: The target cannot express the source; the message has every reason.
        UsageError: Options that do not apply to this conversion, or contradict each other.
        BridgeError: See ``open_checkpoint`` and ``execute``.
    """
    options = with_choices(options, choices)
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
    progress: Listener | None = None,
    **choices: Any,
) -> "BatchResult":
    """Convert many checkpoints. Those that are already converted and still intact are skipped.

    Each checkpoint is written to ``target/stepN`` (``target/RUN/stepN`` for several runs)
    atomically. A checkpoint that fails is retried, and the others continue. The work runs in
    processes, so a script that calls this needs ``if __name__ == "__main__":``.

    Examples:
        >>> import neox_bridge
        >>> result = neox_bridge.batch("steps", "converted", tp=2, workers=1)
        >>> [(row.name, row.status) for row in result.rows], result.holds
        ([('step0', 'done'), ('step1000', 'done')], True)

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
        progress: Called with a ``Progress`` whenever bytes were done, by any thread.
        choices: Fields of ``options`` by name, such as ``tp=2`` or ``dtype="bfloat16"``.

    Returns:
        One row per checkpoint. The row of a failed checkpoint contains its error.

    Raises:
        UsageError: ``steps`` matches no step, or an option does not apply to the first checkpoint
            of a run.
        BridgeError: No source contains a checkpoint, or two would get the same name in the target.
    """
    from contextlib import closing

    from neox_bridge.batches.items import check_first, check_places, find_items
    from neox_bridge.batches.on_hub import hub_model
    from neox_bridge.batches.row import BatchResult
    from neox_bridge.batches.run import Batch, Event, run_batch
    from neox_bridge.execution.executors import Processes, default_slots

    options = with_choices(options, choices)
    named = (sources,) if isinstance(sources, str) else tuple(sources)
    hub = hub_model(target, private=private)
    items, findings = find_items(
        named,
        steps,
        configs=configs,
        gqa_order=options.gqa_order,
        masters=masters,
    )
    check_places(named, target, hub)
    check_first(items, options)
    phases = phases_of(progress)

    def tell(event: Event) -> None:
        if phases is not None and event.kind == "written":
            phases.count(event.size)

    if phases is not None:
        phases.begin("writing", None)  # they are planned one after the other
    settings = Batch(
        target,
        options,
        overwrite=overwrite,
        verify=verify,
        retries=retries,
        hash_name=hash_name,
        hub=hub,
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
    progress: Listener | None = None,
    **choices: Any,
) -> "Result":
    """Move a GPT-NeoX run, optimizer included, to other ranks or another GPT-NeoX version.

    Examples:
        >>> import neox_bridge
        >>> neox_bridge.reshard("run", "run-dp1", dp=1).verified
        True

    Args:
        source: An opened checkpoint of a run, or anything that ``open_checkpoint`` accepts.
        target: The folder to write to. To resume training, use its ``resume.yml``.
        options: The ranks, ZeRO stage and era; by default those of the source.
        overwrite: Replace an existing target, if it is a checkpoint or output of this package.
        verify: Read weights and states back and compare them with the source.
        workers: Threads.
        progress: Called with a ``Progress`` whenever bytes were done, by any thread.
        choices: Fields of ``options`` by name, such as ``dp=4``.

    Raises:
        Refused: The model or the batch does not fit these ranks.
        BridgeError: The source has no optimizer states, or see ``execute``.
    """
    from neox_bridge.conversion import plan_resharding
    from neox_bridge.execution.execute import execute as write
    from neox_bridge.optimizer.options import Resharding

    checkpoint = _opened(source)
    check_outside([checkpoint.source], target)
    options = with_choices(options or Resharding(), choices)
    resharded, make_check = plan_resharding(checkpoint, options, target, workers=workers)
    with _phases(progress) as (count, begin):
        result = write(
            resharded,
            target,
            overwrite=overwrite,
            workers=workers,
            progress=count,
            phase=begin,
            check=make_check(count) if verify else None,
        )
    return replace(result, source=checkpoint.source)


def publish(
    folder: str,
    target: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    message: str | None = None,
) -> "Published":
    """Publish a converted folder on the Hugging Face Hub, as one commit.

    Files that the branch already holds are not sent. If the call is interrupted, repeat it.

    Examples:
        >>> import neox_bridge
        >>> published = neox_bridge.publish(
        ...     "pythia-hf", "hf://my-org/pythia@step3000", private=True
        ... )  # doctest: +SKIP
        >>> published.url  # doctest: +SKIP
        'https://huggingface.co/my-org/pythia/tree/step3000'

    Args:
        folder: A Hugging Face model, or a GPT-NeoX run: the step that its ``latest`` names is added
            beside the steps of the branch.
        target: ``hf://ORG/NAME`` or ``hf://ORG/NAME@BRANCH``.
        private: Create the repository as private. An existing public one is refused.
        create_pr: Open a pull request to the branch, which must exist, instead of committing.
        overwrite: Replace files that differ, and delete files that are not in the folder.
        message: The title of the commit.

    Raises:
        BridgeError: The Hub refuses or cannot be reached, the branch holds other weights, or
            somebody else commits in the meantime. The branch is unchanged.
    """
    import os

    from neox_bridge.hub.publish import publish as commit
    from neox_bridge.layouts.text_files import read_text
    from neox_bridge.stores.hub_names import hub_target
    from neox_bridge.stores.paths import isfile

    place = hub_target(target)
    latest = os.path.join(folder, "latest")
    return commit(
        folder,
        place.repo,
        place.branch,
        private=private,
        create_pr=create_pr,
        overwrite=overwrite,
        message=message,
        step=read_text(latest).strip() if isfile(latest) else None,
    )


def verify(
    source: str | Checkpoint,
    target: str | Checkpoint,
    *,
    optimizer: bool = False,
    workers: int | None = None,
    progress: Listener | None = None,
) -> "Verification":
    """Compare a converted checkpoint with its source: every tensor bit by bit, and the config.

    Changes that the conversion declares do not count as differences: a cast, rows of padding,
    biases that are split over ranks. Two Hugging Face repositories, of which at least one is of no
    known family, are compared by name, shape, dtype and bits.

    Examples:
        >>> import neox_bridge
        >>> verification = neox_bridge.verify("pythia-410m", "pythia-neox")
        >>> verification.holds, verification.verdict
        (True, 'equal, bit by bit')

    Args:
        source: The source of the conversion: opened, or anything that ``open_checkpoint`` accepts.
        target: The result of the conversion, opened or not.
        optimizer: Also compare the optimizer states of two GPT-NeoX checkpoints.
        workers: Threads.
        progress: Called with a ``Progress`` whenever bytes were done, by any thread.

    Raises:
        UsageError: ``optimizer`` is set for a Hugging Face model.
        Refused: One side is a GPT-NeoX checkpoint, and the other one is of no known family.
        BridgeError: A checkpoint is missing or damaged.
    """
    comparison = comparison_of(_opened_any(source), _opened_any(target), optimizer=optimizer)
    with _counting(progress, "verifying", comparison.target.size) as count:
        return verify_comparison(comparison, count, workers=workers)


def diff(
    first: str | Checkpoint,
    second: str | Checkpoint,
    *,
    pattern: str = "*",
    workers: int | None = None,
    progress: Listener | None = None,
) -> "Diff":
    """Compare two checkpoints tensor by tensor, in any formats and layouts.

    Two Hugging Face repositories, of which at least one is of no known family, are compared by
    name, shape, dtype and bits.

    Examples:
        >>> import neox_bridge
        >>> result = neox_bridge.diff("pythia-410m", "pythia-neox", pattern="*.bias")
        >>> result.equal, {tensor.kind for tensor in result.tensors}
        (True, {'equal'})

    Args:
        first: A checkpoint: opened, or anything that ``open_checkpoint`` accepts.
        second: The other one.
        pattern: Compare only tensors whose Hugging Face names match this glob.
        workers: Threads.
        progress: Called with a ``Progress`` whenever bytes were done, by any thread.

    Returns:
        A ``Diff``. Its ``tensors`` have one entry per tensor of either side, including equal ones,
        largest relative difference first.

    Raises:
        Refused: One side is a GPT-NeoX checkpoint, and the other one is of no known family.
        BridgeError: A checkpoint is missing or damaged.
    """
    a, b = diff_sides(_opened_any(first), _opened_any(second))
    with _counting(progress, "comparing", a.size + b.size) as count:
        return diff_tensors(a, b, count, pattern=pattern, workers=workers)


def diagnose(checkpoint: str | Checkpoint, target: str | None = None) -> "Examination":
    """Diagnose a checkpoint: what wrote it, what is wrong with it, and whether a target loads it.

    A Hugging Face repository of any family is diagnosed by its files and settings, also if some are
    damaged or missing.

    Examples:
        >>> import neox_bridge
        >>> neox_bridge.diagnose("pythia-neox", "today").loads
        True

    Args:
        checkpoint: An opened checkpoint, or what ``open_checkpoint`` opens.
        target: What ``--for`` names, such as ``neox@2024-03`` or ``transformers@4.48``; by default
            every known version.

    Returns:
        What is known, with ``findings`` and ``loads``. A finding of severity "error" means that the
        checkpoint does not load, or loads as a different model. ``error`` is what the other
        functions raise for a repository with damaged or missing files.

    Raises:
        BridgeError: The checkpoint cannot be opened, or there is no such target.
    """
    from neox_bridge.doctor.examination import examine, examine_path
    from neox_bridge.frameworks.targets import target_named

    wanted = target_named(target) if target is not None else None
    if isinstance(checkpoint, str):
        return examine_path(checkpoint, open_checkpoint, wanted)
    return examine(checkpoint, wanted)


def audit(
    folders: Iterable[str],
    *,
    steps: str = "all",
    configs: Sequence[str] = (),
    same_init: bool = False,
    optimizer: bool = False,
    blobs: bool = False,
    cache: str | None = None,
    workers: int | None = None,
    progress: Listener | None = None,
) -> "Audit":
    """Compare all checkpoints of training runs with each other, and report broken ones.

    Examples:
        >>> import neox_bridge
        >>> result = neox_bridge.audit(["run"])
        >>> len(result.steps), result.holds
        (1, True)

    Args:
        folders: Folders or URLs of runs, of suites of runs, or models on the Hub.
        steps: Which steps, such as ``0-1000`` or ``1,2,4``; see ``neox-bridge audit --help``.
        configs: The yml files of training runs whose GPT-NeoX checkpoints contain none.
        same_init: Report runs of the same shape whose initial weights differ.
        optimizer: Also audit the optimizer states.
        blobs: Read every file of a model in the Hugging Face cache once more, to compare it with
            the hash in its name.
        cache: A folder that caches fingerprints of unchanged files; None for no cache.
        workers: Threads.
        progress: Called with a ``Progress`` whenever bytes were done, by any thread.

    Raises:
        BridgeError: The folders contain no checkpoint.
        UsageError: ``steps`` is malformed or matches no step.
    """
    from neox_bridge.verification.audit import audit as compare
    from neox_bridge.verification.audit_blobs import blob_bytes
    from neox_bridge.verification.opened import open_places
    from neox_bridge.verification.runs import known_runs
    from neox_bridge.verification.step_choice import check_ranges, check_steps, with_steps

    check_steps(steps)
    sources = tuple(folders)
    runs, faults = known_runs(sources)
    check_ranges(steps, runs)
    opened = open_places([with_steps(run, steps) for run in runs], configs)
    size = sum(place.size + (place.states if optimizer else 0) for place in opened)
    size += blob_bytes(opened) if blobs else 0
    with _counting(progress, "reading", size) as count:
        result = compare(
            opened,
            faults=faults,
            same_init=same_init,
            optimizer=optimizer,
            blobs=blobs,
            cache=cache,
            workers=workers,
            progress=count,
        )
    return replace(result, sources=sources)


@contextmanager
def _phases(listener: Listener | None) -> Iterator[tuple[Count | None, Begin | None]]:
    """What counts bytes and begins phases, for a listener; both are None without one."""
    phases = phases_of(listener)
    if phases is None:
        yield None, None
    else:
        yield phases.count, phases.begin
        phases.end()


@contextmanager
def _counting(listener: Listener | None, phase: Phase, total: int) -> Iterator[Count | None]:
    """What counts the bytes of a call that is one phase."""
    with _phases(listener) as (count, begin):
        if begin is not None:
            begin(phase, total)
        yield count


def _opened(checkpoint: str | Checkpoint, gqa_order: GqaOrder | None = None) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return open_checkpoint(checkpoint, gqa_order=gqa_order)


def _opened_any(checkpoint: str | Checkpoint) -> Checkpoint | StoredModel:
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_any(checkpoint)
