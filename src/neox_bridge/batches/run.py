"""Converts many checkpoints in one pool. Converted ones are skipped, failed ones retried."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from neox_bridge.batches import on_hub
from neox_bridge.batches.items import Item, Source
from neox_bridge.batches.on_hub import HubModel
from neox_bridge.batches.row import BatchRow
from neox_bridge.batches.target_state import TargetState, decision, state_of
from neox_bridge.conversion import plan_conversion, source_check
from neox_bridge.errors import BridgeError, Refused, TargetUnusable, Unverified, UsageError
from neox_bridge.execution.execute import execute, sources_of
from neox_bridge.execution.executors import Pool
from neox_bridge.execution.files import identities
from neox_bridge.execution.placement import Places, reaches
from neox_bridge.execution.sink import recorded_texts
from neox_bridge.execution.staging import check_target, set_aside, sweep
from neox_bridge.findings import Finding
from neox_bridge.layouts.record_file import HashName
from neox_bridge.layouts.unknown_keys import ignorable
from neox_bridge.planning.option_checks import kind_of
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.fetched import fetch_folder, keeping
from neox_bridge.stores.hub_names import reader_folder
from neox_bridge.stores.objects import pending, pending_now
from neox_bridge.stores.paths import absolute, is_local

if TYPE_CHECKING:
    from neox_bridge.frameworks.facts import TransformersFacts

_MOST_AHEAD = 32  # planning threads; planning is Python code, so threads do not run in parallel
_PART_BYTES = 1 << 30  # bytes of a checkpoint per process that verifies it
_HEAD_START_SECONDS = 0.05  # head start for the first plan, because the processes wait for it
_PAUSE_SECONDS = 1.0  # before the first retry; doubled for each further one

_PERMANENT = (Refused, TargetUnusable, Unverified, UsageError)  # errors that are not retried


@dataclass(frozen=True, slots=True)
class Event:
    """An event for progress display and logs.

    kind: "begun" (size: bytes to write), "written" (size: bytes just written or verified), "retry"
    (words: the failure), "ended" (row).
    """

    kind: str
    name: str
    size: int = 0
    words: str = ""
    row: BatchRow | None = None


def _silent(_: Event) -> None:
    """Ignore events."""


@dataclass(frozen=True)
class Batch:
    """The settings of a batch.

    Attributes:
        target: The folder that gets a subfolder per checkpoint.
        hub: The model that gets a branch per checkpoint instead.
        retries: Retries per checkpoint, after its first failure.
        every_hash: Whether finished checkpoints are read again to check their hashes.
        norms: Whether to compute the L2 norms of the written tensors.
        version: The version of transformers that must load the results.
        ahead: Checkpoints in progress at a time; by default enough to keep the pool busy.
    """

    target: str
    options: Options
    overwrite: bool = False
    verify: bool = True
    retries: int = 2
    every_crc: bool = False
    hash_name: HashName | None = "xxh3_128"
    every_hash: bool = False
    norms: bool = False
    version: "TransformersFacts | None" = None
    ahead: int | None = None
    hub: HubModel | None = None
    tell: Callable[[Event], None] = _silent


def run_batch(items: Iterable[Item], batch: Batch, pool: Pool) -> Iterator[BatchRow]:
    """Convert all checkpoints; yields a row as each one ends.

    A failed checkpoint is a row, too. Ctrl-C stops all soon; finished files are kept, and running
    the same batch again continues.
    """
    waiting: set[Future[BatchRow]] = set()
    left = iter(items)
    ahead = batch.ahead or default_ahead(pool.slots)
    with ThreadPoolExecutor(ahead) as threads:
        try:
            if (first := next(left, None)) is not None:
                waiting.add(threads.submit(convert_one, first, batch, pool))
                wait(waiting, _HEAD_START_SECONDS)
            while True:
                while len(waiting) < ahead and (item := next(left, None)) is not None:
                    waiting.add(threads.submit(convert_one, item, batch, pool))
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException:
            pool.stopped.set()
            raise


def convert_one(item: Item, batch: Batch, pool: Pool) -> BatchRow:
    """Convert one checkpoint, with retries for transient errors. Raises only KeyboardInterrupt."""
    begin = time.perf_counter()
    target = place_of(item, batch)
    row = BatchRow(item.name, item.run, item.number, "failed", item.source.path, target)
    for number in range(batch.retries + 1):
        row = replace(row, tries=number + 1)
        try:
            row = _convert(item, replace(row, error=""), batch, pool)
            break
        except (BridgeError, OSError) as error:
            row = replace(row, error=str(error))
            if isinstance(error, _PERMANENT) or number == batch.retries:
                break
            batch.tell(Event("retry", item.name, words=str(error)))
            if pool.stopped.wait(_PAUSE_SECONDS * 2**number):
                break
        except Exception as error:  # a bug in this program fails only this checkpoint
            what = f"{type(error).__name__}: {error}"
            row = replace(row, error=f"this is a bug in neox-bridge: {what}. Please report it.")
            break
    row = replace(row, seconds=time.perf_counter() - begin)
    batch.tell(Event("ended", item.name, row.size, row=row))
    return row


def place_of(item: Item, batch: Batch) -> str:
    """The target of a checkpoint: a folder, a URL, or ``hf://org/name@branch``."""
    if batch.hub is not None:
        return on_hub.place_of(batch.hub, item.name)
    return os.path.join(batch.target, item.name)


