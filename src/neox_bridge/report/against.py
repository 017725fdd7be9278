"""What ``audit --against --json`` prints, as a section."""

from collections.abc import Mapping, Sequence
from typing import Any

from neox_bridge.report.parts import Section, State, Table, Verdict, findings_of
from neox_bridge.wording import plural

_OPEN = 24  # rows of a table that needn't be folded

Document = Mapping[str, Any]


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
        state: State = "differs" if counts["differs"] else "bad"
        verdict = Verdict(state, f"Not the same weights: {', '.join(words)} of {what}", holds=False)
    facts = [("runs", f"{c['source']} and {c['twin']}") for c in comparisons]
    facts += [(status, f"{count:,}") for status, count in counts.items() if count]
    tables = []
    for comparison in comparisons:
        title = f"{comparison['source']} and {comparison['twin']}"
        found = comparison["rows"]
        wrong = [row for row in found if row["status"] in ("differs", "unreadable")]
        if wrong and len(found) > _OPEN:
            tables.append(_table(wrong, f"{title}: steps that are not the same"))
        tables.append(_table(found, title, len(found) > _OPEN))
    return Section("Audit", name, verdict, facts, findings_of(document["findings"]), (), tables)


def _table(rows: Sequence[Document], caption: str, folded: bool = False) -> Table:
    head = ("step", "verdict", "tensors", "differ", "compared as", "found at", "why")
    found = []
    for row in rows:
        casts = ", ".join(f"{source} and {twin}" for source, twin in row["casts"])
        origins = ", ".join(
            f"{origin['side']} step {origin['step']} ({origin['tensors']})"
            for origin in row["origins"]
        )
        cells = (str(row["label"]), str(row["status"]), f"{row['tensors']:,}")
        found.append((*cells, f"{len(row['differences']):,}", casts, origins, str(row["reason"])))
    return Table(caption, head, "rlrrlll", found, folded)
