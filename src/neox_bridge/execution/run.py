"""Executes a plan: every file created, every tensor written, all flushed, one rename."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context
from neox_bridge.execution.files import check_same, identities
from neox_bridge.execution.movers import move, write
from neox_bridge.execution.pool import Task, followed, run_all
from neox_bridge.execution.result import Result
from neox_bridge.execution.staging import check_target, flush_folders, staged
from neox_bridge.execution.tensors import fill_tensor, write_tensor
from neox_bridge.findings import Finding
from neox_bridge.planning.coverage import check_plan
from neox_bridge.planning.pieces import OutputFile, Plan

SMALL = 1 << 20  # bytes of a file that is put together in memory
_FLUSH = 1 << 17  # what a flush counts for, in bytes, where tasks are put together


def execute(
    plan: Plan,
    target: str,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    every_crc: bool = False,
    progress: Callable[[int], None] | None = None,
    check: Callable[[str], None] | None = None,
) -> Result:
    """Write what the plan says into the folder ``target``, whole or not at all.

    workers: threads. every_crc: read also what the kernel moves, for the CRC-32 of every tensor in
        a ``.pt`` file; else that of a tensor that this process didn't see stays 0.
    progress: called, one thread at a time, with the bytes just written.
    check: called with the finished folder before it gets its name; where it raises Unverified, the
        folder is kept as ``target`` + ".unverified" for inspection.
    Raises BridgeError where the target exists, there is no space, or a source is damaged or
    changes; then and on KeyboardInterrupt nothing is left behind and nothing was replaced.
    """
    begin = time.perf_counter()
    check_plan(plan)
    sources = _sources(plan)
    check_target(target, sources, plan.size, overwrite)
    before = identities(sources)
    _check_copies(plan, before)
    context = Context(progress, every_crc=every_crc)
    with staged(target, plan.size, overwrite) as folder:
        # room for a journal: files that an earlier run finished need no task
        try:
            _run(plan, folder, workers or min(4, os.cpu_count() or 1), context)
        finally:
            context.files.close()
        flush_folders(folder)
        check_same(before)
        if check is not None:
            check(folder)
    return Result(
        target,
        len(plan.files),
        plan.size,
        context.written["shared"],
        context.written["copied"],
        context.written["transformed"],
        time.perf_counter() - begin,
        tuple(_findings(context)),
    )


def _sources(plan: Plan) -> list[str]:
    found = {file.copy_of for file in plan.files if file.copy_of is not None}
    for file in plan.files:
        for tensor in file.tensors:
            found |= {piece.source.file for piece in tensor.pieces if piece.source is not None}
    return sorted(found)


def _check_copies(plan: Plan, before: dict[str, tuple[int, int]]) -> None:
    for file in plan.files:
        if file.copy_of is not None and before[file.copy_of][0] != file.size:
            raise BridgeError(
                f"{file.copy_of} changed since the plan was made: it had {file.size:,} bytes and "
                f"has {before[file.copy_of][0]:,}. Convert again."
            )


def _run(plan: Plan, folder: str, workers: int, context: Context) -> None:
    """File after file, the largest first, and so within each: no thread is left with a large one.

    A file is flushed as soon as it is whole, while others are still written; small ones at the end,
    since each flush of a new file costs a commit of the file system's journal.
    """
    for path in sorted({os.path.dirname(os.path.join(folder, file.path)) for file in plan.files}):
        os.makedirs(path, exist_ok=True)
    tasks: list[Task] = []
    flushes: list[Task] = []
    for file in sorted(plan.files, key=lambda file: -file.size):
        path = os.path.join(folder, file.path)
        if file.size <= SMALL and file.copy_of is None:
            tasks.append((file.size, partial(_small, file, path, context)))
            flushes.append((_FLUSH, partial(_flush, path, context)))
            continue
        _create(path, file)
        context.wrote(_literals(file), "copied")
        its: list[Task] = [
            (t.nbytes, partial(write_tensor, t, path, context)) for t in file.tensors
        ]
        if file.copy_of is not None:
            its.append((file.size, partial(_copy, file.copy_of, file.size, path, context)))
        its.sort(key=lambda task: -task[0])
        tasks += followed(its, partial(_flush, path, context))
    run_all(tasks, workers, context)
    run_all(flushes, workers, context)


def _literals(file: OutputFile) -> int:
    return sum(len(data) for _, data in file.literals)


def _create(path: str, file: OutputFile) -> None:
    """The file at its size, with its literal bytes."""
    with _new(path) as fd:
        os.ftruncate(fd, file.size)
        for offset, data in file.literals:
            write(fd, data, offset)


def _small(file: OutputFile, path: str, context: Context) -> None:
    """All of a file at once: put together in memory, written in one call."""
    context.check()
    data = memoryview(bytearray(file.size))
    for offset, literal in file.literals:
        write(data, literal, offset)
    context.wrote(_literals(file), "copied")
    for tensor in file.tensors:
        fill_tensor(tensor, data, context)
    with _new(path) as fd:
        write(fd, data, 0)


@contextmanager
def _new(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _copy(source: str, size: int, path: str, context: Context) -> None:
    with context.files.writing(path) as fd:
        move(source, 0, fd, 0, size, context, None)


def _flush(path: str, context: Context) -> None:
    context.check()
    with context.files.writing(path) as fd:
        os.fsync(fd)


def _findings(context: Context) -> Iterable[Finding]:
    if context.overflows:
        name, _ = min(context.overflows)
        total = sum(count for _, count in context.overflows)
        yield Finding(
            "cast-overflow",
            "warning",
            f"{total} finite values of {len(context.overflows)} tensors became infinite in the "
            f"cast, the first in {name}",
            "choose --dtype bfloat16 or float32",
        )
    if context.deviations:
        name, file, largest = max(context.deviations, key=lambda d: (d[2], d[0]))
        yield Finding(
            "replicas-differ",
            "warning",
            f"{len(context.deviations)} tensors differ between tensor-parallel ranks, by "
            f"{largest:.6g} at most from their mean ({name}, {file}); the mean is written",
            "GPT-NeoX's ranks drift apart a little in long runs; check a larger difference",
        )
