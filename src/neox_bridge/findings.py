"""What diagnosis, planning and verification tell a user."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["info", "warning", "error"]
# What a reader's finding is about, where a judge may report the same with its effect.
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


class Command(str):
    """A command line that runs as it is. All other advice is prose."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Details:
    """What is behind a finding: the rows of the block that ``doctor`` prints.

    Attributes:
        missing: Tensors that the framework expects and the checkpoint does not have.
        unexpected: Tensors that the checkpoint has and the framework does not expect.
        wrong: Tensors and settings that differ, each with both values.
        layers: In how many layers these tensors are missing, unexpected or wrong; 0 if unknown.
        where: The file and line of the framework's source that decides it.
        why: The cause, in full sentences. If empty, the finding's message is the cause.
        others: Other ways to fix it.
        more: Links.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    layers: int = 0
    where: str = ""
    why: str = ""
    others: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


NO_DETAILS = Details()


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a user should know about a checkpoint, a plan or a result.

    Attributes:
        code: A stable name for this kind of finding. It is printed. No code decides by it.
        severity: How bad it is.
        message: What it is, as a sentence without its period.
        remedy: What to do about it: a ``Command``, prose, or nothing.
        subject: What it is about. Of two findings on one subject, ``unrepeated`` shows one.
        details: What is behind it, where that is known.
    """

    code: str
    severity: Severity
    message: str
    remedy: str = ""
    subject: Subject = field(default="", kw_only=True)
    details: Details = field(default=NO_DETAILS, kw_only=True)


def unrepeated(
    findings: Iterable[Finding], others: Iterable[Finding], shown: Iterable[Subject] = ()
) -> list[Finding]:
    """The findings whose subjects ``others`` do not cover, to show both lists together.

    Args:
        findings: The list to shorten. A finding without a subject always stays.
        others: The findings that are shown too.
        shown: More subjects to leave out.
    """
    subjects = ({finding.subject for finding in others} | set(shown)) - {""}
    return [finding for finding in findings if finding.subject not in subjects]


DroppedKind = Literal["optimizer", "inv_freq", "setting", "stray", "merged", "other"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A part of the source that the target does not contain, and why.

    Attributes:
        name: What it is called in the source.
        reason: Why it is dropped, for people.
        kind: What it is, for code.
    """

    name: str
    reason: str
    kind: DroppedKind = "other"


def finding_json(finding: Finding) -> dict[str, str]:
    """A finding as plain data."""
    return {key: getattr(finding, key) for key in ("code", "severity", "message", "remedy")}
