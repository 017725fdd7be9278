"""``neox-bridge changes``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from neox_bridge.cli import values
from neox_bridge.cli.output import print_json, print_line

if TYPE_CHECKING:
    from neox_bridge.frameworks.change import Change, Moment


def changes(
    framework: Annotated[
        str | None,
        typer.Option(**values.one_of("gpt-neox", "transformers"), help="Those of one only."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="X", help="From this on: a transformers version (4.30) or a date (2024-03)."
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="Y", help="Up to this, in the same words; included.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="PATH", help="Those that touch this checkpoint or Hub model only."
        ),
    ] = None,
    as_json: values.AsJson = False,
) -> None:
    """List the changes of GPT-NeoX and transformers that break checkpoints, newest first.

    \b
    Examples:
      neox-bridge changes --framework transformers --since 4.30 --until 5.23
      neox-bridge changes --for checkpoints/
    """
    from neox_bridge.frameworks.changes import select

    checkpoint = None
    start, end = _moment(since), _moment(until)
    if path is not None:
        from neox_bridge.layouts.open import open_checkpoint

        checkpoint = open_checkpoint(path)
    found = select(framework, start, end, checkpoint)  # type: ignore[arg-type]
    if as_json:
        print_json({"schema_version": 1, "changes": [describe(change) for change in found]})
        return
    for change in found:
        for line in _lines(change):
            print_line(line)
    if not found:
        print_line("no known change fits")


def describe(change: "Change") -> dict[str, Any]:
    """A change as plain data, without its detectors."""
    return {
        "id": change.id,
        "framework": change.framework,
        "commit": change.commit or None,
        "pull": change.pull or None,
        "date": change.date,
        "version": change.version or None,
        "families": list(change.families),
        "title": change.title,
        "symptom": change.symptom,
        "loud": change.loud,
        "remedy": change.remedy,
        "link": change.link,
    }


def _moment(text: str | None) -> "Moment | None":
    from neox_bridge.errors import BridgeError
    from neox_bridge.frameworks.change import parse_moment

    try:
        return None if text is None else parse_moment(text)
    except BridgeError as error:
        raise typer.BadParameter(str(error)) from None


def _lines(change: "Change") -> list[str]:
    from neox_bridge.frameworks.page import where

    return [
        f"{change.date}  {where(change)}  {change.id}",
        f"  what     {change.title}",
        f"  {'loud' if change.loud else 'silent'}{'':{5 if change.loud else 3}}{change.symptom}",
        f"  to do    {change.remedy}",
        f"  link     {change.link}",
    ]
