"""Output files made in other processes, on this machine or another: a unit is some whole files.

A unit may be made twice, even at the same time, where its process or machine is lost: each attempt
writes names of its own, and gives a file its name when it is whole and on the disk.
"""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from neox_bridge.execution.context import Context, How, Overflow
from neox_bridge.execution.digests import HashName
from neox_bridge.execution.executors import Pool
from neox_bridge.execution.journal import Written
from neox_bridge.execution.output import (
    Job,
    begin_flush,
    begin_large,
    enter,
    flush_file,
    is_small,
    to_make,
    write_small,
)
from neox_bridge.execution.placement import Places, reaches
from neox_bridge.stores.fetched import folder_beside, keeping
from neox_bridge.stores.paths import is_url
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.pieces import OutputFile
from neox_bridge.tensors.tensor_ref import TensorRef

_T = TypeVar("_T")
_BYTES = 128 << 20  # of files that are made, and flushed, together
_FILES = 64
_LISTEN = 0.5  # seconds after which somebody who wants all to stop is heard
_ATTEMPTS = "attempts-"  # one for each run: what an earlier one left running has none any more
_AHEAD = 2  # units that wait for each process


@dataclass(frozen=True, slots=True)
class Unit:
    """Files to make. files: the folder that they belong to. attempts: where they are begun."""

    outputs: tuple[OutputFile, ...]
    files: str
    attempts: str
    every_crc: bool
    hash_name: HashName | None
    hash_shared: bool


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a unit; the rest as in ``Context``."""

    written: tuple[tuple[str, Written], ...]
    counts: Mapping[How, int]
    overflows: tuple[Overflow, ...]
    deviations: tuple[tuple[str, str, float], ...]
    roundings: tuple[tuple[str, int], ...] = ()


def read_of(outputs: Iterable[OutputFile]) -> dict[str, int]:
    """The local files that these are made of, with the bytes that are taken of each."""
    files: Counter[str] = Counter()
    for file in outputs:
        if file.copy_of is not None:
            files[file.copy_of] += file.size
        for tensor in file.tensors:
            for piece in tensor.pieces:
                if piece.source is not None:
                    files[piece.source.file] += prod(piece.shape) * itemsize(piece.source.dtype)
    return {path: size for path, size in files.items() if not is_url(path)}


def _refs(file: OutputFile) -> Iterator[TensorRef]:
    """The tensors that a file is made of."""
    for tensor in file.tensors:
        for piece in tensor.pieces:
            if piece.source is not None:
                yield piece.source


@reaches(lambda unit: Places(read_of(unit.outputs), writes=(unit.attempts,)))
def make(unit: Unit) -> Made:
    """Make a unit's files, in this process. Raises what ``execute`` does for sources and disks."""
    context = Context(every_crc=unit.every_crc)
    begun: list[tuple[OutputFile, str, str | None]] = []
    attempt = os.path.join(unit.attempts, uuid.uuid4().hex)
    urls = {ref.file for file in unit.outputs for ref in _refs(file)}
    try:
        with keeping(folder_beside(unit.files), urls):
            for number, file in enumerate(unit.outputs):
                path = f"{attempt}-{number}"
                if is_small(file):
                    found = write_small(file, path, context, unit.hash_name)
                else:
                    hashing = unit.hash_name, unit.hash_shared
                    its, trail = begin_large(file, path, context, *hashing)
                    for _, task in its:
                        task()
                    found = trail.digest()
                begun.append((file, path, found))
        for file, path, _ in begun:
            begin_flush(path, file.size, context)
        for file, path, _ in begun:
            flush_file(path, context)
            os.replace(path, os.path.join(unit.files, file.path))
    finally:
        context.files.close()
    return made_of([(file.path, Written(file.size, found)) for file, _, found in begun], context)


def made_of(written: Iterable[tuple[str, Written]], context: Context) -> Made:
    """What became of a unit that wrote these files."""
    found = tuple(context.overflows), tuple(context.deviations), tuple(context.roundings)
    return Made(tuple(written), dict(context.written), *found)


def run_units(job: Job, pool: Pool) -> None:
    """Have a pool make the files of a job; few wait there at a time, and the first failure stops.

    Raises KeyboardInterrupt where the pool was told to stop, else what ``make`` raises, BridgeError
    where processes are lost again and again.
    """
    for name in os.listdir(job.work.folder):
        if name.startswith(_ATTEMPTS):  # of a run that was killed
            shutil.rmtree(os.path.join(job.work.folder, name), ignore_errors=True)
    attempts = os.path.join(job.work.folder, f"{_ATTEMPTS}{uuid.uuid4().hex}")
    os.mkdir(attempts)

    def take(made: Made) -> None:
        enter(job, made.written)
        count(made, job.context)

    groups = grouped(to_make(job))
    more = (job.context.every_crc, job.hash_name, job.hash_shared)
    drive(pool, make, (Unit(group, job.work.files, attempts, *more) for group in groups), take)


def drive(
    pool: Pool, call: Callable[[_T], Made], units: Iterator[_T], take: Callable[[Made], None]
) -> None:
    """Have a pool call ``call`` with every unit, and ``take`` what comes of it.

    Few wait in the pool at a time, and the first failure stops all; raises as ``run_units``.
    """
    waiting: set[Future[Made]] = set()
    try:
        while True:
            while len(waiting) < _AHEAD * pool.slots and (unit := next(units, None)) is not None:
                waiting.add(pool.submit(call, unit))
            if not waiting:
                return
            finished, waiting = wait(waiting, _LISTEN, FIRST_COMPLETED)
            errors = [error for f in finished if (error := _taken(f, take)) is not None]
            if errors:
                raise errors[0]
            if pool.stopped.is_set():
                raise KeyboardInterrupt
    except BaseException:
        for future in waiting:
            future.cancel()
        wait(waiting)  # none may write into a folder that is about to be removed
        for future in waiting:
            _taken(future, take)
        raise


def _taken(future: "Future[Made]", take: Callable[[Made], None]) -> BaseException | None:
    """``take`` what a call made; else its error, or None where it never ran."""
    if future.cancelled():
        return None
    error = future.exception()
    if error is None:
        take(future.result())
    return error


def count(made: Made, context: Context) -> None:
    """Add what a unit did and noticed to what all did."""
    for how, size in made.counts.items():
        context.wrote(size, how)
    context.overflows.extend(made.overflows)
    context.roundings.extend(made.roundings)
    context.deviations.extend(made.deviations)


def grouped(files: Iterable[OutputFile]) -> Iterator[tuple[OutputFile, ...]]:
    """The files of each unit, of files the largest of which come first: those are alone.

    Of about the same bytes each: a small rest would wait for the disk as long as a whole one.
    """
    left = list(files)
    size = sum(file.size for file in left)
    most = max(_BYTES, -(-size // max(1, round(size / _BYTES))))
    group: list[OutputFile] = []
    size = 0
    for file in left:
        if group and (size + file.size > most or len(group) == _FILES):
            yield tuple(group)
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield tuple(group)
