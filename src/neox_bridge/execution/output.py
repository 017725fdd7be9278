"""The files of a plan: made, hashed, flushed, entered in the journal; then the records, sealed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import HashName, hash_file, hasher
from neox_bridge.execution.journal import Written, append
from neox_bridge.execution.movers import move, write
from neox_bridge.execution.pool import Task, followed, run_all
from neox_bridge.execution.tensors import fill_tensor, write_tensor
from neox_bridge.execution.work import Work
from neox_bridge.layouts.seal import sealed
from neox_bridge.planning.pieces import OutputFile, Plan

SMALL = 1 << 20  # bytes of a file that is put together in memory
_FLUSH = 1 << 17  # what a flush counts for, in bytes, where tasks are put together


@dataclass(frozen=True, slots=True)
class Job:
    """done: the finished files by path; those of an earlier run at first, all in the end."""

    plan: Plan
    work: Work
    context: Context
    done: dict[str, Written]
    hash_name: HashName | None
    hash_shared: bool


def run_files(job: Job, workers: int) -> None:
    """File after file, the largest first, and so within each: no thread is left with a large one.

    A file is flushed as soon as it is whole, while others are still written; small ones at the end,
    since each flush of a new file costs a commit of the file system's journal.
    """
    work, context = job.work, job.context
    for folder in sorted({os.path.dirname(file.path) for file in job.plan.files}):
        os.makedirs(os.path.join(work.files, folder), exist_ok=True)
    tasks: list[Task] = []
    flushes: list[Task] = []
    for file in sorted(job.plan.files, key=lambda file: -file.size):
        if file.seals:
            continue
        if file.path in job.done:
            context.wrote(file.size, "kept")
        elif file.size <= SMALL and file.copy_of is None:
            hashes: list[str | None] = []
            tasks.append((file.size, partial(_small, job, file, hashes)))
            flushes.append((_FLUSH, partial(_flush, job, file, hashes)))
        else:
            tasks += followed(_large(job, file), partial(_finish, job, file))
    run_all(tasks, workers, context)
    run_all(flushes, workers, context)


def seal_records(job: Job, plan: str) -> None:
    """Write ``neox_bridge.json``, last, since it says what the others are. plan: its hash."""
    for file in job.plan.files:
        if not file.seals:
            continue
        folder = os.path.dirname(file.path)
        found = {
            os.path.relpath(path, folder or ".").replace(os.sep, "/"): [w.size, w.hash]
            for path, w in job.done.items()
        }
        data = sealed(file.literals[0][1], plan, job.hash_name or "none", found)
        with _new(_path(job, file)) as fd:
            write(fd, data, 0)
            os.fsync(fd)
        job.context.wrote(file.size, "copied")


def _path(job: Job, file: OutputFile) -> str:
    return os.path.join(job.work.files, file.path)


def _large(job: Job, file: OutputFile) -> list[Task]:
    """The file at its size, with its literal bytes; and a task for each of its tensors."""
    path, context = _path(job, file), job.context
    with _new(path) as fd:
        os.ftruncate(fd, file.size)
        for offset, data in file.literals:
            write(fd, data, offset)
    context.wrote(sum(len(data) for _, data in file.literals), "copied")
    its: list[Task] = [(t.nbytes, partial(write_tensor, t, path, context)) for t in file.tensors]
    if file.copy_of is not None:
        its.append((file.size, partial(_copy, file.copy_of, file.size, path, context)))
    return sorted(its, key=lambda task: -task[0])


def _small(job: Job, file: OutputFile, hashes: list[str | None]) -> None:
    """All of a file at once: put together in memory, written in one call."""
    job.context.check()
    data = memoryview(bytearray(file.size))
    for offset, literal in file.literals:
        write(data, literal, offset)
    job.context.wrote(sum(len(literal) for _, literal in file.literals), "copied")
    for tensor in file.tensors:
        fill_tensor(tensor, data, job.context)
    found = None
    if job.hash_name is not None:
        state = hasher(job.hash_name)
        state.update(data)
        found = state.hexdigest()
    hashes.append(found)
    with _new(_path(job, file)) as fd:
        write(fd, data, 0)


def _copy(source: str, size: int, path: str, context: Context) -> None:
    with context.files.writing(path) as fd:
        move(source, 0, fd, 0, size, context, None)


def _finish(job: Job, file: OutputFile) -> None:
    """Read a file that tensors were written to in any order, while it is still in memory."""
    path, context = _path(job, file), job.context
    status = os.stat(path)
    shared = (status.st_dev, status.st_ino) in context.cloned
    if job.hash_name is None or (shared and not job.hash_shared):
        _flush(job, file, [None])
    else:
        _flush(job, file, [hash_file(path, job.hash_name, context.check)])


def _flush(job: Job, file: OutputFile, hashes: list[str | None]) -> None:
    job.context.check()
    with job.context.files.writing(_path(job, file)) as fd:
        os.fsync(fd)
    written = Written(file.size, hashes[0])
    append(job.work, file.path, written)
    job.done[file.path] = written


@contextmanager
def _new(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
