"""Executes a plan: writes, seals and verifies all files, then puts the target in place."""

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.execution.context import Context, Overflow
from neox_bridge.execution.disk import DiskSink
from neox_bridge.execution.files import Identity, check_same, identities
from neox_bridge.execution.journal import Key
from neox_bridge.execution.result import Result
from neox_bridge.execution.sink import Check, Job, Sink
from neox_bridge.findings import Finding
from neox_bridge.layouts.record_file import HashName
from neox_bridge.planning.casts import overflow_finding
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import plan_hash
from neox_bridge.progress import Begin, Count
from neox_bridge.stores.paths import is_local, plain
from neox_bridge.tensors.coverage import check_files
from neox_bridge.wording import plural

if TYPE_CHECKING:
    from neox_bridge.execution.executors import Pool


def execute(
    plan: Plan,
    target: str,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    every_crc: bool = False,
    hash_name: HashName | None = "xxh3_128",
    hash_shared: bool = False,
    progress: Count | None = None,
    phase: Begin | None = None,
    check: Check | None = None,
    pool: "Pool | None" = None,
    in_place: bool = False,
) -> Result:
    """Execute the plan into the folder ``target``, atomically.

    A local folder appears by a rename. A folder in an object store is complete once it contains
    ``neox_bridge.json``, which is written last. If the target is the root of a GPT-NeoX run, the
    step of the plan is added to it. See ``neox_bridge.execute`` for the other arguments.

    Args:
        every_crc: Also read bytes that the kernel could copy, so that every tensor of a ``.pt``
            file has its CRC-32. By default, the CRC-32 of such tensors is 0. Only for local disks;
            in an object store, every tensor has its CRC-32.
        hash_shared: Also hash files that share blocks with the sources, which takes far longer than
            writing them. Only for local disks; in an object store, no file shares blocks.
        progress: Called with the number of bytes just written; see ``phase``.
        phase: Called with the name of a phase that begins, and its bytes: "checking" what an
            earlier run finished, "writing" the rest, "verifying". ``progress`` counts the bytes of
            the first two, and ``check`` those of the last.
        check: Called with the finished folder before it appears at ``target``. If it raises
            Unverified, a local folder is kept as ``target`` + ".unverified", and a folder in an
            object store is kept without its record.
        pool: Writes the files instead of ``workers`` threads of this process. Progress is then
            reported per file.
        in_place: The target contains the sources of the plan and is replaced whatever it contains,
            so the plan must cover all of it. Only for local disks.

    Raises:
        UsageError: An option does not apply to this kind of target. Nothing was written.
        BridgeError: The target exists, another process is writing it, the disk is full, or a source
            is damaged or changes. The target is unchanged then, as on KeyboardInterrupt.
    """
    start = time.perf_counter()
    target = plain(target)
    check_options(target, every_crc=every_crc, hash_shared=hash_shared, in_place=in_place)
    check_files(plan.files)
    sources = identities(sources_of(plan))
    _check_copies(plan, sources)
    key = Key(plan_hash(plan), sources, hash_name)
    if check is None:  # after the key, so that this run can resume one with a check
        from neox_bridge.planning.model_card import without_verification

        plan = without_verification(plan)
    context = Context(progress, phase, every_crc=every_crc)
    sink = _sink_of(Job(plan, target, key, context, overwrite, in_place, hash_shared))
    with sink.opened() as is_published:
        if is_published:
            context.wrote(plan.size, "kept")
        else:
            kept = sum(written.size for written in sink.job.done.values())
            context.begin("writing", plan.size - kept)
            try:
                _write(sink, workers or default_workers(), pool)
            finally:
                context.files.close()
            sink.seal()
            check_same(sources)
            if check is not None:
                context.begin("verifying", plan.size)
            sink.verify(check)
            sink.publish()
        sink.clear()
    written = context.written
    return Result(
        target,
        len(plan.files),
        plan.size,
        written["shared"],
        written["copied"],
        written["transformed"],
        written["kept"],
        time.perf_counter() - start,
        (*_findings(plan, context), *sink.findings),
        source=plan.checkpoint.source if plan.checkpoint is not None else "",
        verified=check is not None,
        plan=plan,
    )


