"""``neox-bridge report``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from neox_bridge.cli.command import Argument, command, only
from neox_bridge.cli.options import Execution, Output, Source
from neox_bridge.cli.output import print_json, print_line
from neox_bridge.cli.progress import progress_bar
from neox_bridge.cli.spelling import findings_as_options
from neox_bridge.documents import document
from neox_bridge.errors import UsageError
from neox_bridge.option import inherited, option
from neox_bridge.wording import human

if TYPE_CHECKING:
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.report.parts import Section, Verdict


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Options for the page and its inputs."""

    output: str = option(
        "report.html",
        "The page to write.",
        "--output",
        "-o",
        common=True,
        value="path",
        metavar="FILE",
    )
    source: str | None = option(
        None,
        "The checkpoint that PATH was converted from. The two are compared.",
        common=True,
        value="path",
        metavar="SRC",
    )
    overwrite: bool = inherited(
        Execution, "overwrite", False, text="Replace the page if it exists."
    )
    max_workers: int | None = inherited(Execution, "max_workers")


@command(
    "report",
    Argument(
        "paths",
        "PATH...",
        "A checkpoint in any format, a JSON file that convert, batch, verify, diff or audit "
        "printed with --json, or a folder of such files.",
        many=True,
        required=True,
    ),
    ReportOptions,
    only(Source, "configs"),
    Output,
)
def report(paths: tuple[str, ...], options: ReportOptions, reading: Source, output: Output) -> None:
    """Create one HTML page of checkpoints and results: the verdict first, then layer by layer.

    The page is self-contained, without scripts and network requests. The weights of a checkpoint
    are read once, for statistics. A Hugging Face model may be of any family.

    \b
    Examples:
      neox-bridge report pythia-neox --source pythia-410m
      neox-bridge diff run-a run-b --json > diff.json; neox-bridge report diff.json

    Exit codes: 0 written, 3 written, and it shows differences or faults, 1 error.
    """
    from neox_bridge.layouts.open import check_configs_used
    from neox_bridge.report.page import render, require, verdict_of
    from neox_bridge.report.read import inputs, today, write_page

    require()
    entries = inputs(list(paths))
    checkpoints = [entry for entry in entries if entry.document is None]
    if options.source is not None and len(checkpoints) != 1:
        raise UsageError(
            ["source"], f"needs exactly one checkpoint among the PATHs, not {len(checkpoints)}"
        )
    write_page(options.output, None, options.overwrite)
    opened = {entry.name: reading.open_any(entry.name) for entry in checkpoints}
    source = None if options.source is None else reading.open_any(options.source)
    check_configs_used(reading.configs, *opened.values(), *([source] if source else []))
    sections: list[Section] = []
    for entry in entries:
        if entry.document is None:
            checkpoint = opened.pop(entry.name)
            sections += _checkpoint(checkpoint, entry.name, source, len(sections), options, output)
        else:
            from neox_bridge.report.sections import section_of

            sections.append(section_of(entry.document, entry.name, f"s{len(sections)}-"))
    title = sections[0].title if len(entries) == 1 else f"{len(entries)} results"
    page = render(title, sections, [("read", entry.provenance) for entry in entries], today())
    write_page(options.output, page, options.overwrite)
    verdict = verdict_of(sections)
    if output.as_json:
        listed = [
            {"kind": section.kind, "title": section.title, **_state(section.verdict)}
            for section in sections
        ]
        sides = {"path": options.output, "paths": paths, "source": options.source}
        print_json(document(**sides, **_state(verdict), sections=listed))
    elif not output.quiet:
        print_line(f"wrote {options.output}, {human(len(page.encode()))}: {verdict.words}")
    if not all(section.verdict.holds for section in sections):
        raise click.exceptions.Exit(3)


def _state(verdict: Verdict) -> dict[str, str]:
    return {"state": verdict.state, "words": verdict.words}


def _checkpoint(
    checkpoint: Checkpoint | StoredModel,
    path: str,
    source: Checkpoint | StoredModel | None,
    number: int,
    options: ReportOptions,
    output: Output,
) -> list[Section]:
    from neox_bridge.cli.inspect import describe, summary_lines
    from neox_bridge.cli.inspect_stored import describe_stored, stored_lines
    from neox_bridge.conversion import comparison_of, verify_comparison
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.report.sections import checkpoint_section, verification_section
    from neox_bridge.verification.statistics import findings, statistics

    workers = options.max_workers
    total = checkpoint.size * (1 if source is None else 2)
    with progress_bar(total, "reading", output.quiet) as progress:
        stats = statistics(checkpoint, workers=workers, progress=progress)
        compared = None
        if source is not None:
            comparison = comparison_of(source, checkpoint)
            compared = verify_comparison(comparison, progress, workers=workers)
            compared = replace(compared, findings=findings_as_options(compared.findings))
    faults = findings_as_options((*checkpoint.findings, *findings(stats, checkpoint)))
    if isinstance(checkpoint, StoredModel):
        lines, record = stored_lines(describe_stored(checkpoint)), dict[str, Any]()
    else:
        lines, record = summary_lines(describe(checkpoint)), dict(checkpoint.record)
    parts = [checkpoint_section(path, lines, record, stats, faults, f"s{number}-")]
    if compared is not None and options.source is not None:
        parts.insert(0, verification_section(compared, options.source, path, f"s{number + 1}-"))
    return parts
