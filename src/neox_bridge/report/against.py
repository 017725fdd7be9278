"""What ``audit --against --json`` prints, as a section."""

from collections.abc import Sequence

from neox_bridge.report.parts import (
    Document,
    Section,
    Table,
    Verdict,
    VerdictState,
    findings_of,
    tables_of,
)
from neox_bridge.wording import plural


def against_section(document: Document, name: str, _prefix: str) -> Section:
    """A row for each step of both runs, those that are not the same first."""
    comparisons = document["comparisons"]
    rows = [row for comparison in comparisons for row in comparison["rows"]]
    counts = {
        status: sum(row["status"] == status for row in rows)
        for status in ("same", "differs", "unreadable", "no counterpart")
    }
    compared = counts["same"] + counts["differs"]
    what = f"{plural(compared, 'step')} compared with the same step of the counterpart"
    if document["holds"]:
        verdict = Verdict("good", f"The same weights: {what}")
    else:
        words = [f"{counts[s]} {s}" for s in ("differs", "unreadable") if counts[s]]
        state: VerdictState = "differs" if counts["differs"] else "bad"
        verdict = Verdict(state, f"Not the same weights: {', '.join(words)} of {what}", holds=False)
    facts = [("runs", f"{c['source']} and {c['twin']}") for c in comparisons]
    facts += [(status, f"{count:,}") for status, count in counts.items() if count]
    tables: list[Table] = []
    for comparison in comparisons:
        title = f"{comparison['source']} and {comparison['twin']}"
        steps = comparison["rows"]
        wrong = [row for row in steps if row["status"] in ("differs", "unreadable")]
        tables += tables_of(_table, steps, title, wrong, f"{title}: steps that are not the same")
    return Section("Audit", name, verdict, facts, findings_of(document["findings"]), (), tables)


def _table(rows: Sequence[Document], caption: str, folded: bool) -> Table:
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
