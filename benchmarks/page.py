"""The results as a page of Markdown, and the machine that they come from."""

import os
import platform
import re
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cases import EXPORTER, TO_HF
from costs import Cost, Memory, Start, middle
from inside_neox import Inside
from measure import Row
from published import Planned, Taken

PAGE = """\
# How fast is neox-bridge?

```console
$ {command}    # needs a quiet machine, root and 40 GB of disk
```

{machine} The command above measures all of it again.

Every command runs as a separate process, start-up included, with its source in memory. The
commands of a table take turns, in rounds that each start with another command. Ratios are computed
within a round. All numbers are medians, except memory, which is the maximum.

- *times `cp`*: files that `cp` and other programs wrote are flushed to disk on their time, as
  conversions flush theirs. By default `convert` reads back and compares; rows without *read back
  and compared* use `--no-verify`.
- *executing*: the part of a conversion that grows with bytes: writing, flushing and reading back,
  without starting Python, reading headers and planning.
- *anonymous*: the largest amount of memory that is not a map of a file, sampled every 5 ms.
- *written*: bytes that the process made dirty in the page cache. A shared block is not written.
- *on disk*: new blocks. On a loop-mounted file system this is the difference in its free space,
  metadata included; elsewhere the blocks that no other file shares.
- HF is Hugging Face, NeoX is GPT-NeoX. Its checkpoints have one file for each layer and rank, or,
  in rows with *ranks*, one for each rank. TP is tensor parallel.
"""
NEXT = "\nNext: [the glossary](../reference/glossary.md).\n"
FIGURE = """
![seconds of conversions and of other programs, as multiples of cp's]({figure})
"""
START = """
## Starting

| | median ms | spread ms |
|---|---|---|
"""
COSTS = """
## What one more costs

Tensors of 128 bytes to 32 kB, in 32 ranks: the difference between a tall model and one of two
blocks, and between one file for each layer and rank and one for each rank, by their number.

| | how many more | median µs | spread µs |
|---|---|---|---|
"""
MEMORY = """
## Memory

Sources are sparse files of zeros; targets are written in full.

| | | GB | s | anonymous |
|---|---|---|---|---|
"""
BATCHES = """
## Many checkpoints

The same number of bytes in one checkpoint and in many, written and read back. *throughput* is that
of the batch, divided by that of the single checkpoint.

| | median s | spread s | throughput |
|---|---|---|---|
"""
COLUMNS = """\
| | median s | spread s | times `cp` | times `cp` `--reflink=never` | executing s | CPU s \
| anonymous | written | on disk |
|---|---|---|---|---|---|---|---|---|---|
"""
COMPARED = """
## Comparing: {shape}

`cmp` compares bytes, and knows neither tensors nor ranks nor dtypes, so a cast and values that all
differ have no equivalent there.

| | median s | spread s | times `cmp` | anonymous |
|---|---|---|---|---|
"""


RESHARDED = """
## Resharding: {shape}, with its optimizer

{size:.2f} GB in fp16 with ZeRO 1, at DP 2, TP 1 and PP 1.

| | median s | spread s | times `cp` | anonymous |
|---|---|---|---|---|
"""


GATHERED = """
## ZeRO stage 3: {shape}, its weights gathered

{size:.2f} GB in fp16 at DP 2, with its optimizer. `zero_to_fp32.py` is DeepSpeed's, and writes fp32
under GPT-NeoX's names.

| | median s | spread s | times `cp` | anonymous |
|---|---|---|---|---|
"""


INSIDE = """
## Inside GPT-NeoX: {shape}

Steps of {size:.2f} GB are saved beside `save_hf`, one after the other. GPT-NeoX's exporter converts
the same steps, and does not verify them.

| | median s | worst s |
|---|---|---|
"""
THEIRS = """
GPT-NeoX's exporter takes {ratio} times the seconds of an export with its verification.
"""


