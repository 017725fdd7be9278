"""The figure: seconds as multiples of ``cp``'s, a bar each, with the spread over rounds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page import Table, table_head

from neox_bridge.verification.drawing import (
    BLUE,
    GREY,
    GRID,
    ORANGE,
    figure_of,
    log_axis,
    save,
    styled,
)

COLOURS = {"cp": GREY, "tool": BLUE, "other": ORANGE}
NAMES = {"tool": "neox-bridge", "cp": "cp", "other": "other programs"}


def draw(tables: Sequence[Table], path: Path) -> None:
    """One panel a table, to a .png or .svg file."""
    save(_figure(tables), str(path))


@styled
def _figure(tables: Sequence[Table]) -> Any:
    heights = [0.19 * len(table.rows) + 0.5 for table in tables]
    figure = figure_of(7.6, sum(heights) + 0.5)
    panels = figure.subplots(len(tables), 1, height_ratios=heights, squeeze=False, sharex=True)[
        :, 0
    ]
    for axes, table in zip(panels, tables, strict=True):
        _panel(axes, table)
    ratios = [ratio for table in tables for row in table.rows for ratio in row.times(table.rows[1])]
    log_axis(panels[-1].xaxis, [*ratios, 1])
    for axes in panels:
        axes.tick_params(labelbottom=True)
    panels[-1].set_xlabel("times the seconds of cp --reflink=never and sync: to the left is faster")
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=COLOURS[who], label=name) for who, name in NAMES.items()],
        loc="outside lower center",
        ncols=len(NAMES),
        frameon=False,
        fontsize=8,
    )
    return figure


def _panel(axes: Any, table: Table) -> None:
    base = table.rows[1]
    every = [row.times(base) for row in table.rows]
    places = range(len(every))
    middles = [statistics.median(ratios) for ratios in every]
    # on a logarithmic axis there is no 0 to start from: bars lead away from cp's 1
    axes.barh(
        places,
        [ratio - 1 for ratio in middles],
        left=1,
        height=0.7,
        color=[COLOURS[row.who] for row in table.rows],
    )
    axes.hlines(
        places, [min(ratios) for ratios in every], [max(ratios) for ratios in every], "k", lw=1
    )
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_yticks(places, [row.title.replace("`", "") for row in table.rows], fontsize=7.5)
    axes.set_ylim(len(every) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(table_head(table), loc="left")
    for place, ratio, ratios in zip(places, middles, every, strict=True):
        text = f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2g}"
        end = (max(*ratios, 1), place)
        axes.annotate(text, end, (3, 0), textcoords="offset points", va="center", fontsize=7)
