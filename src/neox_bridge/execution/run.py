"""Executes a plan: every file created, every tensor written, all flushed, one rename."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context, Overflow
from neox_bridge.execution.digests import HashName
from neox_bridge.execution.files import Identity, check_same, identities
from neox_bridge.execution.flushing import flush_folders
from neox_bridge.execution.install import LATEST, RootFiles, clear, install, settle
from neox_bridge.execution.journal import Key, begun, resume
from neox_bridge.execution.movers import can_share
from neox_bridge.execution.output import Job, run_files, seal_records
from neox_bridge.execution.result import Result
from neox_bridge.execution.staging import (
    check_free,
    check_replaceable,
    check_room,
    check_target,
    left_over,
    replaced_by,
    staged,
)
from neox_bridge.execution.work import Work
from neox_bridge.findings import Finding
from neox_bridge.planning.casts import overflow_finding
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import copied, plan_hash
from neox_bridge.stores.fetched import folder_of, keeping
from neox_bridge.stores.paths import is_url, plain
from neox_bridge.tensors.coverage import check_files

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
    progress: Callable[[int], None] | None = None,
    check: Callable[[str], None] | None = None,
    pool: "Pool | None" = None,
    in_place: bool = False,
) -> Result:
    """Write what the plan says into the folder ``target``, whole or not at all.

    A URL is written as ``remote.execute_remote`` says: whole as soon as its record is there.

    Where that is the root of a GPT-NeoX run the plan's step is added to it. A conversion that was
    killed, interrupted or had no room goes on where it stopped when the same plan is executed
    again; the files that it had finished are read and compared with their hashes.

    workers: threads. every_crc: read also what the kernel moves, for the CRC-32 of every tensor in
        a ``.pt`` file; else that of a tensor that this process didn't see stays 0.
    hash_name: of the files' hashes in ``neox_bridge.json``; None for none. hash_shared: read files
        that share blocks with the sources for theirs too, which takes far longer than to make them.
    progress: called, one thread at a time, with the bytes just written.
    check: called with the finished folder before it gets its name; where it raises Unverified, the
        folder is kept as ``target`` + ".unverified" for inspection.
    in_place: the target is what the plan's sources belong to, and is replaced, whatever it holds:
        the plan has to have all of it.
    pool: makes the files in place of threads of this process; then ``workers`` is without meaning,
        and progress comes by files.
    Raises BridgeError where the target exists, another process writes it, there is no space, or a
    source is damaged or changes; nothing was replaced then, nor on KeyboardInterrupt.
    """
    target = plain(target)
    if is_url(target):
        from neox_bridge.execution.remote import execute_remote

        return execute_remote(plan, target, overwrite, workers, hash_name, progress, check, pool)
    begin = time.perf_counter()
    check_files(plan.files)
    sources = sources_of(plan)
    step = step_of(plan)
    check_target(target, sources, step, in_place=in_place)
    planned = {file.path for file in plan.files}
    if overwrite and not in_place:
        check_replaceable(target, step, planned)
    before = identities(sources)
    check_copies(plan, before)
    context = Context(progress, every_crc=every_crc)
    key = Key(plan_hash(plan), before, hash_name)
    findings: tuple[Finding, ...] = ()
    real = os.path.realpath(target)
    with staged(target, plan.size) as work:
        again = begun(work, key)
        if settle(work, real) and again:  # a killed run had finished all files
            context.wrote(plan.size, "kept")
        else:
            if not (overwrite or in_place):
                check_free(target, step)
            beside = _beside(plan, real, overwrite=overwrite, in_place=in_place)
            done = resume(work, key, {file.path for file in plan.files if not file.seals})
            room = plan.size - sum(written.size for written in done.values())
            check_room(target, room, lambda: _shared(plan, before, work.folder, context))
            sizes = {path: identity[0] for path, identity in before.items()}
            with keeping(folder_of(work.folder, sizes, plan.size), sources):
                job = Job(plan, work, context, done, hash_name, hash_shared)
                try:
                    if pool is not None:
                        from neox_bridge.execution.units import run_units

                        run_units(job, pool)
                    else:  # one waits for the disk
                        run_files(job, workers or 1 + min(4, os.cpu_count() or 1))
                finally:
                    context.files.close()
                seal_records(job, key.plan, before)
                flush_folders(work.files)
                check_same(before)
                if check is not None:
                    check(work.files)
            if beside is not None:
                beside = _beside(plan, real, overwrite=True, in_place=in_place)
            if overwrite and not in_place:  # what came meanwhile
                check_replaceable(target, step, planned)
            if beside is not None:
                _arrange(work, beside)
                findings = beside.findings
            install(work, real, beside, replace=overwrite or in_place)
        if reason := clear(work):
            findings += (left_over(work.folder, reason),)
    result = result_of(plan, target, context, begin)
    return replace(result, findings=(*result.findings, *findings))


def step_of(plan: Plan) -> str | None:
    """The folder of a GPT-NeoX plan that is added to a run."""
    step = plan.target.get("step")
    return step if isinstance(step, str) else None


def _beside(plan: Plan, real: str, *, overwrite: bool, in_place: bool) -> RootFiles | None:
    """What is put beside the step where the target is a run already; None where it isn't."""
    step = step_of(plan)
    if step is None or replaced_by(real, step) == real:
        return None
    if in_place:
        return RootFiles(step)
    from neox_bridge.execution.run_root import root_files

    return root_files(plan, real, step, overwrite=overwrite)