PLANNED = """
## Raw Pythia branches

Planning of a branch as EleutherAI publishes it (12B: 36 layers on 4 ranks, 256 files of optimizer
states, sparse files of their full size on the disk):

| | files | s | CPU s | anonymous |
|---|---|---|---|---|
"""
TAKEN = """
One step of a branch on the Hub, here a local stand-in for it; *needed* are the bytes of the files
whose tensors are written:

| | MB needed | MB fetched | requests | optimizer files asked for | s |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Table:
    """The conversions of one shape in one place; the first two rows are of ``cp``.

    size: bytes of the Hugging Face checkpoint.
    """

    shape: str
    place: str
    size: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """All of a run. large: tables of large shapes where blocks are shared.

    compared: the shape, and the rows of verify and diff, ``cmp`` first.
    resharded, gathered: the shape, and its rows, ``cp`` first.
    batches: one large conversion first, then a batch of as many bytes.
    """

    command: str
    tables: tuple[Table, ...]
    large: tuple[Table, ...]
    compared: tuple[str, tuple[Row, ...]]
    resharded: tuple[str, tuple[Row, ...]]
    gathered: tuple[str, tuple[Row, ...]]
    inside: Inside
    starts: tuple[Start, ...]
    costs: tuple[Cost, ...]
    memories: tuple[Memory, ...]
    batches: tuple[Row, ...]
    planned: tuple[Planned, ...]
    taken: tuple[Taken, ...]
    skipped: tuple[str, ...]


def page(results: Results, figure: str | None) -> str:
    """figure: the path of the picture, from the page."""
    text = PAGE.format(command=results.command, machine=machine())
    if figure is not None:
        text += FIGURE.format(figure=figure)
    text += "".join(map(_conversions, (*results.tables, *results.large)))
    text += START + _lines(
        (start.title, middle([1e3 * taken for taken in start.seconds])) for start in results.starts
    )
    text += COSTS + _lines(
        (cost.title, f"{cost.more:,}", middle(cost.microseconds)) for cost in results.costs
    )
    if results.memories:
        text += MEMORY + _lines(
            (m.shape, m.title, f"{m.size / 1e9:.1f}", f"{m.run.seconds:.1f}", _mb(m.run.memory))
            for m in results.memories
        )
    if results.batches:
        one = results.batches[0]
        text += BATCHES + _lines(
            (row.title, middle(row.seconds), f"{1 / statistics.median(row.times(one)):.2f}")
            for row in results.batches
        )
    shape, rows = results.compared
    text += COMPARED.format(shape=shape) + _beside(rows)
    shape, rows = results.resharded
    size = rows[0].middle("written") / 1e9
    text += RESHARDED.format(shape=shape, size=size) + _beside(rows)
    shape, rows = results.gathered
    size = rows[0].middle("written") / 1e9
    text += GATHERED.format(shape=shape, size=size) + _beside(rows)
    text += _inside(results.inside)
    text += PLANNED + _lines(
        (
            f"{one.branch}, `{one.title}`",
            f"{one.files:,}",
            f"{one.seconds:.1f}",
            f"{one.cpu:.1f}",
            _mb(one.memory),
        )
        for one in results.planned
    )
    text += TAKEN + _lines(
        (
            f"{one.branch}, `{one.title}`",
            f"{one.needed / 1e6:,.1f}" if one.needed else "headers",
            f"{one.fetched / 1e6:,.1f}",
            f"{one.requests:,}",
            f"{one.optimizer_files:,}",
            f"{one.seconds:.1f}",
        )
        for one in results.taken
    )
    if results.skipped:
        text += "\n## Not measured\n\n" + "".join(f"- {reason}\n" for reason in results.skipped)
    return text + NEXT


def machine() -> str:
    """What was measured with, in some lines."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    kernel = re.match(r"[\d.]+", platform.release())
    cp = subprocess.run(["cp", "--version"], capture_output=True, text=True).stdout.splitlines()[:1]
    parts = [
        f"{date.today()}; {os.cpu_count()} cores of {model[1] if model else platform.machine()}",
        f"{memory:.0f} GiB; Linux {kernel[0] if kernel else platform.release()}",
        *cp,
        f"Python {platform.python_version()}",
        *map(_version, ("neox-bridge", "numpy", "torch", "safetensors", "transformers")),
    ]
    return textwrap.fill(
        ", ".join(part for part in parts if part) + ".", 100, break_on_hyphens=False
    )


def table_head(table: Table) -> str:
    rounds = len(table.rows[0].rounds)
    return f"{table.shape}, {table.size / 1e9:.2f} GB, {table.place}, {rounds} rounds"


def _conversions(table: Table) -> str:
    copy, never = table.rows[:2]
    text = f"\n## {table_head(table)}\n\n{COLUMNS}"
    text += _lines(
        (
            row.title,
            middle(row.seconds),
            _ratio(row, copy),
            _ratio(row, never),
            f"{row.middle('executing'):.2f}" if row.middle("executing") else "",
            f"{row.middle('cpu'):.2f}",
            _mb(row.most("memory")),
            _mb(row.middle("written")),
            _mb(row.middle("blocks")),
        )
        for row in table.rows
    )
    rows = {row.title: row for row in table.rows}
    if EXPORTER in rows:
        mine, theirs = rows[TO_HF], rows[EXPORTER]
        memory = theirs.most("memory") / mine.most("memory")
        text += (
            f"\nOf the same checkpoint GPT-NeoX's exporter takes {_ratio(theirs, mine)} times the "
            f"seconds of *{TO_HF}*, and {memory:.0f} times its memory.\n"
        )
    return text


def _inside(it: Inside) -> str:
    rows = {
        "the training is blocked per save": it.blocked,
        "from the native save to the verified export": it.exported,
        EXPORTER: it.theirs,
    }
    text = INSIDE.format(shape=it.shape, size=it.size / 1e9)
    for title, seconds in rows.items():
        if seconds:
            digits = 6 if max(seconds) < 0.01 else 2
            middle_and_worst = (statistics.median(seconds), max(seconds))
            cells = " | ".join(f"{value:.{digits}f}" for value in middle_and_worst)
            text += f"| {title} | {cells} |\n"
    if it.theirs:
        text += THEIRS.format(ratio=_number(statistics.median(it.ratios)))
    return text


def _beside(rows: Sequence[Row]) -> str:
    """Rows as multiples of the first."""
    return _lines(
        (row.title, middle(row.seconds), _ratio(row, rows[0]), _mb(row.most("memory")))
        for row in rows
    )


def _lines(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _ratio(row: Row, base: Row) -> str:
    return _number(statistics.median(row.times(base)))


def _number(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def show(rows: Iterable[Row], base: Row) -> None:
    """Rows on stderr, while the next ones are being measured."""
    for row in rows:
        text = f"  {row.title:48} {middle(row.seconds):>24} s {_ratio(row, base):>6} times"
        print(text, file=sys.stderr, flush=True)