def plan_one(item: Item, batch: Batch) -> tuple[Plan, TargetState, str]:
    """The plan of a checkpoint, and the state of its target (see ``state_of``)."""
    checkpoint, options = item.source.open(), batch.options
    # a batch may contain runs of several forks, so each gets only the keys that it has
    there = ignorable(checkpoint)
    options = replace(options, ignore_keys=tuple(k for k in options.ignore_keys if k in there))
    kind = kind_of(checkpoint, options)
    if (checkpoint.kind, kind, options.iteration) == ("hf", "neox", None):
        # known from its folder, not from its config
        options = replace(options, iteration=item.number)
    target = place_of(item, batch)
    # the yml of a Hub model must not name a folder of this machine
    root = target if batch.hub is None else reader_folder(batch.hub.repo)
    plan = plan_conversion(checkpoint, options, root, version=batch.version)
    if batch.hub is not None:
        return plan, *on_hub.state_of(plan, batch.hub, item.name)
    absent = sorted(set(batch.options.ignore_keys) - there)
    plan = replace(plan, findings=(*plan.findings, *map(_not_there, absent)))
    sources = identities(sources_of(plan))
    texts = recorded_texts(plan.checkpoint)
    return plan, *state_of(target, plan.options, sources, texts, every_hash=batch.every_hash)


def with_plan(row: BatchRow, plan: Plan) -> BatchRow:
    """The row with the facts of its plan."""
    return replace(
        row,
        files=len(plan.files),
        size=plan.size,
        casts=plan.casts,
        findings=plan.findings,
        carried=plan.carried,
        not_carried=plan.left,
    )


def _not_there(key: str) -> Finding:
    message = f"`ignore_keys={key}`: this checkpoint has no unknown key of this name"
    return Finding("ignored-key-absent", "warning", message, "check the key's name")


def _convert(item: Item, row: BatchRow, batch: Batch, pool: Pool) -> BatchRow:
    plan, state, words = plan_one(item, batch)
    row = with_plan(row, plan)
    does = decision(state, batch.overwrite)
    if does == "skip":
        if batch.hub is None and (finding := sweep(row.target)) is not None:
            row = replace(row, findings=(*row.findings, finding))
        return replace(row, status="skipped", norms=_norms(row.target, batch, pool))
    if does == "refuse":
        if is_local(row.target):  # raises what `overwrite=True` could not solve either
            check_target(row.target, identities(sources_of(plan)), None)
        raise TargetUnusable(
            f"{words}. Choose another target, or use `overwrite=True` to replace it."
        )
    if batch.hub is not None:
        return _published(item, row, plan, batch, pool)
    if state == "changed" and not batch.overwrite:
        kept = ""
        if is_local(row.target):
            kept = f"; kept as {set_aside(row.target, row.target, 'changed')}"
        finding = Finding("not-whole", "warning", f"{words}: converted again{kept}")
        row = replace(row, findings=(*row.findings, finding))
    anew = batch.overwrite or (state == "changed" and not is_local(row.target))
    row = _written(item, row, plan, row.target, anew, batch, pool)
    return replace(row, norms=_norms(row.target, batch, pool))


