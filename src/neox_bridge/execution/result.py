"""What an execution did."""

from dataclasses import dataclass

from neox_bridge.findings import Finding


@dataclass(frozen=True, slots=True)
class Result:
    """Bytes by how they got there, and what was noticed on the way.

    shared: bytes that lie in blocks of the source's files now (reflink) and take no room.
    copied: bytes that the kernel moved (copy_file_range) or that passed through unchanged.
    transformed: bytes that numpy made: strided, cast, summed, filled.
    findings: replicas that differed, values that became non-finite in a cast.
    """

    target: str
    files: int
    size: int
    shared: int
    copied: int
    transformed: int
    seconds: float
    findings: tuple[Finding, ...] = ()
