"""The result of an execution."""

from dataclasses import dataclass, field
from typing import Any

from neox_bridge.documents import document
from neox_bridge.findings import Finding
from neox_bridge.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """How many bytes were written in which way, and the findings.

    Attributes:
        target: The folder or URL that was written.
        files: How many files it has.
        size: Bytes of all files.
        shared: Bytes that share blocks with source files (reflink) and take no space.
        copied: Bytes that the kernel moved (copy_file_range) or that passed through unchanged.
        transformed: Bytes that numpy computed: strided, cast, summed, filled.
        kept: Bytes of files that an earlier run of the same plan had finished.
        seconds: The time for writing and verifying.
        findings: Replicas that differed, values that became non-finite in a cast.
        source: The source as the caller named it.
        verified: Whether the result was compared with the source; None if there is no source.
        plan: The executed plan.
    """

    target: str
    files: int
    size: int
    shared: int
    copied: int
    transformed: int
    kept: int
    seconds: float
    findings: tuple[Finding, ...] = ()
    source: str = ""
    verified: bool | None = None
    plan: Plan | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The document that ``convert --json`` prints."""
        from neox_bridge.execution.memory import peak_memory
        from neox_bridge.planning.report import casts_json, remarks, sides, summary

        kept = ("target", "files", "size", "shared", "copied", "transformed", "kept", "seconds")
        counts = {name: getattr(self, name) for name in (*kept, "findings")}
        plan = self.plan
        if plan is None:
            return document(result=counts, verified=self.verified)
        return document(
            **sides(plan, self.source, self.target),
            result=counts,
            summary=summary(plan, peak_memory(plan, self.target)),
            casts=casts_json(plan),
            **remarks(plan),
            verified=self.verified,
        )
