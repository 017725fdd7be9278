"""What diagnosis, planning and verification say to a user."""

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