def _published(item: Item, row: BatchRow, plan: Plan, batch: Batch, pool: Pool) -> BatchRow:
    """Write the files to a local folder, then publish them as one commit."""
    assert batch.hub is not None
    with on_hub.made_in(batch.hub, item.name) as work:
        sources = identities(sources_of(plan))
        texts = recorded_texts(plan.checkpoint)
        state, _ = state_of(work.files, plan.options, sources, texts, every_hash=True)
        if state == "whole":  # an earlier run was stopped during the upload
            row = replace(row, status="done")
        else:
            row = _written(item, row, plan, work.files, True, batch, pool)
        row = replace(row, norms=_norms(work.files, batch, pool))
        on_hub.send(plan, work, batch.hub, item.name, batch.overwrite)
    return row


def _written(
    item: Item, row: BatchRow, plan: Plan, target: str, overwrite: bool, batch: Batch, pool: Pool
) -> BatchRow:
    """Execute and verify the plan."""
    batch.tell(Event("begun", item.name, plan.size * (1 + batch.verify)))

    def progress(size: int) -> None:
        batch.tell(Event("written", item.name, size))

    def check(folder: str) -> None:
        pending_objects = pending_now()
        _share(
            pool,
            [
                (verify_part, item.source, batch.options.optimizer, folder, part, pending_objects)
                for part in _parts(plan.size, pool)
            ],
        )
        progress(plan.size)

    if is_local(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)  # shared, so not removed
    result = execute(
        plan,
        target,
        overwrite=overwrite,
        every_crc=batch.every_crc,
        hash_name=batch.hash_name,
        hash_shared=batch.verify and is_local(target),
        progress=progress,
        check=check if batch.verify else None,
        pool=pool,
    )
    return replace(
        row,
        status="done",
        shared=result.shared,
        verified=batch.verify or None,
        findings=(*row.findings, *result.findings),
    )


def _verified(source: Source, _: str, folder: str, *__: object) -> Places:
    return Places(folders=(*_folders(source.path), *_folders(folder)))


def _folders(path: str) -> list[str]:
    """A folder and its subfolders; empty for URLs and Hub models."""
    return [folder for folder, _, _ in os.walk(absolute(path))]


@reaches(_verified)
def verify_part(
    source: Source,
    optimizer: str,
    folder: str,
    part: tuple[int, int],
    pending_objects: Mapping[str, bytes],
) -> None:
    """Runs in a pool: raises Unverified if a part of a finished folder differs from the source.

    pending_objects: objects of a store that are not yet written (``objects.pending``).
    """
    checkpoint = source.open()
    check = source_check(checkpoint, is_fresh=optimizer == "fresh", workers=1, part=part)
    with pending(pending_objects), keeping(fetch_folder(folder), checkpoint.files):
        check(folder)


def _norms(folder: str, batch: Batch, pool: Pool) -> dict[str, float] | None:
    results = _share(pool, [(norms_of, folder)]) if batch.norms else [None]
    norms: dict[str, float] | None = results[0]
    return norms


@reaches(lambda folder: Places(folders=tuple(_folders(folder))))
def norms_of(folder: str) -> dict[str, float]:
    """Runs in a pool: the L2 norm of each tensor."""
    from neox_bridge.layouts.open import open_checkpoint
    from neox_bridge.verification.hashes import fingerprints

    prints = fingerprints(open_checkpoint(folder), workers=1)
    return {name: print_.norm or 0.0 for name, print_ in prints.items()}


def _parts(size: int, pool: Pool) -> list[tuple[int, int]]:
    count = max(1, min(pool.slots, -(-size // _PART_BYTES)))
    return [(number, count) for number in range(count)]


def _share(pool: Pool, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run all calls in the pool. Raises the first failure when all have ended."""
    futures = [pool.submit(*call) for call in calls]
    left = set(futures)
    while left:
        _, left = wait(left, timeout=0.5)
        if pool.stopped.is_set():
            for future in left:
                future.cancel()
            wait(left)
            raise KeyboardInterrupt
    return [future.result() for future in futures]


def default_ahead(slots: int) -> int:
    """Checkpoints in progress at a time: others run while some are planned or installed."""
    return min(slots + 2, _MOST_AHEAD)
