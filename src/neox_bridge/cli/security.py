"""What ``neox-bridge inspect --security`` prints."""

import os
from typing import TYPE_CHECKING, Any

import click

from neox_bridge.cli.output import print_json, print_line, say
from neox_bridge.documents import document
from neox_bridge.wording import plain, plural

if TYPE_CHECKING:
    from neox_bridge.formats.pickle_security import Report, Use

_MOST = 50  # names that are printed per file; --json lists all


def print_security(path: str, as_json: bool) -> None:
    """Print the names in every file, and the verdict. Exit code 1 if a name is not known."""
    from neox_bridge.layouts.security import scan_path

    reports = scan_path(path)
    bad = [report for report in reports if not report.harmless]
    if as_json:
        print_json(
            document(path=path, harmless=not bad, files=[_json(report, path) for report in reports])
        )
    else:
        for group in _alike(reports):
            _print(group, path)
    if bad or not as_json:
        say(*_verdict(reports, bad))
    if bad:
        raise click.exceptions.Exit(1)


def _json(report: "Report", path: str) -> dict[str, Any]:
    return {
        "file": _name(report, path),
        "container": report.container,
        "pickles": report.pickles,
        "harmless": report.harmless,
        "problem": report.problem or None,
        "absent": report.absent or None,
        "names": report.uses,
    }


def _name(report: "Report", path: str) -> str:
    return os.path.relpath(report.path, path) if os.path.isdir(path) else report.path


def _alike(reports: "list[Report]") -> "list[list[Report]]":
    """Group files with equal reports, such as those of ranks and layers."""
    groups: dict[object, list[Report]] = {}
    for report in reports:
        names = tuple((use.name, use.known, _deed(use)) for use in report.uses)
        kind = (names, report.problem, report.absent, report.container, report.pickles)
        groups.setdefault(kind, []).append(report)
    return list(groups.values())


def _print(group: "list[Report]", path: str) -> None:
    first = group[0]
    more = f" and {plural(len(group) - 1, 'more file')} like it" if len(group) > 1 else ""
    held = plural(first.pickles, "pickle")
    if first.container == "safetensors":
        held = "safetensors, no pickles"
    elif first.absent:
        held = plain(first.absent)
    print_line(f"{plain(_name(first, path))}{more}: {held}")
    uses = sorted(first.uses, key=lambda use: use.harmless)
    for use in uses[:_MOST]:
        print_line(f"  {'known' if use.known else 'UNKNOWN':8}{_deed(use):9}{plain(use.name)}")
    if len(uses) > _MOST:
        print_line(f"  and {len(uses) - _MOST:,} more, listed by --json")
    if first.problem:
        print_line(f"  not fully read: {plain(first.problem)}")


def _deed(use: "Use") -> str:
    """The most dangerous use of a name: changed, called or imported."""
    return "changed" if use.changed else "called" if use.called else "imported"


def _verdict(reports: "list[Report]", bad: "list[Report]") -> tuple[str, str]:
    files = plural(len(reports), "file") + " scanned"
    if not reports:
        return "info", "no file in this folder can contain pickles"
    if not bad and all(report.container == "safetensors" for report in reports):
        return "info", f"{files}: safetensors files contain no pickles and run no code"
    if not bad:
        return "info", f"{files}: loading them only builds values and runs no other code"
    names = sorted({use.name for report in bad for use in report.uses if not use.harmless})
    what = f"{', '.join(map(plain, names[:6]))}" + (" ..." if len(names) > 6 else "")
    absent = [report for report in bad if report.absent]
    missing = ""
    if absent:
        name = plain(os.path.basename(absent[0].path))
        missing = (
            f"{plural(len(absent), 'weight file')} not scanned, because the contents are missing: "
            f"{name} is {plain(absent[0].absent)}"
        )
    if len(absent) == len(bad):
        return "error", missing
    bad = [report for report in bad if not report.absent]
    unread = sum(bool(report.problem) for report in bad)
    parts = [f"not known to be harmless: {what}"] if names else []
    parts += [f"{unread} not fully read"] if unread else []
    return "error", (
        f"{files}, {len(bad)} of them may run code under torch.load or pickle.load "
        f"({'; '.join(parts)}). Load with weights_only=True or not at all; neox-bridge itself "
        "never runs code from a checkpoint." + (f" {missing}" if missing else "")
    )
