"""The output of ``batch --json`` as a section."""

from collections.abc import Iterator, Sequence

from neox_bridge.findings import Finding
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
from neox_bridge.verification.norm_lines import tensor_lines
from neox_bridge.wording import human, plural


def batch_section(document: Document, name: str, prefix: str) -> Section:
    """A row for each checkpoint, their findings, and sizes, rates and norms over the steps."""
    rows = document["rows"]
    counts = {s: sum(row["status"] == s for row in rows) for s in ("done", "skipped", "failed")}
    summary = ", ".join(f"{count:,} {status}" for status, count in counts.items() if count)
    findings = _findings(rows)
    if document["holds"]:
        state = "good" if state_of(findings) == "bad" else state_of(findings)
        verdict = Verdict(state, f"{plural(len(rows), 'checkpoint')}: {summary or 'none'}")
    else:
        words = f"{counts['failed']:,} of {plural(len(rows), 'checkpoint')} failed"
        verdict = Verdict("bad", words, holds=False)
    done = [row for row in rows if row["status"] == "done"]
    facts = [
        ("target", str(document["batch"])),
        ("checkpoints", f"{len(rows):,}: {summary}"),
        ("written", human(sum(row["size"] for row in done))),
        ("verified", _verified(done)),
    ]
    failed = [row for row in rows if row["status"] == "failed"]
    tables = tables_of(_table, rows, "Checkpoints", failed, "Failed")
    return Section("Batch", name, verdict, facts, findings, list(_plots(rows, prefix)), tables)


def _verified(done: Sequence[Document]) -> str:
    """How many results equal their sources bit by bit, and how many after a cast."""
    checked = [row for row in done if row["verified"] is True]
    cast = sum(bool(row.get("casts")) for row in checked)
    words = [f"{len(checked) - cast:,} bit by bit"]
    return ", ".join([*words, f"{cast:,} after a cast"] if cast else words)


def _findings(rows: Sequence[Document]) -> list[Finding]:
    """Failures, and each other finding once, with its checkpoints."""
    findings = [
        Finding("failed", "error", f"{row['name']}: {row['error']}", "")
        for row in rows
        if row["status"] == "failed"
    ]
    alike: dict[Finding, list[str]] = {}
    for row in rows:
        for finding in findings_of(row["findings"]):
            alike.setdefault(finding, []).append(str(row["name"]))
    for one, names in alike.items():
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
        findings.append(Finding(one.code, one.severity, f"{where}: {one.message}", one.remedy))
    return findings


def _table(rows: Sequence[Document], caption: str, folded: bool) -> Table:
    head = ("checkpoint", "status", "files", "size", "shared", "seconds", "rate", "tries")
    cells = []
    for row in rows:
        done = row["status"] == "done"
        cells.append(
            (
                str(row["name"]),
                str(row["status"]),
                f"{row['files']:,}",
                human(row["size"]),
                f"{row['shared'] / row['size']:.0%}" if done and row["size"] else "",
                f"{row['seconds']:.1f}" if done else "",
                f"{human(row['size'] / row['seconds'])}/s" if done and row["seconds"] else "",
                f"{row['tries']:,}",
            )
        )
    return Table(caption, head, "llrrrrrr", cells, folded)


def _plots(rows: Sequence[Document], prefix: str) -> Iterator[Plot]:
    numbered = [row for row in rows if row["number"] is not None]
    runs = list(dict.fromkeys(str(row["run"]) for row in numbered))
    for number, run in enumerate(runs[:PLOTTED_RUNS]):
        steps = [
            {"step": row["number"], "tensors": {n: {"norm": v} for n, v in row["norms"].items()}}
            for row in numbered
            if row["run"] == run and row["norms"]
        ]
        if len(steps) > 1:
            caption = f"{run}: L2 norm of each kind of weight over the steps."
            yield lines_plot(caption, tensor_lines(steps, ()), f"{prefix}n{number}-")
    done = [row for row in numbered if row["status"] == "done" and row["seconds"]]
    if len(done) > 1:
        rates: dict[str, list[tuple[float, float]]] = {run: [] for run in runs}
        for row in done:
            rate = row["size"] / row["seconds"] / 1e6
            rates[str(row["run"])].append((float(row["number"]), rate))
        yield lines_plot("Rate over the steps.", rates, f"{prefix}r", y_label="MB/s", log=False)
