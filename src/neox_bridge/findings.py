"""What diagnosis, planning and verification say to a user."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["info", "warning", "error"]
# what a finding of a reader is about, where a judge may say the same again with its effect
Subject = Literal[
    "",
    "config sizes",
    "duplicate keys",
    "fp32 masters",
    "GQA row order",
    "missing index",
    "mp_rank files",
    "RMSNorm epsilon",
    "rotary settings",
    "stored head",
    "tokenizer",
    "wrapped names",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing about a checkpoint, a plan or a result.

    Attributes:
        code: A stable name for this kind of finding. It is printed, and no code decides by it.
        severity: How bad it is.
        message: What it is, as a sentence without its period.
        remedy: What to do about it; may be empty.
        subject: What it is about. Of two findings on one subject, ``unrepeated`` shows one.
    """

    code: str
    severity: Severity
    message: str
    remedy: str = ""
    subject: Subject = field(default="", kw_only=True)


def unrepeated(
    findings: Iterable[Finding], others: Iterable[Finding], shown: Iterable[Subject] = ()
) -> list[Finding]:
    """The findings on subjects that ``others`` do not have: for showing two lists as one.

    Args:
        findings: The list to shorten. A finding without a subject always stays.
        others: The findings that are shown too.
        shown: Subjects to leave out even if ``others`` have nothing to say about them.
    """
    subjects = ({finding.subject for finding in others} | set(shown)) - {""}
    return [finding for finding in findings if finding.subject not in subjects]


DroppedKind = Literal["optimizer", "inv_freq", "setting", "stray", "other"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something of the source that isn't in the target, and why.

    kind: what it is, for code; the reason is for people.
    """

    name: str
    reason: str
    kind: DroppedKind = "other"
