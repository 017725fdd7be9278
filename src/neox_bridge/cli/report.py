"""``neox-bridge report``."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from neox_bridge.cli import values
from neox_bridge.cli.output import print_json, print_line
from neox_bridge.cli.progress import progress_bar
from neox_bridge.wording import human

if TYPE_CHECKING:
    from neox_bridge.report.parts import Section


def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="A checkpoint of any kind, a JSON file that convert, batch, verify, diff or "
            "audit printed with --json, or a folder of such files.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = "report.html",
    source: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="What the checkpoint PATH was made of: compared with it."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the page where it exists.")
    ] = False,
    max_workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads that read.")
    ] = None,
    as_json: values.AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Make one HTML page of checkpoints and of results: the verdict first, then layer by layer.

    The page is whole in itself: no script, nothing from the network. A checkpoint's weights are
    read once for their statistics.

    \b
    Examples:
      neox-bridge report pythia-neox --source pythia-410m
      neox-bridge diff run-a run-b --json > diff.json; neox-bridge report diff.json

    Exit codes: 0 written, 3 written, and it shows differences or faults, 1 error.
    """
    from neox_bridge.report.page import render, require, verdict_of
    from neox_bridge.report.read import inputs, today, write_page

    require()
    found = inputs(paths)
    checkpoints = [entry for entry in found if entry.document is None]
    if source is not None and len(checkpoints) != 1:
        raise typer.BadParameter("--source goes with one checkpoint among the PATHs.")
    write_page(output, None, overwrite)
    sections: list[Section] = []
    for entry in found:
        if entry.document is None:
            sections += _checkpoint(entry.name, source, len(sections), max_workers, quiet)
        else:
            from neox_bridge.report.sections import section_of

            sections.append(section_of(entry.document, entry.name, f"s{len(sections)}-"))
    title = sections[0].title if len(found) == 1 else f"{len(found)} results"
    page = render(title, sections, [("read", entry.said) for entry in found], today())
    write_page(output, page, overwrite)
    verdict = verdict_of(sections)
    if as_json:
        listed = [
            {
                "kind": section.kind,
                "title": section.title,
                "state": section.verdict.state,
                "words": section.verdict.words,
            }
            for section in sections
        ]
        print_json(
            {
                "schema_version": 1,
                "path": output,
                "state": verdict.state,
                "words": verdict.words,
                "sections": listed,
            }
        )
    elif not quiet:
        print_line(f"wrote {output}, {human(len(page.encode()))}: {verdict.words}")
    if not all(section.verdict.holds for section in sections):
        raise typer.Exit(3)


def _checkpoint(
    path: str, source: str | None, number: int, workers: int | None, quiet: bool
) -> list["Section"]:
    from neox_bridge.cli.inspect import describe, summary_lines
    from neox_bridge.layouts.open import open_checkpoint
    from neox_bridge.optimizer.masters import as_it_was_converted
    from neox_bridge.report.sections import checkpoint_section, verification_section
    from neox_bridge.verification.statistics import findings, statistics
    from neox_bridge.verification.verify import verify

    checkpoint = open_checkpoint(path)
    total = checkpoint.size * (1 if source is None else 2)
    with progress_bar(total, "reading", quiet) as progress:
        stats = statistics(checkpoint, workers=workers, progress=progress)
        compared = None
        if source is not None:
            first, said = as_it_was_converted(open_checkpoint(source), checkpoint)
            compared = verify(first, checkpoint, workers=workers, progress=progress)
            compared = replace(compared, findings=(*said, *compared.findings))
    found = [*checkpoint.findings, *findings(stats, checkpoint)]
    told = summary_lines(describe(checkpoint))
    made = [checkpoint_section(path, told, checkpoint.record, stats, found, f"s{number}-")]
    if compared is not None and source is not None:
        made.insert(0, verification_section(compared, source, path, f"s{number + 1}-"))
    return made
