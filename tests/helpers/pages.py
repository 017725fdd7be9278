"""The pages of the documentation: their blocks, and whether a program prints what they show.

``python tests/helpers/pages.py --update docs/how-to/verify.md`` runs the console blocks of a page
and writes what the commands print into it (rehearsal.py).
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OMITTED = "..."  # a line that stands for others
SOME = "…"  # some characters of a line
MARK = re.compile(r"# needs (.+)$", re.M)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)

# What differs between machines and models: the page may show it of a larger model than the test's.
_VARYING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^ *\d+(,?)$", r"N\1"),  # of JSON
        (r'(": )[\d.\[][\d.,\[\] ]*', r"\1N"),
        (r"\.py:\d+\b", ".py:N"),
        (r"\d[\d.,]* [kMGT]?B\b", "N B"),
        (r"N B (shared|copied|transformed)(, N B (shared|copied|transformed))*", "N B moved"),
        (r"\d[\d.,]* (seconds|ms|s)\b", "N s"),
        (r"\b\d[\d,]* (parameters|tensors|equal|tokens|finished files|(?:\w+ )?files)\b", r"N \1"),
        (r"\b1 (finished file|parameter|tensor|token|(?:\w+ )?file)\b( is\b)?", r"N \1s\2"),
        (r"\b(finished files) (is|are)\b", r"\1 are"),
        (r"\b(?=\w*\d)[0-9a-f]{12,}\b", "HASH"),
        (r"(?<![\w.@])-?\d(\.\d+)?e[-+]\d+\b", "N"),
        (r"(?<![\w.@])-?\d+\.\d{3,}\b", "N"),
    )
]
_ROW = re.compile(r"\S {2,}\S.*\S {2,}\S")  # of a table
_NUMBER = re.compile(r"(?<![\w.@-])-?\d[\d.,]*")


@dataclass(frozen=True)
class Block:
    """first_line: of its text, counted from 0."""

    language: str
    text: str
    first_line: int


@dataclass(frozen=True)
class Command:
    """shown: the lines that the page shows below it, ``...`` included. line: where they begin."""

    text: str
    shown: tuple[str, ...]
    line: int

    @property
    def needs(self) -> str:
        """What the page says that the command needs, as ``# needs a cluster``."""
        mark = MARK.search(self.text)
        return mark[1] if mark else ""


def all_pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, or those of some languages."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text[: match.start(2)].count("\n"))
        for match in _FENCE.finditer(text)
        if not languages or match[1] in languages
    ]


def commands(page: Path) -> list[Command]:
    return [command for block in blocks(page, "console") for command in _commands(block)]


def _commands(block: Block) -> Iterator[Command]:
    lines = block.text.splitlines()
    assert lines[0].startswith("$ ")
    at = 0
    while at < len(lines):
        text = lines[at].removeprefix("$ ")
        at += 1
        while at < len(lines) and lines[at].startswith("> "):
            text += "\n" + lines[at].removeprefix("> ")
            at += 1
        start = at
        while at < len(lines) and not lines[at].startswith("$ "):
            at += 1
        yield Command(text, tuple(lines[start:at]), block.first_line + start)


def form(line: str, is_row: bool) -> str:
    """A line without the numbers that differ between machines and models.

    is_row: the line is one of a table, in which all numbers may differ.
    """
    for pattern, replacement in _VARYING:
        line = pattern.sub(replacement, line)
    if is_row:
        line = _NUMBER.sub("N", line)
    return " ".join(line.split())


def is_shown(line: str, printed: str) -> bool:
    """Whether a page's line has the form of a printed one, up to what it leaves out."""
    is_row = _ROW.search(printed) is not None
    parts = [re.escape(form(part, is_row)) for part in line.split(SOME)]
    pattern = ".*".join(parts).replace(r"\ ", " *")
    return re.fullmatch(pattern, form(printed, is_row)) is not None


def difference(command: Command, output: str) -> str:
    """The first line in which page and output differ; empty if they agree, or the page shows none.

    What the page shows is all of the output, except where it has a line of ``...``.
    """
    if not command.shown:
        return ""
    printed = [line for line in output.splitlines() if line.strip()]
    omits = False
    for line in command.shown:
        if line == OMITTED:
            omits = True
            continue
        places = [at for at, text in enumerate(printed) if is_shown(line, text)]
        if not places or (places[0] and not omits):
            return f"the page shows: {line}"
        printed = printed[places[0] + 1 :]
        omits = False
    return f"the page leaves out: {printed[0]}" if printed and not omits else ""


def updated(command: Command, output: str) -> list[str]:
    """The lines that the page should show: those that still have their form stay as they are.

    A line that is printed in other words is replaced by the printed one that is most like it.
    """
    printed = [line for line in output.splitlines() if line.strip()]
    if OMITTED not in command.shown:
        return [next((old for old in command.shown if is_shown(old, new)), new) for new in printed]
    lines: list[str] = []
    for old in command.shown:
        if old == OMITTED:
            lines.append(OMITTED)
            continue
        at = next((at for at, new in enumerate(printed) if is_shown(old, new)), None)
        if at is None:
            at, old = _most_like(old, printed)
        if at is not None:
            lines += [OMITTED, old] if at else [old]
            printed = printed[at + 1 :]
    if printed:
        lines.append(OMITTED)
    return _without_repetitions(lines)


def _most_like(old: str, printed: Sequence[str]) -> tuple[int | None, str]:
    """The printed line that is most like the page's, cut where the page's is cut short."""
    beginnings = [new[: len(old)] if old.endswith(SOME) else new for new in printed]
    ratios = [difflib.SequenceMatcher(None, old, new).ratio() for new in beginnings]
    if not ratios or max(ratios) < 0.4:
        return None, old
    at = ratios.index(max(ratios))
    is_cut = beginnings[at] != printed[at]
    return at, f"{beginnings[at].rpartition(' ')[0]} {SOME}" if is_cut else printed[at]


def _without_repetitions(lines: list[str]) -> list[str]:
    """Lines with one ``...`` where several follow each other."""
    return [
        line for at, line in enumerate(lines) if line != OMITTED or lines[at - 1 : at] != [OMITTED]
    ]


def update(page: Path, outputs: Sequence[tuple[Command, str]]) -> bool:
    """Write what commands printed into their page. Returns whether the page changed."""
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    before = list(lines)
    for command, output in reversed(outputs):
        if command.shown and difference(command, output):
            new = [f"{line}\n" for line in updated(command, output)]
            lines[command.line : command.line + len(command.shown)] = new
    page.write_text("".join(lines), encoding="utf-8")
    return lines != before


if __name__ == "__main__":
    import rehearsal

    rehearsal.main()
