"""``neox-bridge changes``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.command import command, only
from neox_bridge.cli.options import Output
from neox_bridge.cli.output import print_json, print_line
from neox_bridge.documents import document
from neox_bridge.option import option

if TYPE_CHECKING:
    from neox_bridge.frameworks.change import Change, Framework, Moment


@dataclass(frozen=True, slots=True)
class ChangesOptions:
    """Options for the listed changes."""

    framework: Framework | None = option(
        None,
        "Only changes in this framework.",
        common=True,
        choices=("gpt-neox", "transformers"),
    )
    since: Moment | None = option(
        None,
        "Only changes since this transformers version (4.30) or date (2024-03).",
        common=True,
        value="moment",
    )
    until: Moment | None = option(
        None,
        "Only changes up to and including this transformers version or date.",
        common=True,
        value="moment",
    )
    path: str | None = option(
        None,
        "Only changes that affect this checkpoint or Hub model.",
        "--for",
        common=True,
        value="path",
    )


@command("changes", ChangesOptions, only(Output, "as_json"))
def changes(choice: ChangesOptions, output: Output) -> None:
    """List changes in GPT-NeoX and transformers that break checkpoints, newest first.

    \b
    Examples:
      neox-bridge changes --framework transformers --since 4.30 --until 5.23
      neox-bridge changes --for checkpoints/
    """
    from neox_bridge.frameworks.changes import select

    checkpoint = None
    if choice.path is not None:
        from neox_bridge.layouts.open import open_checkpoint

        checkpoint = open_checkpoint(choice.path)
    selected = select(choice.framework, choice.since, choice.until, checkpoint)
    if output.as_json:
        print_json(document(path=choice.path, changes=[describe(change) for change in selected]))
        return
    for change in selected:
        for line in _lines(change):
            print_line(line)
    if not selected:
        print_line("no known change matches")


def describe(change: Change) -> dict[str, Any]:
    """A change as plain data, without its detectors."""
    return {
        "id": change.id,
        "framework": change.framework,
        "commit": change.commit or None,
        "pull": change.pull or None,
        "date": change.date,
        "version": change.version or None,
        "proposed": change.proposed,
        "families": list(change.families),
        "title": change.title,
        "symptom": change.symptom,
        "loud": change.loud,
        "remedy": change.remedy,
        "link": change.link,
    }


def _lines(change: Change) -> list[str]:
    from neox_bridge.frameworks.page import where

    return [
        f"{change.date}  {where(change)}  {change.id}",
        f"  what     {change.title}",
        f"  {'loud' if change.loud else 'silent'}{'':{5 if change.loud else 3}}{change.symptom}",
        f"  fix      {change.remedy}",
        f"  link     {change.link}",
    ]
