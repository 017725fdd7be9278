"""What became of one checkpoint of a batch."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from neox_bridge.findings import Finding
from neox_bridge.planning.casts import Cast

BatchStatus = Literal["done", "skipped", "failed", "planned"]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """size: bytes of the target. shared, seconds: as in ``Result``; verifying is in the seconds.

    tries: how often it was begun. verified: None where nothing was compared. error: the last one.
    casts: the dtypes that the source's weights are cast to.
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