def _arrange(work: Work, beside: RootFiles) -> None:
    """The finished files of a run's root under the names that they get; others go."""
    for name in os.listdir(work.files):
        if name in (beside.step, *LATEST):
            continue
        path = os.path.join(work.files, name)
        if name not in beside.names:
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        elif beside.names[name] != name:
            os.rename(path, os.path.join(work.files, beside.names[name]))


def result_of(plan: Plan, target: str, context: Context, begin: float) -> Result:
    """What was done since ``begin``, of ``time.perf_counter``."""
    return Result(
        target,
        len(plan.files),
        plan.size,
        context.written["shared"],
        context.written["copied"],
        context.written["transformed"],
        context.written["kept"],
        time.perf_counter() - begin,
        tuple(_findings(plan, context)),
    )


def _shared(plan: Plan, sources: Mapping[str, Identity], folder: str, context: Context) -> int:
    """About how many bytes will share blocks with the sources' files, in a folder on the disk."""
    largest = max(sources, key=lambda path: sources[path][0], default=None)
    if largest is None or is_url(largest) or not can_share(largest, folder, context):
        return 0
    return sum(copied(tensor) for file in plan.files for tensor in file.tensors)


def sources_of(plan: Plan) -> list[str]:
    """The files that a plan reads, sorted."""
    found = {file.copy_of for file in plan.files if file.copy_of is not None}
    for file in plan.files:
        for tensor in file.tensors:
            found |= {piece.source.file for piece in tensor.pieces if piece.source is not None}
    return sorted(found)


def _place_of(plan: Plan, overflow: Overflow) -> str:
    """A tensor with its file, since each of GPT-NeoX's layers calls its own by the same names."""
    for file in plan.files:
        for tensor in file.tensors:
            sources = (piece.source for piece in tensor.pieces)
            if tensor.name == overflow.tensor and overflow.source in sources:
                return f"{tensor.name} in {file.path}"
    return overflow.tensor


def check_copies(plan: Plan, before: dict[str, Identity]) -> None:
    """Raise BridgeError where a file that is copied has another size than it had."""
    for file in plan.files:
        if file.copy_of is not None and before[file.copy_of][0] != file.size:
            raise BridgeError(
                f"{file.copy_of} changed since the plan was made: it had {file.size:,} bytes and "
                f"has {before[file.copy_of][0]:,}. Convert again."
            )


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
            f"{total} values of {len(context.roundings)} optimizer states became too small or too "
            f"large for their dtype as they were scaled, the first in {name}: they are rounded",
            "keep gradient_accumulation_steps with --micro-batch to avoid the scaling",
        )
    deviations = [d for d in context.deviations if not d[0].endswith(plan.known_deviations)]
    if deviations:
        name, file, largest = max(deviations, key=lambda d: (d[2], d[0]))
        yield Finding(
            "replicas-differ",
            "warning",
            f"{len(deviations)} tensors differ between tensor-parallel ranks, by "
            f"{largest:.6g} at most from their mean ({name}, {file}); the mean is written",
            "GPT-NeoX's ranks drift apart a little in long runs; check a larger difference",
        )
