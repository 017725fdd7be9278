"""The norms of an audit over its steps, as lines to draw, from what ``audit --json`` prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Points = dict[str, list[tuple[float, float]]]
Entries = Iterable[Mapping[str, Any]]
_MOST = 10  # tensors per plot; more lines would hide each other


def run_lines(steps: Entries) -> Points:
    """Each run's norm of all its tensors together."""
    lines: Points = {}
    for step in steps:
        lines.setdefault(step["run"], []).append((float(step["step"]), step["norm"]))
    return lines


def tensor_lines(steps: Entries, names: Sequence[str]) -> Points:
    """Norms of these tensors, or else of all tensors of the same kind together."""
    from neox_bridge.verification.drawing import place_of

    lines: Points = {}
    for step in steps:
        squares: dict[str, float] = {}
        for name, tensor in step["tensors"].items():
            if tensor["norm"] is not None and (name in names or not names):
                line = name if names else place_of(name)[0]
                squares[line] = squares.get(line, 0.0) + tensor["norm"] ** 2
        for line, square in squares.items():
            lines.setdefault(line, []).append((float(step["step"]), square**0.5))
    return lines


def suspects(findings: Entries, run: str | None = None) -> list[str]:
    """The first tensors with findings, in one run or in all."""
    wrong = [name for finding in _wrong(findings, run) for name in finding["tensors"]]
    return list(dict.fromkeys(wrong))[:_MOST]


def marks(findings: Entries, run: str | None = None) -> list[tuple[float, str]]:
    """Steps with findings and their codes, in one run or in all."""
    points = {
        (float(label), str(finding["code"]))
        for finding in _wrong(findings, run)
        for label in finding["steps"]
        if str(label).isdecimal()
    }
    return sorted(points)


def _wrong(findings: Entries, run: str | None) -> Entries:
    return [f for f in findings if f["severity"] != "info" and run in (None, f["run"])]
