"""What diagnosis, planning and verification say to a user."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing: a stable code, how bad, what it is, and what to do about it."""

    code: str
    severity: Severity
    message: str
    remedy: str = ""


def unrepeated(
    findings: Iterable[Finding], others: Iterable[Finding], more: Collection[str] = ()
) -> list[Finding]:
    """The findings that ``others`` do not say again: for showing two lists as one.

    more: codes that are left out too.
    """
    said = {finding.code for finding in others} | set(more)
    return [finding for finding in findings if finding.code not in said]
