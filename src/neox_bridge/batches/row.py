"""What became of a batch and of each of its checkpoints."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from neox_bridge.findings import Finding
from neox_bridge.planning.casts import Cast

BatchStatus = Literal["done", "skipped", "failed", "planned"]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """What became of one checkpoint.

    Attributes:
        name: Its folder or branch below the batch's target.
        run: The training run that it belongs to.
        number: Its step, if it has one.
        size: Bytes of the target.
        shared: As in ``Result``.
        seconds: Of the last try and all before, with verification.
        tries: How often it was begun.
        verified: None if nothing was compared.
        norms: L2 norms of the written tensors, if they were asked for.
        error: Why it failed.
        casts: The dtypes that the source's weights are cast to.
    """

    name: str
    run: str
    number: int | None
    status: BatchStatus
    source: str
    target: str
    files: int = 0
    size: int = 0
    shared: int = 0
    seconds: float = 0.0
    tries: int = 1
    verified: bool | None = None
    norms: "dict[str, float] | None" = None
    findings: tuple[Finding, ...] = ()
    error: str = ""
    casts: tuple[Cast, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch.

    Attributes:
        target: The folder, URL or model that was written.
        rows: One for each checkpoint, in the order of runs and steps.
        findings: What is wrong with the sources, such as one that is missing.
    """

    target: str
    rows: tuple[BatchRow, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether no checkpoint failed."""
        return not any(row.status == "failed" for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema_version": 1,
            "batch": self.target,
            "holds": self.holds,
            "rows": [row.as_json() for row in self.rows],
        }
