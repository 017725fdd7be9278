"""Prints results on stdout and everything else on stderr, without wrapping lines."""

import json
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from neox_bridge.cli.spelling import as_options
from neox_bridge.cli.streams import write_color
from neox_bridge.documents import plain_data
from neox_bridge.wording import human, one_line, plain, plural, side, some

if TYPE_CHECKING:
    from neox_bridge.cli.options import Output
    from neox_bridge.execution.result import Result
    from neox_bridge.findings import Finding
    from neox_bridge.layouts.carried_names import LeftFile
    from neox_bridge.planning.plan import Plan

_COLORS = {"error": 31, "interrupted": 31, "warning": 33, "info": 36, "dropped": 36, "note": 36}


def say(word: str, *texts: str) -> None:
    """Print ``word: text`` as one line on stderr, with the word in color if enabled."""
    plain_word = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    color = not plain_word and sys.stderr.isatty()
    with suppress(OSError):  # stderr is closed, but the exit code still reports the failure
        if color:
            write_color(f"\x1b[{_COLORS[word]}m")
        print(f"{word}:", end="", file=sys.stderr)
        if color:
            write_color("\x1b[0m")
        print("", *(one_line(as_options(text)) for text in texts), file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """Print one line of results on stdout, with control characters escaped."""
    print(plain(as_options(text)))


def print_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Print aligned columns on stdout. right: indices of the columns that are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print_line("  ".join(cells).rstrip())


def print_json(value: object) -> None:
    """Print one JSON document on stdout, with command-line options in its sentences."""
    json.dump(plain_data(value, as_options), sys.stdout, indent=2, allow_nan=False)
    print()


def tell(plan: "Plan", quiet: bool) -> None:
    """Print the findings, dropped tensors and notes of a plan on stderr."""
    if quiet:
        return
    for word, text in _remarks(plan):
        say(word, text)


def tell_findings(findings: "Iterable[Finding]", quiet: bool) -> None:
    """Print findings on stderr, one per line."""
    for finding in () if quiet else findings:
        say(finding.severity, with_remedy(finding))


def print_plan(plan: "Plan", target: str, workers: int | None = None) -> None:
    """Print a human-readable plan on stdout."""
    from neox_bridge.execution.memory import peak_memory
    from neox_bridge.planning.report import summary

    numbers = summary(plan, peak_memory(plan, target, workers))
    print_line(f"source   {side(plan.source)}: {plan.source.get('name', '')}")
    print_line(f"target   {side(plan.target)}, {plan.target['parameters']:,} parameters: {target}")
    print_line(f"files    {numbers['files']}")
    width = max((len(file.path) for file in plan.files), default=0)
    for file in plan.files:
        what = f"{plural(len(file.tensors), 'tensor')}" if file.tensors else ""
        what = f"copy of {file.copy_of}" if file.copy_of else what
        print_line(f"  {file.path:{width}}  {human(file.size):>9}  {what}".rstrip())
    print_line(
        f"bytes    {human(numbers['bytes'])}: {human(numbers['bytes_copied'])} copied, "
        f"{human(numbers['bytes_transformed'])} transformed, "
        f"{human(numbers['bytes_from_plan'])} headers and small files"
    )
    print_line(f"memory   {human(numbers['peak_memory'])} at most (estimate)")
    for word, text in _remarks(plan):
        print_line(f"{word}: {text}")
    for line in blanks(plan, target):
        print_line(line)


def print_result(plan: "Plan", result: "Result", target: str, output: "Output") -> None:
    """Print one line that says what was written, and the settings to fill in; or both as JSON."""
    from neox_bridge.planning.casts import verified as in_words

    if output.as_json:
        print_json(result.to_json())
    elif not output.quiet:
        words = {True: f"; {in_words(plan.casts)}", False: "; not verified", None: ""}
        print_line(_summary_line(plan, result, target) + words[result.verified])
        for line in blanks(plan, target):
            print_line(line)


def blanks(plan: "Plan", target: str) -> list[str]:
    """The settings that the user must fill in, one line per file."""
    keys: dict[str, list[str]] = {}
    for file, key in plan.blanks:
        keys.setdefault(file, []).append(key)
    return [f"fill in: {' and '.join(k)} in {os.path.join(target, f)}" for f, k in keys.items()]


def with_remedy(finding: "Finding") -> str:
    """The message of a finding, with the remedy in parentheses."""
    return finding.message + (f" ({finding.remedy})" if finding.remedy else "")


def _remarks(plan: "Plan") -> list[tuple[str, str]]:
    from neox_bridge.planning.report import by_reason

    lines: list[tuple[str, str]] = [(f.severity, with_remedy(f)) for f in plan.findings]
    for reason, names in by_reason(plan.dropped).items():
        lines.append(("dropped", f"{some(list(names), 1)}: {reason}"))
    if plan.left:
        lines.append(("note", not_copied(plan.left)))
    lines += [("note", note) for note in plan.notes]
    return lines


def not_copied(files: "Iterable[LeftFile]") -> str:
    """Report the files in the folder of the source that are not copied."""
    names = [
        file.name if file.reason == "not on the list" else f"{file.name} ({file.reason})"
        for file in files
    ]
    return f"{plural(len(names), 'file')} of the source not copied: {some(names, 5)}"


def _summary_line(plan: "Plan", result: "Result", target: str) -> str:
    from neox_bridge.planning.report import by_reason

    rate = human(result.size / max(result.seconds, 1e-3))
    reasons = [f"{len(names)} ({why})" for why, names in by_reason(plan.dropped).items()]
    dropped = f"; dropped {', '.join(reasons)}" if reasons else "; nothing dropped"
    how = {"shared": "shared", "copied": "copied", "transformed": "transformed"}
    how["kept"] = "kept from an interrupted run"
    sizes = {what: getattr(result, word) for word, what in how.items()}
    parts = [f"{human(size)} {what}" for what, size in sizes.items() if size]
    return (
        f"wrote {target}: {side(plan.target)}, {plan.target['parameters']:,} parameters in "
        f"{plural(result.files, 'file')}, {human(result.size)} ({', '.join(parts)}) in "
        f"{result.seconds:.1f} s ({rate}/s){dropped}"
    )
