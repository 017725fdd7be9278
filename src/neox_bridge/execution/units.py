"""Writes units, which are groups of output files, in a pool of processes on any machine.

If a process or machine is lost, a unit may be written twice, even at the same time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from neox_bridge.execution.context import Context, How, Overflow
from neox_bridge.execution.executors import Pool
from neox_bridge.execution.journal import Written
from neox_bridge.execution.placement import Places, reaches
from neox_bridge.execution.sink import Sink, Writer
from neox_bridge.stores.paths import is_local
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.pieces import OutputFile

_T = TypeVar("_T")
_UNIT_BYTES = 128 << 20  # total bytes of files that are written and flushed together
_UNIT_FILES = 64
_LISTEN_SECONDS = 0.5  # how often a request to stop is checked
_AHEAD = 2  # waiting units per process


@dataclass(frozen=True, slots=True)
class Unit:
    """Files to write, and their writer."""

    outputs: tuple[OutputFile, ...]
    writer: Writer


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a unit; other fields as in ``Context``."""

    written: tuple[tuple[str, Written], ...]
    counts: Mapping[How, int]
    overflows: tuple[Overflow, ...]
    deviations: tuple[tuple[str, str, float], ...]
    roundings: tuple[tuple[str, int], ...] = ()


def read_of(outputs: Iterable[OutputFile]) -> dict[str, int]:
    """The local source files of these outputs, with the bytes that are read of each."""
    files: Counter[str] = Counter()
    for file in outputs:
        if file.copy_of is not None:
            files[file.copy_of] += file.size
        for tensor in file.tensors:
            for piece in tensor.pieces:
                if piece.source is not None:
                    files[piece.source.file] += prod(piece.shape) * itemsize(piece.source.dtype)
    return {path: size for path, size in files.items() if is_local(path)}


@reaches(lambda unit: Places(read_of(unit.outputs), writes=unit.writer.folders))
def make(unit: Unit) -> Made:
    """Write a unit's files, in this process. Raises what ``execute`` does."""
    context = Context(every_crc=unit.writer.every_crc)
    try:
        written = unit.writer.write(unit.outputs, context)
    finally:
        context.files.close()
    noticed = tuple(context.overflows), tuple(context.deviations), tuple(context.roundings)
    return Made(tuple(written), dict(context.written), *noticed)


def run_units(sink: Sink, files: Iterable[OutputFile], pool: Pool) -> None:
    """Write files in a pool, largest first. Raises like ``drive``."""
    writer, context = sink.writer(), sink.job.context

    def take(output: Made) -> None:
        sink.enter(output.written)
        for how, size in output.counts.items():
            context.wrote(size, how)
        context.overflows.extend(output.overflows)
        context.roundings.extend(output.roundings)
        context.deviations.extend(output.deviations)

    drive(pool, make, (Unit(group, writer) for group in grouped(files)), take)


def drive(
    pool: Pool, call: Callable[[_T], Made], units: Iterator[_T], take: Callable[[Made], None]
) -> None:
    """Call ``call`` with every unit in a pool, and pass the results to ``take``.

    Few units wait in the pool at a time, and the first failure stops all. Raises KeyboardInterrupt
    if the pool was stopped, exceptions of the call, and BridgeError if processes are lost
    repeatedly.
    """
    waiting: set[Future[Made]] = set()
    try:
        while True:
            while len(waiting) < _AHEAD * pool.slots and (unit := next(units, None)) is not None:
                waiting.add(pool.submit(call, unit))
            if not waiting:
                return
            finished, waiting = wait(waiting, _LISTEN_SECONDS, FIRST_COMPLETED)
            errors = [error for f in finished if (error := _taken(f, take)) is not None]
            if errors:
                raise errors[0]
            if pool.stopped.is_set():
                raise KeyboardInterrupt
    except BaseException:
        for future in waiting:
            future.cancel()
        wait(waiting)  # no unit may write into a folder that is about to be deleted
        for future in waiting:
            _taken(future, take)
        raise


def _taken(future: "Future[Made]", take: Callable[[Made], None]) -> BaseException | None:
    """Pass the result of a call to ``take``. Returns its error, or None if it never ran."""
    if future.cancelled():
        return None
    error = future.exception()
    if error is None:
        take(future.result())
    return error


def grouped(files: Iterable[OutputFile]) -> Iterator[tuple[OutputFile, ...]]:
    """Group files, sorted by size, into units. Large files are alone.

    Units have about equal size, because a small rest would wait for the disk as long as a full one.
    """
    left = list(files)
    size = sum(file.size for file in left)
    most = max(_UNIT_BYTES, -(-size // max(1, round(size / _UNIT_BYTES))))
    group: list[OutputFile] = []
    size = 0
    for file in left:
        if group and (size + file.size > most or len(group) == _UNIT_FILES):
            yield tuple(group)
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield tuple(group)
