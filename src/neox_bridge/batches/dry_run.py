"""The preview of a batch: a row per checkpoint, and an estimate of the time."""

import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from neox_bridge.batches.items import Item
from neox_bridge.batches.row import BatchRow, BatchStatus, complete
from neox_bridge.batches.run import Batch, place_of, plan_one, with_plan
from neox_bridge.batches.target_state import Decision, decision
from neox_bridge.documents import document
from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context
from neox_bridge.execution.movers import BUFFER_BYTES, move, read
from neox_bridge.findings import Finding
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.paths import is_local

_STATUS: dict[Decision, BatchStatus] = {
    "skip": "skipped",
    "refuse": "failed",
    "write": "planned",
}
_SAMPLE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class DryRun:
    """The preview of a batch.

    Attributes:
        target: The folder.
        rows: One for each checkpoint.
        rate: Bytes per second, measured with a sample; None if there was none.
        findings: What is wrong with the sources, such as one that is missing.
        sources: The sources as the user named them.
    """

    target: str
    rows: tuple[BatchRow, ...]
    rate: float | None
    findings: tuple[Finding, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every source could be read and planned."""
        return complete(self.rows, self.findings)

    @property
    def size(self) -> int:
        """The number of bytes that would be written."""
        return sum(row.size for row in self.rows if row.status == "planned")

    @property
    def seconds(self) -> float | None:
        """The estimated duration."""
        return self.size / self.rate if self.rate else None

    def to_json(self) -> dict[str, Any]:
        """The document that ``batch --dry-run --json`` prints."""
        return document(
            sources=self.sources,
            target=self.target,
            holds=self.holds,
            findings=self.findings,
            bytes=self.size,
            rate=self.rate,
            seconds=self.seconds,
            rows=self.rows,
        )


def dry_run(items: Iterable[Item], batch: Batch) -> DryRun:
    """Plan all checkpoints; writes only a temporary sample."""
    rows, sample = [], None
    for item in items:
        row, plan = _row(item, batch)
        rows.append(row)
        if sample is None and row.status == "planned":
            sample = plan
    rate = rate_of(sample, batch.target, batch.verify) if sample is not None else None
    return DryRun(batch.target, tuple(rows), rate)


def _row(item: Item, batch: Batch) -> tuple[BatchRow, Plan | None]:
    target = place_of(item, batch)
    given = (item.name, item.run, item.number)
    try:
        plan, state, words = plan_one(item, batch)
    except (BridgeError, OSError) as error:
        return BatchRow(*given, "failed", item.source.path, target, error=str(error)), None
    row = BatchRow(
        *given,
        _STATUS[decision(state, batch.overwrite)],
        item.source.path,
        target,
        error=words,
    )
    return with_plan(row, plan), plan


def rate_of(plan: Plan, target: str, verify: bool) -> float | None:
    """Bytes per second of copying a source of the plan to the target's disk, with flush.

    verify: whether to read both again. None if the sample cannot be read or written. The copy is
    deleted afterwards.
    """
    pieces = (p for f in plan.files for t in f.tensors for p in t.pieces if p.source is not None)
    largest = max(pieces, key=lambda p: p.source.nbytes if p.source else 0, default=None)
    if largest is None or largest.source is None:
        return None
    file, start = largest.source.file, largest.source.offset
    size = min(largest.source.nbytes, _SAMPLE_BYTES)
    if not is_local(target):
        return None
    folder = os.path.dirname(os.path.abspath(target))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    context = Context()
    try:
        with tempfile.TemporaryFile(dir=folder) as sample:
            begin = time.perf_counter()
            move(file, start, sample.fileno(), start % 4096, size, context, None)
            os.fsync(sample.fileno())
            if verify:
                _read(sample.fileno(), start % 4096, size)
            return size / (time.perf_counter() - begin)
    except OSError:
        return None
    finally:
        context.files.close()


def _read(fd: int, start: int, size: int) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for at in range(0, size, BUFFER_BYTES):
        read(fd, "the sample", buffer[: min(BUFFER_BYTES, size - at)], start + at)
