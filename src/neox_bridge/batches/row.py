"""The results of a batch and of each of its checkpoints."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from neox_bridge.documents import document, plain_data
from neox_bridge.findings import Finding
from neox_bridge.layouts.carried_names import LeftFile
from neox_bridge.planning.casts import Cast

BatchStatus = Literal["done", "skipped", "failed", "planned"]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """The result for one checkpoint.

    Attributes:
        name: Its folder or branch below the batch's target.
        run: The training run that it belongs to.
        number: Its step, if it has one.
        size: Bytes of the target.
        shared: As in ``Result``.
        seconds: The time of all attempts, including verification.
        tries: The number of attempts.
        verified: None if nothing was compared.
        norms: L2 norms of the written tensors, if they were asked for.
        error: Why it failed.
        casts: The dtypes that the source's weights are cast to.
        carried: Small text files that are copied from the folder of the source.
        not_carried: Files in that folder that are not copied.
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
    carried: tuple[str, ...] = ()
    not_carried: tuple[LeftFile, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The row in the JSON document of the batch."""
        facts: dict[str, Any] = plain_data(self)
        return facts


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of a batch.

    Attributes:
        target: The folder, URL or model that was written.
        rows: One for each checkpoint, in the order of runs and steps.
        findings: What is wrong with the sources, such as one that is missing.
        sources: The sources as the caller named them.
    """

    target: str
    rows: tuple[BatchRow, ...]
    findings: tuple[Finding, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every source could be read, and no checkpoint failed."""
        return complete(self.rows, self.findings)

    def to_json(self) -> dict[str, Any]:
        """The document that ``batch --json`` prints."""
        return document(
            batch=self.target,
            sources=self.sources,
            target=self.target,
            holds=self.holds,
            findings=self.findings,
            rows=self.rows,
        )


def complete(rows: Iterable[BatchRow], findings: Iterable[Finding]) -> bool:
    """Whether no checkpoint failed, and no source is missing or cannot be read."""
    failed = any(row.status == "failed" for row in rows)
    return not failed and all(finding.severity != "error" for finding in findings)
