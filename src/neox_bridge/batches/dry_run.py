"""What a batch would do: a row for each checkpoint, and how long it may take."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from neox_bridge.batches.estimate import rate_of
from neox_bridge.batches.items import Item
from neox_bridge.batches.row import BatchRow
from neox_bridge.batches.run import Batch, place_of, plan_one
from neox_bridge.batches.target_state import decision
from neox_bridge.errors import BridgeError
from neox_bridge.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class DryRun:
    """rate: bytes a second, of a sample; None where there was none to take. target: the folder."""

    target: str
    rows: tuple[BatchRow, ...]
    rate: float | None

    @property
    def size(self) -> int:
        """Bytes that would be written."""
        return sum(row.size for row in self.rows if row.status == "planned")

    @property
    def seconds(self) -> float | None:
        """An estimate."""
        return self.size / self.rate if self.rate else None

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema_version": 1,
            "target": self.target,
            "bytes": self.size,
            "rate": self.rate,
            "seconds": self.seconds,
            "rows": [row.as_json() for row in self.rows],
        }


def dry_run(items: Iterable[Item], batch: Batch) -> DryRun:
    """Plan all; write nothing but a sample, which is gone afterwards."""
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
    facts = {"files": len(plan.files), "size": plan.size, "findings": plan.findings}
    status = {"skip": "skipped", "refuse": "failed", "write": "planned"}
    does = decision(state, batch.overwrite)
    row = BatchRow(*given, status[does], item.source.path, target, **facts, error=words)  # type: ignore[arg-type]
    return row, plan