def check_options(
    target: str, *, every_crc: bool = False, hash_shared: bool = False, in_place: bool = False
) -> None:
    """Raise UsageError for options of ``execute`` that do not apply to this kind of target."""
    options = {"every_crc": every_crc, "hash_shared": hash_shared, "in_place": in_place}
    given = [name for name, value in options.items() if value]
    if given and not is_local(plain(target)):
        raise UsageError(
            given,
            f"only for targets on a local disk, and {target} is in an object store",
            "Leave it out.",
        )


def default_workers() -> int:
    """Default number of threads: one more than cores, because one waits for the disk."""
    return 1 + min(4, os.cpu_count() or 1)


def _sink_of(job: Job) -> Sink:
    """Choose the sink for the kind of target."""
    if not is_local(job.target):
        from neox_bridge.execution.object_store import ObjectSink

        return ObjectSink(job)
    return DiskSink(job)


def _write(sink: Sink, workers: int, pool: "Pool | None") -> None:
    """Write all unfinished files, and write again those that the target lost."""
    files = sink.files()
    while True:
        files = sink.job.missing(files)
        if pool is None:
            sink.write(files, workers)
        else:
            from neox_bridge.execution.units import run_units

            run_units(sink, files, pool)
        if not (files := sink.lost()):
            return


def sources_of(plan: Plan) -> list[str]:
    """The files that a plan reads, sorted."""
    files = {file.copy_of for file in plan.files if file.copy_of is not None}
    for file in plan.files:
        for tensor in file.tensors:
            files |= {piece.source.file for piece in tensor.pieces if piece.source is not None}
    return sorted(files)


def _check_copies(plan: Plan, sources: Mapping[str, Identity]) -> None:
    """Raise BridgeError if a file to copy has changed its size since it was planned."""
    for file in plan.files:
        if file.copy_of is not None and sources[file.copy_of][0] != file.size:
            raise BridgeError(
                f"{file.copy_of} changed since the plan was made: it had {file.size:,} bytes and "
                f"has {sources[file.copy_of][0]:,}. Convert again."
            )


def _place_of(plan: Plan, overflow: Overflow) -> str:
    """Describe a tensor with its file, because layer files of GPT-NeoX repeat tensor names."""
    for file in plan.files:
        for tensor in file.tensors:
            sources = (piece.source for piece in tensor.pieces)
            if tensor.name == overflow.tensor and overflow.source in sources:
                return f"{tensor.name} in {file.path}"
    return overflow.tensor


def _findings(plan: Plan, context: Context) -> Iterable[Finding]:
    if context.overflows:
        counts: Counter[str] = Counter()
        for overflow in context.overflows:
            counts[_place_of(plan, overflow)] += overflow.count
        yield overflow_finding(counts)
    if context.roundings:
        name, _ = min(context.roundings)
        total = sum(count for _, count in context.roundings)
        yield Finding(
            "scaled-states-rounded",
            "warning",
            f"{plural(total, 'value')} of {plural(len(context.roundings), 'optimizer state')} "
            "became too small or too large for their dtype when they were scaled, and were "
            f"rounded. The first is in {name}",
            "keep gradient_accumulation_steps with `micro_batch=` to avoid scaling",
        )
    deviations = [d for d in context.deviations if not d[0].endswith(plan.known_deviations)]
    if deviations:
        name, file, largest = max(deviations, key=lambda d: (d[2], d[0]))
        yield Finding(
            "replicas-differ",
            "warning",
            f"the tensor-parallel ranks differ in {plural(len(deviations), 'tensor')}, by "
            f"{largest:.6g} at most from their mean ({name}, {file}); the mean is written",
            "ranks of GPT-NeoX drift apart slightly in long runs; check larger differences",
        )
