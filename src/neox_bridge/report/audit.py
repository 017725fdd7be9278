"""What ``audit --json`` prints, as a section."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neox_bridge.report.figures import plot_of
from neox_bridge.report.parts import Plot, Section, Table, Verdict, findings_of, state_of
from neox_bridge.verification.norm_lines import Points, marks, run_lines, suspects, tensor_lines
from neox_bridge.wording import KINDS, human, plural

_OPEN = 24  # rows of a table that needn't be folded
_RUNS = 8  # runs with a plot of their own

Document = Mapping[str, Any]


def audit_section(document: Document, name: str, prefix: str) -> Section:
    """A row for each step, findings, and norms over the steps of each run."""
    findings, steps = findings_of(document["findings"]), document["steps"]
    runs = list(dict.fromkeys(str(step["run"]) for step in steps))
    what = f"{plural(len(steps), 'step')} of {plural(len(runs), 'run')}"
    if document["holds"]:
        verdict = Verdict("good", f"Nothing is wrong in {what}")
    else:
        counts = [
            plural(count, word)
            for word in ("error", "warning")
            if (count := sum(finding.severity == word for finding in findings))
        ]
        words = f"{' and '.join(counts) or 'Faults'} in {what}"
        verdict = Verdict(state_of(findings), words, holds=False)
    facts = [
        ("runs", ", ".join(runs)),
        ("steps", f"{len(steps):,}"),
        ("bytes", human(sum(step["bytes"] for step in steps))),
    ]
    wrong = [step for step in steps if step["verdict"] != "ok"]
    tables = []
    if wrong and len(steps) > _OPEN:
        tables.append(_table(wrong, "Steps with findings"))
    caption = f"All {len(steps):,} steps" if len(steps) > _OPEN else "Steps"
    tables.append(_table(steps, caption, len(steps) > _OPEN))
    plots = list(_plots(document, runs, prefix))
    return Section("Audit", name, verdict, facts, findings, plots, tables)


def _table(steps: Sequence[Document], caption: str, folded: bool = False) -> Table:
    head = ("run", "step", "verdict", "what", "dtype", "size", "tensors", "norm", "hash")
    rows = []
    for step in steps:
        ranks = f", TP {step['tensor_parallel']}" if step["kind"] == "neox" else ""
        rows.append(
            (
                str(step["run"]),
                str(step["label"]),
                str(step["verdict"]),
                KINDS[step["kind"]] + ranks,
                str(step["dtype"]),
                human(step["bytes"]),
                f"{len(step['tensors']):,}",
                f"{step['norm']:.5g}",
                str(step["hash"])[:12],
            )
        )
    return Table(caption, head, "lrlllrrrl", rows, folded)


def _plots(document: Document, runs: Sequence[str], prefix: str) -> Iterator[Plot]:
    """The runs beside each other, and of each the tensors with findings or the kinds of weights."""
    steps = [step for step in document["steps"] if step["step"] is not None]
    several = [run for run in runs if sum(step["run"] == run for step in steps) > 1]
    if len(several) > 1:
        whole = run_lines(steps)
        yield _plot("L2 norm of all weights over the steps.", whole, document, None, f"{prefix}n")
    for number, run in enumerate(several[:_RUNS]):
        own = [step for step in steps if step["run"] == run]
        names = suspects(document["findings"], run)
        what = "tensors with findings" if names else "each kind of weight"
        caption = f"{run}: L2 norm of {what} over the steps."
        yield _plot(caption, tensor_lines(own, names), document, run, f"{prefix}n{number}-")


def _plot(caption: str, lines: Points, document: Document, run: str | None, prefix: str) -> Plot:
    from neox_bridge.verification.lines_figure import lines_figure

    shown = marks(document["findings"], run)

    def draw() -> Any:
        return lines_figure("", lines, x_label="step", y_label="L2 norm", log=True, marks=shown)

    return plot_of(draw, caption, prefix)
