"""What a page is made of, as plain data."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neox_bridge.findings import Finding

VerdictState = Literal["good", "neutral", "warning", "differs", "bad"]
# from the best to the worst: a page is as its worst section
STATES: tuple[VerdictState, ...] = ("neutral", "good", "warning", "differs", "bad")
Facts = Sequence[tuple[str, str]]
Document = Mapping[str, Any]  # what a command printed with --json, or a part of it
_OPEN_ROWS = 24  # of a table that needn't be folded


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it stands, in words; state: the colour and sign that go with them.

    holds: whether the command that found it ends with exit code 0.
    """

    state: VerdictState
    words: str
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. align: a letter a column, l or r. folded: shown when asked for."""

    caption: str
    head: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]
    folded: bool = True


@dataclass(frozen=True, slots=True)
class Plot:
    """One ``<svg>`` element, and what it shows. width: in CSS pixels, of its natural size."""

    svg: str
    caption: str
    width: int


@dataclass(frozen=True, slots=True)
class Section:
    """One result. provenance: where it comes from, for the foot of the page."""

    kind: str
    title: str
    verdict: Verdict
    facts: Facts = ()
    findings: Sequence[Finding] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    provenance: Facts = ()


def tables_of(
    table: Callable[[Sequence[Document], str, bool], Table],
    rows: Sequence[Document],
    caption: str,
    wrong: Sequence[Document],
    wrong_caption: str,
) -> list[Table]:
    """All rows as a table; where they are many, it is folded below one of those that are wrong."""
    many = len(rows) > _OPEN_ROWS
    first = [table(wrong, wrong_caption, False)] if wrong and many else []
    return [*first, table(rows, caption, many)]


def findings_of(listed: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Findings that were printed as JSON."""
    words = ("code", "severity", "message", "remedy")
    return [Finding(*(str(entry.get(word, "")) for word in words)) for entry in listed]  # type: ignore[arg-type]


def number(value: object) -> float:
    """A number as ``print_json`` writes it: "Infinity" is text, and null is not a number."""
    return math.nan if value is None else float(str(value))


def worst(states: Iterable[VerdictState]) -> VerdictState:
    """The worst of several states."""
    return max(states, key=STATES.index, default="neutral")


def state_of(findings: Iterable[Finding]) -> VerdictState:
    """Errors are bad, warnings a warning; without them all is good."""
    states: dict[str, VerdictState] = {"error": "bad", "warning": "warning"}
    return worst(["good", *(states.get(finding.severity, "good") for finding in findings)])
