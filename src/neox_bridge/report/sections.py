"""Turns JSON output of convert, verify and diff, and checkpoints, into sections of a page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.planning.casts import Cast, equality
from neox_bridge.report.audit import against_section, audit_section
from neox_bridge.report.batch import batch_section
from neox_bridge.report.figures import plot_of
from neox_bridge.report.parts import (
    Document,
    Facts,
    Plot,
    Section,
    Table,
    Verdict,
    findings_of,
    number,
    state_of,
)
from neox_bridge.verification.compare import ONE_SIDED, Difference
from neox_bridge.verification.statistics import Statistics
from neox_bridge.verification.verify import Verification, describe
from neox_bridge.wording import KINDS, human, plural, side

# lines of ``inspect`` that appear as title, findings and provenance
_ELSEWHERE = ("path", "written by", "error", "warning", "info")
_MOST_ROWS = 5_000  # of a table of tensors, so that a browser can show it
_MOST_PANELS = 40  # of the plot
_MOST_OUTSIDE = 60  # tensors outside the blocks in the plot
_OPEN = 12  # rows up to which a table is not folded


def section_of(document: object, name: str, prefix: str) -> Section:
    """The section of one JSON document. prefix: of ids in its plots.

    Raises BridgeError for unknown or incomplete documents.
    """
    keys = set(document) if isinstance(document, dict) else set()
    for word, wanted, build in (
        ("verify", {"holds", "differences"}, _verification),
        ("audit", {"holds", "findings", "steps"}, audit_section),
        ("audit", {"holds", "findings", "comparisons"}, against_section),
        ("batch", {"batch", "holds", "rows"}, batch_section),
        ("diff", {"equal", "tensors"}, _diff),
        ("convert", {"result", "summary", "target"}, _conversion),
        ("convert", {"hash", "summary", "files", "target"}, _conversion),
    ):
        if wanted <= keys:
            try:
                return build(document, name, prefix)  # type: ignore[arg-type]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
                raise BridgeError(
                    f"{name} looks like a result of {word}, but is incomplete ({problem}). Print "
                    "it again with --json."
                ) from None
    raise BridgeError(
        f"{name} is not a result that a report can show. Give the output of convert, batch, "
        "verify, diff or audit with --json, or the folder of a checkpoint."
    )


def checkpoint_section(
    name: str,
    lines: Facts,
    record: Mapping[str, Any],
    stats: Sequence[Statistics],
    findings: Sequence[Finding],
    prefix: str,
) -> Section:
    """A checkpoint: its facts, its tensors layer by layer, and its origin.

    Args:
        lines: The output of ``inspect``.
        record: Its ``neox_bridge.json``, if there is one.
    """
    from neox_bridge.verification.statistics_figure import statistics_figure

    drawn = _drawn(stats)
    state = state_of(findings)
    faults = sum(finding.severity in ("error", "warning") for finding in findings)
    words = (
        f"{plural(faults, 'finding')} in {plural(len(stats), 'tensor')}"
        if faults
        else _sound(stats)
    )
    plot = plot_of(
        lambda: statistics_figure(drawn),
        "Each kind of weight over the layers: standard deviation and largest absolute value."
        + (" Not every tensor is drawn." if len(drawn) < len(stats) else ""),
        prefix,
    )
    written = "written_by" in record
    return Section(
        "Conversion" if written else "Checkpoint",
        name,
        Verdict(state, words, holds=state != "bad"),
        [(key, text) for key, text in lines if key not in _ELSEWHERE],
        findings,
        [plot] if drawn else [],
        [_statistics_table(stats), *_settings(record)],
        _origin(record),
    )


def _sound(stats: Sequence[Statistics]) -> str:
    """The verdict on tensors without findings. Those that were not decoded are not judged."""
    decoded = sum(one.decoded for one in stats)
    rest = "" if decoded == len(stats) else f"; {len(stats) - decoded:,} not decoded"
    if not decoded:
        return f"Not judged: {plural(len(stats), 'tensor')} not decoded"
    return f"Sound: {plural(decoded, 'tensor')} without NaN, infinities or dead weights{rest}"


def verification_section(result: Verification, source: str, name: str, prefix: str) -> Section:
    """A verification of ``name``. Paths are not shown, because a page may be shared."""
    named = {"holds": result.holds, "source": source, "target": name}
    return _verification({**asdict(result), **named}, name, prefix)


def _verification(document: Document, name: str, prefix: str) -> Section:
    apart = [_difference(entry) for entry in document["differences"]]
    findings = findings_of(document["findings"])
    computed = {word: document[word] for word in ("logits", "recorded") if word in document}
    tensors, size = int(document["tensors"]), human(document["size"])
    if document["holds"]:
        more = ", and equal logits" if computed else ""
        words = equality(_casts(document)).capitalize()
        verdict = Verdict("good", f"{words}: {plural(tensors, 'tensor')}, {size}{more}")
    else:
        errors = sum(finding.severity == "error" for finding in findings)
        what = [plural(len(apart), "tensor")] if apart else []
        what += [plural(errors, "finding")] if errors else []
        what += [f"the {word}" for word, agreement in computed.items() if not agreement["agrees"]]
        verdict = Verdict("bad", f"Different from the source: {', '.join(what)}", holds=False)
    facts = [
        ("source", str(document["source"])),
        ("target", str(document["target"])),
        ("compared", f"{plural(tensors, 'tensor')}, {size}, read back from the target"),
        ("differing", plural(len(apart), "tensor")),
    ]
    for word, agreement in computed.items():
        facts.append((word, _agreement(agreement)))
        findings += _causes(agreement)
    plots = [_difference_plot(apart, prefix)] if apart else []
    tables = [_differences_table(apart, "Tensors that differ")] if apart else []
    return Section("Verification", name, verdict, facts, findings, plots, tables)


def _difference(entry: Document) -> Difference:
    """A difference that was printed as JSON, where an infinite number is text."""
    numbers = {key: number(entry[key]) for key in ("largest", "mean", "relative") if key in entry}
    return Difference(**{**entry, **numbers})


def _casts(document: Document) -> list[Cast]:
    """The casts of a document; none in one of an older version."""
    return [Cast(**cast) for cast in document.get("casts") or ()]


def _agreement(agreement: Document) -> str:
    """The result of ``verify --logits`` without the causes."""
    if odd := agreement.get("non_finite"):
        words = "another model"
        if odd["same_places"]:
            words = "at the same places on both sides, so they cannot be compared"
        first = f"; the first non-finite weight: {odd['tensor']}" if odd["tensor"] else ""
        return f"NaN or infinite for {plural(int(odd['tokens']), 'token')}: {words}{first}"
    sentence = (
        f"of {plural(int(agreement['tokens']), 'token')}: {agreement['largest']:.3g} apart at most "
        f"(relative {agreement['relative']:.2g}, mean {agreement['mean']:.3g}), "
        f"KL {agreement['kl']:.2g}, top-1 {agreement['top1']:.1%}"
    )
    if agreement["place"]:
        share = f"{number(agreement['apart']):.2g} of its largest value"
        sentence += f"; first difference: {agreement['place']}, by {share}"
    return f"{sentence}: {'the same model' if agreement['agrees'] else 'another model'}"


def _causes(agreement: Document) -> list[Finding]:
    return [
        Finding(
            str(cause["cause"]),
            "info" if cause["inherent"] else "error",
            f"likely cause: {cause['cause']}: {cause['text']}",
            "no conversion can remove this difference" if cause["inherent"] else "",
        )
        for cause in agreement["causes"]
    ]


def _diff(document: Document, name: str, prefix: str) -> Section:
    differences = [_difference(entry) for entry in document["tensors"]]
    apart = [difference for difference in differences if difference.kind != "equal"]
    equal = len(differences) - len(apart)
    if document["equal"]:
        verdict = Verdict("good", f"Equal: {plural(len(differences), 'tensor')}")
    else:
        summary = f"Different: {len(apart):,} of {plural(len(differences), 'tensor')}"
        verdict = Verdict("differs", summary, holds=False)
    kinds = Counter(difference.kind for difference in apart)
    words: dict[str, str] = {
        "values": "other values",
        "shape": "other shapes",
        "dtype": "other dtypes",
        **ONE_SIDED,
        "replicas": "ranks that differ",
    }
    facts = [("tensors", f"{len(differences):,}"), ("equal", f"{equal:,}")]
    facts += [(words.get(kind, kind), f"{count:,}") for kind, count in kinds.items()]
    plots = [_difference_plot(differences, prefix)] if apart else []
    tables = []
    if apart:
        title = "Largest relative differences" if len(apart) > _OPEN else "Tensors that differ"
        tables.append(_differences_table(apart[:_OPEN], title))
        if len(apart) > _OPEN:
            tables.append(_differences_table(apart, f"All {len(apart):,} that differ", folded=True))
    return Section("Diff", name, verdict, facts, (), plots, tables)


def _conversion(document: Document, name: str, _prefix: str) -> Section:
    result, numbers = document.get("result"), document["summary"]
    source, target = document["source"], document["target"]
    findings = findings_of([*document["findings"], *((result or {}).get("findings") or ())])
    state = state_of(findings)
    if result is None:
        verdict = Verdict("neutral", "Planned: nothing was written")
    elif document.get("verified"):
        words = equality(_casts(document)).replace("equal", "equal to the source", 1)
        verdict = Verdict(state, f"Written, read back and {words}")
    else:
        verdict = Verdict("warning", "Written, but not compared with the source")
    facts = [
        *_source(source),
        ("target", side(target) + (f": {result['target']}" if result else "")),
        ("parameters", f"{int(target['parameters']):,}"),
        ("files", plural(int(numbers["files"]), "file") + f", {human(numbers['bytes'])}"),
        (
            "bytes",
            f"{human(numbers['bytes_copied'])} copied as they are, "
            f"{human(numbers['bytes_transformed'])} transformed, "
            f"{human(numbers['bytes_from_plan'])} headers and small files",
        ),
    ]
    if result:
        seconds = float(result["seconds"])
        rate = human(result["size"] / max(seconds, 1e-3))
        facts.append(("time", f"{seconds:.1f} s, {rate}/s"))
    facts += [("note", str(note)) for note in document["notes"]]
    facts += [("fill in", f"{blank['key']} in {blank['file']}") for blank in document["blanks"]]
    rows = [(str(drop["name"]), str(drop["reason"])) for drop in document["dropped"]]
    facts.append(("dropped", f"{len(rows):,}" if rows else "nothing"))
    tables = []
    if rows:
        tables.append(Table("Dropped", ("what", "why"), "ll", rows, len(rows) > _OPEN))
    if isinstance(document.get("files"), list):
        files = [
            (str(file["path"]), human(file["size"]), f"{len(file['tensors']):,}")
            for file in document["files"]
        ]
        tables.append(Table("Files", ("file", "size", "tensors"), "lrr", files))
    provenance = [("plan", str(document["hash"]))] if "hash" in document else []
    return Section(
        "Conversion" if result else "Plan",
        str(result["target"]) if result else name,
        verdict,
        facts,
        findings,
        [],
        tables,
        provenance,
    )


def _difference_plot(differences: Sequence[Difference], prefix: str) -> Plot:
    from neox_bridge.verification.differences_figure import differences_figure

    return plot_of(
        lambda: differences_figure(differences),
        "Largest relative difference of each tensor, layer by layer.",
        prefix,
    )


def _differences_table(
    differences: Sequence[Difference], caption: str, folded: bool | None = None
) -> Table:
    rows = []
    for difference in differences:
        words = describe(difference).removeprefix(difference.name).lstrip(": ")
        numbers = ["", "", "", ""]
        if difference.kind == "values":
            words = words if difference.detail else "values"
            sizes = (difference.relative, difference.largest, difference.mean)
            counts = f"{difference.differing:,} of {difference.elements:,}"
            numbers = [counts, *map(_number, sizes)]
        rows.append((difference.name, words, *numbers))
    head = ("tensor", "what", "elements", "relative", "largest", "mean")
    return Table(caption, head, "llrrrr", rows, len(rows) > _OPEN if folded is None else folded)


def _drawn(stats: Sequence[Statistics]) -> list[Statistics]:
    """The tensors of the plot: those that are decoded, unless there are too many kinds."""
    from neox_bridge.verification.drawing import place_of

    decoded = [s for s in stats if s.decoded]
    places = [place_of(s.name) for s in decoded]
    kinds = list(dict.fromkeys(kind for kind, block in places if block is not None))[:_MOST_PANELS]
    outside = [s for s, (_, block) in zip(decoded, places, strict=True) if block is None]
    kept = {s.name for s in outside[:_MOST_OUTSIDE]}
    kept |= {s.name for s, (kind, _) in zip(decoded, places, strict=True) if kind in kinds}
    return [s for s in decoded if s.name in kept]


def _statistics_table(stats: Sequence[Statistics]) -> Table:
    head = ("tensor", "dtype", "shape", "min", "max", "mean", "std", "zeros", "NaN", "Inf")
    rows = [
        (
            s.name,
            s.dtype,
            str(list(s.shape)),
            *_numbers(s),
        )
        for s in stats[:_MOST_ROWS]
    ]
    shown = f"All {plural(len(stats), 'tensor')}"
    if len(rows) < len(stats):
        shown = f"The first {len(rows):,} of {len(stats):,} tensors"
    return Table(shown, head, "lllrrrrrrr", rows)


def _numbers(s: Statistics) -> tuple[str, ...]:
    if not s.decoded:
        return ("not decoded", *[""] * 6)
    measured = (_number(value) for value in (s.minimum, s.maximum, s.mean, s.std))
    zeros = f"{s.zeros:.1%}" if s.zeros else "0"
    return (*measured, zeros, f"{s.nans:,}", f"{s.infs:,}")


def _origin(record: Mapping[str, Any]) -> Facts:
    if "written_by" not in record:
        return []
    source = record.get("source")
    known = _source(source) if isinstance(source, Mapping) else []
    return [("written by", str(record["written_by"])), *known]


def _source(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The source of a conversion. Documents of other versions are shown unchanged."""
    if not {"kind", "dtype"} <= set(source) or source["kind"] not in KINDS:
        return _flat(source)
    more = [(key, str(source[key])) for key in ("revision", "iteration") if key in source]
    return [("source", f"{side(source)}: {source.get('name', '')}"), *more]


def _settings(record: Mapping[str, Any]) -> list[Table]:
    """The settings of the run or the model that the conversion kept."""
    neox = record.get("neox")
    kept = (
        ("Settings of the GPT-NeoX run", neox.get("yml") if isinstance(neox, Mapping) else None),
        ("config.json of the source", record.get("config")),
    )
    return [
        Table(caption, ("key", "value"), "ll", _flat(values))
        for caption, values in kept
        if isinstance(values, Mapping) and values
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of text: ``optimizer.type``."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _number(value: float) -> str:
    return f"{float(value):.3g}".replace("e-0", "e-")
