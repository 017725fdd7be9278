"""A problem as a block: a headline, and aligned rows such as ``missing``, ``why`` and ``fix``.

On a terminal the rows wrap to its width, with a hanging indent. Commands and links never wrap, so
that they can be copied. Elsewhere nothing wraps, so that each row is one line.
"""

from __future__ import annotations

import sys
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING

from neox_bridge.cli.spelling import as_options
from neox_bridge.findings import Command
from neox_bridge.wording import plain, plural, sentence, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from neox_bridge.findings import Details

Row = tuple[str, str]
_MOST_NAMES = 6
_NARROWEST = 40  # columns; narrower terminals wrap the lines themselves


def print_block(headline: str, rows: Iterable[Row] = (), columns: int | None = None) -> None:
    """Print a headline and its rows on stdout. columns: by default, those of the terminal."""
    rows = list(rows)
    if columns is None:
        columns = get_terminal_size().columns if sys.stdout.isatty() else 0
    _print(headline, "", "  ", columns)
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        _print(text, f"  {label:<{width}}  ", " " * (width + 4), columns)


def _print(text: str, first: str, others: str, columns: int) -> None:
    shown = plain(text if isinstance(text, Command) else as_options(text))
    if isinstance(text, Command) or columns < _NARROWEST or len(first + shown) <= columns:
        print(first + shown)
        return
    lines = wrap(
        shown,
        columns,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
    print("\n".join(lines))


def evidence_rows(details: Iterable[Details]) -> Iterator[Row]:
    """Rows for what is missing, unexpected and wrong, without duplicates, and for where it is."""
    details = list(details)
    for label in ("missing", "unexpected", "wrong"):
        having = [one for one in details if getattr(one, label)]
        names = list(dict.fromkeys(name for one in having for name in getattr(one, label)))
        if names:
            layers = max(one.layers for one in having)
            suffix = f" ({plural(layers, 'layer')})" if layers else ""
            yield label, some(names, _MOST_NAMES) + suffix
    for place in dict.fromkeys(one.where for one in details if one.where):
        yield "where", place


def cause_rows(causes: Iterable[str]) -> Iterator[Row]:
    """The ``why`` rows, one per cause."""
    yield from (("why", sentence(cause)) for cause in dict.fromkeys(causes))


def way_out_rows(
    steps: Sequence[str], others: Iterable[str], links: Iterable[str]
) -> Iterator[Row]:
    """Rows for the fix, step by step, other ways and links, without duplicates."""
    for number, step in enumerate(dict.fromkeys(steps)):
        yield ("then" if number else "fix"), step
    yield from (("or", other) for other in dict.fromkeys(others) if other not in steps)
    yield from (("more", link) for link in dict.fromkeys(links))
