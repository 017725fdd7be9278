"""The output of ``audit --json``, with or without --against, as a section."""

from collections.abc import Iterator, Sequence

from neox_bridge.report.figures import PLOTTED_RUNS, lines_plot
from neox_bridge.report.parts import (
    Document,
    Plot,
    Section,
    Table,
    Verdict,
    VerdictState,
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
        ranks += ", by names" if step.get("read_by") == "names" else ""
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
    """Plots of all runs, and of the tensors with findings or the kinds of weights of each run."""
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


def against_section(document: Document, name: str, _prefix: str) -> Section:
    """A row for each step of both runs, different ones first."""
    comparisons = document["comparisons"]
    rows = [row for comparison in comparisons for row in comparison["rows"]]
    counts = {
        status: sum(row["status"] == status for row in rows)
        for status in ("same", "differs", "unreadable", "no counterpart")
    }
    compared = counts["same"] + counts["differs"]
    what = f"{plural(compared, 'step')} compared with the same step of the counterpart"
    if document["holds"]:
        verdict = Verdict("good", f"Equal weights: {what}")
    else:
        words = [f"{counts[s]} {s}" for s in ("differs", "unreadable") if counts[s]]
        state: VerdictState = "differs" if counts["differs"] else "bad"
        verdict = Verdict(state, f"Different weights: {', '.join(words)} of {what}", holds=False)
    facts = [("runs", f"{c['source']} and {c['twin']}") for c in comparisons]
    facts += [(status, f"{count:,}") for status, count in counts.items() if count]
    tables: list[Table] = []
    for comparison in comparisons:
        title = f"{comparison['source']} and {comparison['twin']}"
        steps = comparison["rows"]
        wrong = [row for row in steps if row["status"] in ("differs", "unreadable")]
        tables += tables_of(_against_table, steps, title, wrong, f"{title}: steps that differ")
    return Section("Audit", name, verdict, facts, findings_of(document["findings"]), (), tables)


def _against_table(rows: Sequence[Document], caption: str, folded: bool) -> Table:
    head = ("step", "verdict", "tensors", "differ", "compared as", "found at", "why")
    lines = []
    for row in rows:
        casts = ", ".join(f"{source} and {twin}" for source, twin in row["casts"])
        origins = ", ".join(
            f"{origin['side']} step {origin['step']} ({origin['tensors']})"
            for origin in row["origins"]
        )
        cells = (str(row["label"]), str(row["status"]), f"{row['tensors']:,}")
        lines.append((*cells, f"{len(row['differences']):,}", casts, origins, str(row["reason"])))
    return Table(caption, head, "rlrrlll", lines, folded)
