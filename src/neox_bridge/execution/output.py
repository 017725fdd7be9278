"""The files of a plan: made, hashed, flushed, entered in the journal; then the records, sealed."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import HashName, hash_bytes, hash_file
from neox_bridge.execution.files import Identity
from neox_bridge.execution.journal import Written, append
from neox_bridge.execution.movers import SEND, move, send, write
from neox_bridge.execution.pool import Task, followed, run_all
from neox_bridge.execution.reserving import reserve
from neox_bridge.execution.tensors import fill_tensor, write_tensor
from neox_bridge.execution.trailing_hashes import Trail
from neox_bridge.execution.work import Work
from neox_bridge.layouts.seal import entries, sealed
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

SMALL = 1 << 20  # bytes of a file that is put together in memory
_GROUP = 128 << 20  # bytes that are flushed together
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
    """File after file, the largest first: no thread is left with a large one.

    What is whole is flushed in groups: the first flush of one commits the file system's journal for
    all, where each file alone would wait for a commit of its own (a quarter of the time, measured).
    """
    waiting = Waiting()
    small: list[OutputFile] = []
    tasks: list[Task] = []
    for file in to_make(job):
        if is_small(file):
            small.append(file)
        else:
            path = os.path.join(job.work.files, file.path)
            its, trail = begin_large(file, path, job.context, job.hash_name, job.hash_shared)
            tasks += followed(its, partial(_finish, job, file, trail, waiting))
    if small:  # in one thread: they are Python's work, of which two take turns and longer in all
        size = sum(file.size for file in small)
        tasks.append((size, partial(_small, job, small, waiting)))
    run_all(tasks, workers, job.context)
    rest = waiting.take(0)
    for file, _ in rest:
        begin_flush(os.path.join(job.work.files, file.path), file.size, job.context)
    run_all(
        ((max(f.size, _FLUSH), partial(_flush, job, [(f, h)])) for f, h in rest),
        workers,
        job.context,
    )


@dataclass
class Waiting:
    """Files that are whole and not flushed yet, with their hashes; of all threads."""

    files: list[tuple[OutputFile, str | None]] = field(default_factory=list)
    size: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, file: OutputFile, found: str | None) -> None:
        with self.lock:
            self.files.append((file, found))
            self.size += file.size

    def take(self, least: int) -> list[tuple[OutputFile, str | None]]:
        """All that wait, the largest first, where they have so many bytes; else none."""
        with self.lock:
            if self.size < least:
                return []
            found, self.files, self.size = self.files, [], 0
        return sorted(found, key=lambda entry: -entry[0].size)


def to_make(job: Job) -> list[OutputFile]:
    """The files that aren't there yet, the largest first, but for the records; their folders are.

    Those of an earlier run are counted.
    """
    for folder in sorted({os.path.dirname(file.path) for file in job.plan.files}):
        os.makedirs(os.path.join(job.work.files, folder), exist_ok=True)
    found = []
    for file in sorted(job.plan.files, key=lambda file: -file.size):
        if file.path in job.done:
            job.context.wrote(file.size, "kept")
        elif not file.seals:
            found.append(file)
    return found


def enter(job: Job, files: Sequence[tuple[str, Written]]) -> None:
    """Files are on the disk: so says the journal from now on."""
    append(job.work, files)
    job.done.update(files)


def seal_records(job: Job, plan: str, sources: Mapping[str, Identity]) -> None:
    """Write ``neox_bridge.json``, last, since it says what the others are. Others: ``records``."""

    def place(path: str) -> str:
        return os.path.join(job.work.files, path)

    for file, data in records(job.plan, job.done, job.hash_name, plan, sources, place):
        with _new(os.path.join(job.work.files, file.path)) as fd:
            write(fd, data, 0)
            os.fsync(fd)
        job.context.wrote(file.size, "copied")


def records(
    plan: Plan,
    done: Mapping[str, Written],
    hash_name: HashName | None,
    plan_key: str,
    sources: Mapping[str, Identity],
    place: Callable[[str], str],
) -> Iterator[tuple[OutputFile, bytes]]:
    """The files that say what the others, ``done``, are, with their bytes.

    plan_key: the plan's hash. sources: the identity of each file that was read. place: where a
    finished file of the plan lies now.
    """
    for file in plan.files:
        if file.seals:
            folder = os.path.dirname(file.path)
            told = dict(done)
            for path, written in done.items():
                # what is beside a step can be replaced later only where it is proved to be ours
                if folder and not path.startswith(f"{folder}/") and written.hash is None:
                    digest = hash_file(place(path), hash_name or "xxh3_128")
                    told[path] = Written(written.size, digest)
            data = sealed(
                file.literals[0][1],
                hash_name or "none",
                entries(folder, told),
                plan=plan_key,
                asked=plan.asked,
                sources=sources_told(sources),
            )
            yield file, data


def sources_told(sources: Mapping[str, Identity]) -> list[list[object]]:
    """Name, size and time of each source, as a record keeps them: whatever folder they lie in."""
    return [
        list(facts)
        for facts in sorted((os.path.basename(path), *facts) for path, facts in sources.items())
    ]


def is_small(file: OutputFile) -> bool:
    """Whether a file is put together in memory."""
    return file.size <= SMALL and file.copy_of is None


def begin_large(
    file: OutputFile, path: str, context: Context, hash_name: HashName | None, shared: bool
) -> tuple[list[Task], Trail]:
    """The file at its size, with its literal bytes; a task for each of its tensors; and its hash.

    In the file's order, so that the hash can follow. shared: see ``Trail``.
    """
    with _new(path) as fd:
        os.ftruncate(fd, file.size)
        reserve(fd, path, file, context)
        for offset, data in file.literals:
            write(fd, data, offset)
    context.wrote(sum(len(data) for _, data in file.literals), "copied")
    trail = Trail(file, path, context, hash_name, shared)
    its: list[Task] = [
        (tensor.nbytes, partial(_write, tensor, path, context, trail, number))
        for number, tensor in enumerate(trail.tensors)
    ]
    if file.copy_of is not None:
        its.append((file.size, partial(_copy, file.copy_of, file.size, path, context)))
    return its, trail


def _write(tensor: OutputTensor, path: str, context: Context, trail: Trail, number: int) -> None:
    write_tensor(tensor, path, context)
    trail.written(number)


def write_small(
    file: OutputFile, path: str, context: Context, hash_name: HashName | None
) -> str | None:
    """All of a file at once: put together in memory, written in one call. Returns its hash."""
    context.check()
    data = memoryview(bytearray(file.size))
    for offset, literal in file.literals:
        write(data, literal, offset)
    context.wrote(sum(len(literal) for _, literal in file.literals), "copied")
    for tensor in file.tensors:
        fill_tensor(tensor, data, context)
    found = hash_bytes(data, hash_name)
    with _new(path) as fd:
        write(fd, data, 0)
    return found


def begin_flush(path: str, size: int, context: Context) -> None:
    """Have the kernel begin to write a small file; large ones are on their way already."""
    if size < SEND:
        with context.files.writing(path) as fd:
            send(fd, 0, size, least=0)


def flush_file(path: str, context: Context) -> None:
    """Wait until what was written is on the disk."""
    context.check()
    with context.files.writing(path) as fd:
        os.fsync(fd)


def _small(job: Job, files: Sequence[OutputFile], waiting: Waiting) -> None:
    for file in files:
        path = os.path.join(job.work.files, file.path)
        waiting.add(file, write_small(file, path, job.context, job.hash_name))


def _finish(job: Job, file: OutputFile, trail: Trail, waiting: Waiting) -> None:
    waiting.add(file, trail.digest())
    if group := waiting.take(_GROUP):
        _flush(job, group)


def _flush(job: Job, files: Sequence[tuple[OutputFile, str | None]]) -> None:
    for file, _ in files:
        flush_file(os.path.join(job.work.files, file.path), job.context)
    enter(job, [(file.path, Written(file.size, found)) for file, found in files])


def _copy(source: str, size: int, path: str, context: Context) -> None:
    with context.files.writing(path) as fd:
        move(source, 0, fd, 0, size, context, None)


@contextmanager
def _new(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
