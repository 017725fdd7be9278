"""Executes a plan into a store: objects that appear whole, and last the record of all of them."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from neox_bridge.errors import BridgeError, Unverified
from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import HashName, hash_bytes
from neox_bridge.execution.files import Identity, check_same, identities
from neox_bridge.execution.journal import Key, Written
from neox_bridge.execution.movers import move
from neox_bridge.execution.output import records
from neox_bridge.execution.placement import Places, reaches
from neox_bridge.execution.pool import Task, run_all
from neox_bridge.execution.remote_target import (
    Folder,
    begin,
    check_written,
    clear,
    lost_object,
    mark_done,
    put_surely,
)
from neox_bridge.execution.result import Result
from neox_bridge.execution.run import check_copies, result_of, sources_of
from neox_bridge.execution.staging import kept_files
from neox_bridge.execution.streams import Stream
from neox_bridge.execution.tensors import fill_tensor
from neox_bridge.findings import Finding
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import plan_hash
from neox_bridge.stores.objects import pending, remove
from neox_bridge.stores.uploads import WORK, Sender, start_upload
from neox_bridge.tensors.coverage import check_files
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

if TYPE_CHECKING:
    from neox_bridge.execution.executors import Pool
    from neox_bridge.execution.units import Made


def execute_remote(
    plan: Plan,
    url: str,
    overwrite: bool = False,
    workers: int | None = None,
    hash_name: HashName | None = "xxh3_128",
    progress: Callable[[int], None] | None = None,
    check: Callable[[str], None] | None = None,
    pool: "Pool | None" = None,
) -> Result:
    """Write what the plan says into a folder of a store, as ``execute`` does into one of a disk.

    Every object appears whole, ``neox_bridge.json`` when all others are there and were checked,
    then ``latest``. Until then a run that was stopped, anywhere, is gone on with when the same plan
    is executed again. What passes through the process has its CRC-32 in a ``.pt`` file.

    check: called with the URL, whose record and ``latest`` this process sees as they will be;
        ``objects.pending_now`` tells others. pool: as of ``execute``.
    Raises BridgeError, saying what is kept; Unverified where ``check`` does, and the target has no
    record then.
    """
    start = time.perf_counter()
    check_files(plan.files)
    sources = sources_of(plan)
    before = identities(sources)
    check_copies(plan, before)
    context = Context(progress)
    key = Key(plan_hash(plan), before, hash_name)
    folder, done = begin(plan, url, key, sources, overwrite)
    try:
        some = plan
        for _ in range(2):
            if pool is not None:
                _have_written(some, folder, done, hash_name, pool, context)
            else:
                _write_all(some, folder, done, hash_name, workers, context)
            gone = check_written(folder, done)
            for path in gone:  # written once more
                del done[path]
            if not gone:
                break
            some = replace(plan, files=tuple(file for file in plan.files if file.path in gone))
        else:
            raise lost_object(folder.place(gone[0]))
        check_same(before)
        last = _last(plan, folder, done, hash_name, key.plan, before)
        remove(folder.stale)
        if check is not None:
            with pending(last):
                check(url)
        for place, data in last.items():
            put_surely(place, data)
            context.wrote(len(data), "copied")
    except Unverified as error:
        clear(folder)  # where that fails the verdict matters more
        raise Unverified(
            f"{error} {url} is left without its neox_bridge.json, to be looked at. Remove it, or "
            "convert again with --overwrite."
        ) from None
    except (BridgeError, KeyboardInterrupt) as error:
        kept = _kept(folder, len(done))
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        raise type(error)(f"{error} {kept}") from None
    findings = folder.beside.findings if folder.beside else ()
    if reason := clear(folder):
        findings += (_left_over(folder, reason),)
    result = result_of(plan, url, context, start)
    return replace(result, findings=(*result.findings, *findings))


def _left_over(folder: Folder, reason: str) -> Finding:
    return Finding(
        "left-over",
        "warning",
        f"{folder.url} is finished, but what was only for resuming is left in "
        f"{folder.url}/{WORK}: {reason}",
        f"remove {folder.url}/{WORK}; the next run into the same target tries to",
    )


def write_object(
    file: OutputFile,
    url: str,
    hash_name: HashName | None = "xxh3_128",
    *,
    folder: Folder | None = None,
    context: Context | None = None,
    sender: Sender | None = None,
) -> Written:
    """Write one output file as an object, from its start to its end; it appears whole or not.

    folder: that of the plan, in which the file is then marked as finished. Everything that other
    processes need can be pickled; context and sender are shared by threads of one. Raises
    BridgeError, and nothing is left of the object then.
    """
    own, shared = context or Context(), sender or Sender()
    places = frozenset(place for tensor in file.tensors for place in tensor.crc_at)
    upload = start_upload(url, file.size)
    stream = Stream(upload, shared, file.size, hash_name, places)
    try:
        for part in _in_order(file):
            own.check()
            if isinstance(part, OutputTensor):
                fill_tensor(part, stream, own)
            else:
                stream.literal(part[1], part[0])
                own.wrote(len(part[1]), "copied")
        if file.copy_of is not None:
            move(file.copy_of, 0, stream, 0, file.size, own, None)
        found, tag = stream.finish()
    except BaseException:
        stream.abandon()
        raise
    finally:
        if context is None:
            own.files.close()
        if sender is None:
            shared.close()
    written = Written(file.size, found)
    if folder is not None:
        mark_done(folder, file.path, written, tag)
    return written


def _in_order(file: OutputFile) -> list[tuple[int, bytes] | OutputTensor]:
    """Literals and tensors as they lie in the file."""
    parts: list[tuple[int, int, tuple[int, bytes] | OutputTensor]] = [
        (literal[0], len(literal[1]), literal) for literal in file.literals
    ]
    parts += [(tensor.offset, tensor.nbytes, tensor) for tensor in file.tensors]
    return [part for *_, part in sorted(parts, key=lambda part: part[:2])]


def _write_all(
    plan: Plan,
    folder: Folder,
    done: dict[str, Written],
    hash_name: HashName | None,
    workers: int | None,
    context: Context,
) -> None:
    """Object after object, the largest first; ``done`` gets those that are finished."""
    sender = Sender()
    todo = _todo(plan, folder, done, context)

    def one(file: OutputFile) -> None:
        url = folder.place(file.path)
        done[file.path] = write_object(
            file, url, hash_name, folder=folder, context=context, sender=sender
        )

    # a request takes as long as some bytes
    tasks: list[Task] = [(max(file.size, 1 << 20), partial(one, file)) for file in todo]
    try:
        run_all(tasks, workers or 1 + min(4, os.cpu_count() or 1), context)
    finally:
        sender.close()
        context.files.close()


@dataclass(frozen=True, slots=True)
class _Unit:
    """Files that another process writes."""

    outputs: tuple[OutputFile, ...]
    folder: Folder
    hash_name: HashName | None


def _have_written(
    plan: Plan,
    folder: Folder,
    done: dict[str, Written],
    hash_name: HashName | None,
    pool: "Pool",
    context: Context,
) -> None:
    """The same, by a pool."""
    from neox_bridge.execution.units import Made, count, drive, grouped

    def take(made: Made) -> None:
        done.update(made.written)
        count(made, context)

    groups = grouped(_todo(plan, folder, done, context))
    drive(pool, _make, (_Unit(group, folder, hash_name) for group in groups), take)


def _places(unit: _Unit) -> Places:
    from neox_bridge.execution.units import read_of

    return Places(read_of(unit.outputs))


@reaches(_places)
def _make(unit: _Unit) -> "Made":
    from neox_bridge.execution.units import made_of

    context, sender = Context(), Sender()
    try:
        return made_of(
            [
                (
                    file.path,
                    write_object(
                        file,
                        unit.folder.place(file.path),
                        unit.hash_name,
                        folder=unit.folder,
                        context=context,
                        sender=sender,
                    ),
                )
                for file in unit.outputs
            ],
            context,
        )
    finally:
        sender.close()
        context.files.close()


def _todo(
    plan: Plan, folder: Folder, done: dict[str, Written], context: Context
) -> list[OutputFile]:
    """The files that aren't there yet, the largest first; those that are are counted."""
    found = []
    for file in sorted(folder.todo(plan), key=lambda file: -file.size):
        if file.path in done:
            context.wrote(file.size, "kept")
        else:
            found.append(file)
    return found


def _last(
    plan: Plan,
    folder: Folder,
    done: dict[str, Written],
    hash_name: HashName | None,
    plan_key: str,
    sources: Mapping[str, Identity],
) -> dict[str, bytes]:
    """The records, sealed, and ``latest`` after them, by their URLs."""
    following = folder.last(plan)
    found = dict(done)
    for file in following:
        data = file.literals[0][1]
        found[file.path] = Written(file.size, hash_bytes(data, hash_name or "xxh3_128"))
    made = records(plan, found, hash_name, plan_key, sources, folder.place)
    last = {folder.place(file.path): data for file, data in made}
    return last | {folder.place(file.path): file.literals[0][1] for file in following}


def _kept(folder: Folder, count: int) -> str:
    if not count:
        return f"Nothing is finished in {folder.url}: the same command begins again."
    return kept_files(f"{folder.url}, without its neox_bridge.json", count)
