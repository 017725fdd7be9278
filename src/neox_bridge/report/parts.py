"""The parts of a page, as plain data."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neox_bridge.findings import Finding

VerdictState = Literal["good", "neutral", "warning", "differs", "bad"]
# from best to worst; a page has the state of its worst section
STATES: tuple[VerdictState, ...] = ("neutral", "good", "warning", "differs", "bad")
Facts = Sequence[tuple[str, str]]
Document = Mapping[str, Any]  # the output of a command with --json, or a part of it
_OPEN_ROWS = 24  # rows of a table that need not be folded


@dataclass(frozen=True, slots=True)
class Verdict:
    """A result in words. state: its color and symbol.

    holds: whether the command that found it ends with exit code 0.
    """

    state: VerdictState
    words: str
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. align: one letter per column, l or r. folded: whether it starts collapsed."""

    caption: str
    head: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]
    folded: bool = True


@dataclass(frozen=True, slots=True)
class Plot:
    """One ``<svg>`` element and its caption. width: its natural width in CSS pixels."""

    svg: str
    caption: str
    width: int


@dataclass(frozen=True, slots=True)
class Section:
    """One result. provenance: its origin, for the page footer."""

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
    """All rows as a table. A long table is folded below a table of the faulty rows."""
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
    """The worst of these states."""
    return max(states, key=STATES.index, default="neutral")


def state_of(findings: Iterable[Finding]) -> VerdictState:
    """Errors are "bad", warnings "warning"; without any, the state is "good"."""
    states: dict[str, VerdictState] = {"error": "bad", "warning": "warning"}
    return worst(["good", *(states.get(finding.severity, "good") for finding in findings)])
