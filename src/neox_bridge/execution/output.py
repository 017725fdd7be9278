"""Writes, hashes and flushes output files on a local disk, in threads or in a process of a pool."""

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import hash_bytes
from neox_bridge.execution.journal import Written
from neox_bridge.execution.movers import SEND_BYTES, move, send, write
from neox_bridge.execution.reserving import reserve
from neox_bridge.execution.threads import Task, followed, run_all
from neox_bridge.execution.trailing_hashes import Trail
from neox_bridge.execution.write_tensor import fill_tensor, write_tensor
from neox_bridge.layouts.record_file import HashName
from neox_bridge.stores.fetched import fetch_folder, keeping
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

SMALL_BYTES = 1 << 20  # largest file that is assembled in memory
_GROUP_BYTES = 128 << 20  # flushed together
_FLUSH_BYTES = 1 << 17  # the cost of a flush when tasks are grouped


@dataclass(frozen=True, slots=True)
class DiskWriter:
    """Writes files of a plan into a folder.

    Attributes:
        folder: The folder to write into. The folders of the files exist.
        attempts: The folder in which a pool starts files. A pool may write a file twice at the same
            time, so each attempt uses unique names, and the file is renamed when it is complete and
            flushed.
    """

    folder: str
    attempts: str
    every_crc: bool
    hash_name: HashName | None
    hash_shared: bool

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.attempts,)

    def path(self, file: OutputFile) -> str:
        """The final path of a file."""
        return os.path.join(self.folder, file.path)

    def write(self, files: Sequence[OutputFile], context: Context) -> list[tuple[str, Written]]:
        """Write files sequentially, as one attempt of a pool."""
        attempt = os.path.join(self.attempts, uuid.uuid4().hex)
        hashes: dict[str, str | None] = {}  # by the path of the attempt
        pieces = (piece for file in files for tensor in file.tensors for piece in tensor.pieces)
        urls = {piece.source.file for piece in pieces if piece.source is not None}
        with keeping(fetch_folder(self.folder), urls):
            for number, file in enumerate(files):
                path = f"{attempt}-{number}"
                if is_small(file):
                    hashes[path] = write_small(file, path, context, self.hash_name)
                    continue
                tasks, trail = begin_large(file, path, context, self.hash_name, self.hash_shared)
                for _, task in tasks:
                    task()
                hashes[path] = trail.digest()
        for file, path in zip(files, hashes, strict=True):
            begin_flush(path, file.size, context)
        for file, path in zip(files, hashes, strict=True):
            flush_file(path, context)
            os.replace(path, self.path(file))
        pairs = zip(files, hashes.values(), strict=True)
        return [(file.path, Written(file.size, digest)) for file, digest in pairs]

    def write_in_threads(
        self,
        files: Sequence[OutputFile],
        context: Context,
        workers: int,
        enter: Callable[[Sequence[tuple[str, Written]]], None],
    ) -> None:
        """Write files in threads. The largest come first, so that no thread ends with a large file.

        Complete files are flushed in groups: the first flush commits the journal of the file system
        for all of them, which takes a quarter of the time of separate commits (measured).

        Args:
            enter: Called with files that are on disk.
        """
        unflushed = _Unflushed()

        def flush(group: Sequence[tuple[OutputFile, str | None]]) -> None:
            for file, _ in group:
                flush_file(self.path(file), context)
            enter([(file.path, Written(file.size, digest)) for file, digest in group])

        def finish(file: OutputFile, trail: Trail) -> None:
            unflushed.add(file, trail.digest())
            if group := unflushed.take(_GROUP_BYTES):
                flush(group)

        def write_all(files: Sequence[OutputFile]) -> None:
            for file in files:
                unflushed.add(file, write_small(file, self.path(file), context, self.hash_name))

        small = [file for file in files if is_small(file)]
        tasks: list[Task] = []
        for file in files:
            if not is_small(file):
                hashing = self.hash_name, self.hash_shared
                parts, trail = begin_large(file, self.path(file), context, *hashing)
                tasks += followed(parts, partial(finish, file, trail))
        if small:  # in one thread, because this is Python code, which threads do not speed up
            tasks.append((sum(file.size for file in small), partial(write_all, small)))
        run_all(tasks, workers, context)
        rest = unflushed.take(0)
        for file, _ in rest:
            begin_flush(self.path(file), file.size, context)
        flushes = ((max(f.size, _FLUSH_BYTES), partial(flush, [(f, digest)])) for f, digest in rest)
        run_all(flushes, workers, context)


@dataclass
class _Unflushed:
    """Complete files of all threads that are not flushed yet, with their hashes."""

    files: list[tuple[OutputFile, str | None]] = field(default_factory=list)
    size: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, file: OutputFile, digest: str | None) -> None:
        with self.lock:
            self.files.append((file, digest))
            self.size += file.size

    def take(self, least: int) -> list[tuple[OutputFile, str | None]]:
        """All waiting files, largest first, if they have ``least`` bytes or more; else none."""
        with self.lock:
            if self.size < least:
                return []
            taken, self.files, self.size = self.files, [], 0
        return sorted(taken, key=lambda entry: -entry[0].size)


def is_small(file: OutputFile) -> bool:
    """Whether a file is assembled in memory."""
    return file.size <= SMALL_BYTES and file.copy_of is None


def begin_large(
    file: OutputFile, path: str, context: Context, hash_name: HashName | None, shared: bool
) -> tuple[list[Task], Trail]:
    """Create a file with its size and literal bytes. Returns a task per tensor, and its hash.

    Tasks are in file order, so that the hash can follow. shared: see ``Trail``.
    """
    with new_file(path) as fd:
        os.ftruncate(fd, file.size)
        reserve(fd, path, file, context)
        for offset, data in file.literals:
            write(fd, data, offset)
    context.wrote(sum(len(data) for _, data in file.literals), "copied")
    trail = Trail(file, path, context, hash_name, shared)
    tasks: list[Task] = [
        (tensor.nbytes, partial(_write, tensor, path, context, trail, number))
        for number, tensor in enumerate(trail.tensors)
    ]
    if file.copy_of is not None:
        tasks.append((file.size, partial(_copy, file.copy_of, file.size, path, context)))
    return tasks, trail


def write_small(
    file: OutputFile, path: str, context: Context, hash_name: HashName | None
) -> str | None:
    """Assemble a file in memory and write it in one call. Returns its hash."""
    context.check()
    data = memoryview(bytearray(file.size))
    for offset, literal in file.literals:
        write(data, literal, offset)
    context.wrote(sum(len(literal) for _, literal in file.literals), "copied")
    for tensor in file.tensors:
        fill_tensor(tensor, data, context)
    digest = hash_bytes(data, hash_name)
    with new_file(path) as fd:
        write(fd, data, 0)
    return digest


def begin_flush(path: str, size: int, context: Context) -> None:
    """Start writing a small file to disk; for large files, this has begun."""
    if size < SEND_BYTES:
        with context.files.writing(path) as fd:
            send(fd, 0, size, least=0)


def flush_file(path: str, context: Context) -> None:
    """Wait until the file is on disk."""
    context.check()
    with context.files.writing(path) as fd:
        os.fsync(fd)


@contextmanager
def new_file(path: str) -> Iterator[int]:
    """Create a file, which must not exist, and return its descriptor."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _write(tensor: OutputTensor, path: str, context: Context, trail: Trail, number: int) -> None:
    write_tensor(tensor, path, context)
    trail.written(number)


def _copy(source: str, size: int, path: str, context: Context) -> None:
    with context.files.writing(path) as fd:
        move(source, 0, fd, 0, size, context, None)
