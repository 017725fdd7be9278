"""What ``audit --json`` prints, as a section."""

from collections.abc import Iterator, Sequence

from neox_bridge.report.figures import PLOTTED_RUNS, lines_plot
from neox_bridge.report.parts import (
    Document,
    Plot,
    Section,
    Table,
    Verdict,
    findings_of,
    state_of,
    tables_of,
)
from neox_bridge.verification.norm_lines import marks, run_lines, suspects, tensor_lines
from neox_bridge.wording import KINDS, human, plural


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
    tables = tables_of(_table, steps, plural(len(steps), "step"), wrong, "Steps with findings")
    plots = list(_plots(document, runs, prefix))
    return Section("Audit", name, verdict, facts, findings, plots, tables)


def _table(steps: Sequence[Document], caption: str, folded: bool) -> Table:
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
        marked = marks(document["findings"])
        caption = "L2 norm of all weights over the steps."
        yield lines_plot(caption, run_lines(steps), f"{prefix}n", marks=marked)
    for number, run in enumerate(several[:PLOTTED_RUNS]):
        of_run = [step for step in steps if step["run"] == run]
        names = suspects(document["findings"], run)
        what = "tensors with findings" if names else "each kind of weight"
        caption = f"{run}: L2 norm of {what} over the steps."
        marked = marks(document["findings"], run)
        yield lines_plot(caption, tensor_lines(of_run, names), f"{prefix}n{number}-", marks=marked)
