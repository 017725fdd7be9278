"""Draws the statistics of a checkpoint."""

import math
from collections.abc import Sequence
from typing import Any

from neox_bridge.verification.drawing import (
    BLUE,
    GREY,
    GRID,
    ORANGE,
    RED,
    figure_of,
    legend,
    log_axis,
    place_of,
    styled,
    ticks,
)
from neox_bridge.verification.statistics import Statistics

BlockPoints = Sequence[tuple[int, Statistics]]  # values by block


@styled
def statistics_figure(stats: Sequence[Statistics]) -> Any:
    """Draw a panel for each kind of weight: std and largest absolute value, over the blocks.

    Tensors outside the blocks are in the last panel, one line each. A std of 0 cannot be shown on a
    logarithmic axis and is marked at its bottom, as are NaN and infinities.
    """
    panels: dict[str, list[tuple[int, Statistics]]] = {}
    others = [tensor for tensor in stats if place_of(tensor.name)[1] is None]
    for tensor in stats:
        kind, block = place_of(tensor.name)
        if block is not None:
            panels.setdefault(kind, []).append((block, tensor))
    # matrices first, because they matter most
    kinds = sorted(panels, key=lambda kind: len(panels[kind][0][1].shape) < 2)
    # three or four per row, whichever leaves fewer panels empty
    columns = min(len(kinds), 3 if -len(kinds) % 3 < -len(kinds) % 4 else 4)
    rows = -(-len(kinds) // columns) if kinds else 0
    heights = [1.7 * rows] * bool(rows) + [0.6 + 0.22 * len(others)] * bool(others) or [0.5]
    figure = figure_of(max(2.7 * columns, 6.0), sum(heights) + 0.4)
    # each part has a separate layout, because long names in one would shift the panels of the other
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    for part in parts:
        part.set_facecolor("none")
    layers = 1 + max((block for points in panels.values() for block, _ in points), default=0)
    for place, kind in enumerate(kinds):
        axes = parts[0].add_subplot(rows, columns, place + 1)
        _panel(axes, kind, panels[kind], layers)
        if place + columns >= len(kinds):
            axes.set_xlabel("block")
    if others:
        _outside(parts[-1].add_subplot(), others)
    legend(
        figure,
        [
            _key(BLUE, "o", "standard deviation", line=True),
            _key(ORANGE, "^", "largest absolute value", line=True),
            _key(GREY, "D", "all elements equal", face="none"),
            _key(RED, "x", "NaN or infinities"),
        ],
    )
    return figure


def _panel(axes: Any, kind: str, points: BlockPoints, layers: int) -> None:
    points = sorted(points, key=lambda pair: pair[0])
    blocks = [block for block, _ in points]
    few = layers <= 24
    largest, spread = [_shown(_size(s)) for _, s in points], [_shown(s.std) for _, s in points]
    for ys, colour, marker in ((largest, ORANGE, "^"), (spread, BLUE, "o")):
        # with markers, because a single point between gaps has no line
        axes.plot(
            blocks, ys, color=colour, marker=marker, markersize=3.5 if few else 1.8, linewidth=1.1
        )
    axes.set_title(kind, loc="left", fontsize=7.5)
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_xticks(ticks(layers, 7))
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    if not log_axis(axes.yaxis, [*largest, *spread]):
        words = "all zeros" if any(_size(s) == 0 for _, s in points) else "no finite value"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=GREY)
    foot = axes.get_xaxis_transform()
    marked = (
        (GREY, "D", [b for b, s in points if s.std == 0], 0.05),
        (RED, "x", [b for b, s in points if s.nans or s.infs], 0.13),
    )
    for colour, marker, chosen, y in marked:
        axes.plot(
            chosen,
            [y] * len(chosen),
            marker,
            color=colour,
            markerfacecolor="none",
            markersize=4.5 if few else 2.2 if marker == "D" else 4,
            transform=foot,
        )


def _outside(axes: Any, tensors: Sequence[Statistics]) -> None:
    axes.set_title("outside the blocks", loc="left", fontsize=7.5)
    axes.set_yticks(range(len(tensors)), [place_of(s.name)[0] for s in tensors])
    axes.set_ylim(len(tensors) - 0.5, -0.5)
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="x", color=GRID, linewidth=0.5)
    log_axis(axes.xaxis, [y for s in tensors for y in (_size(s), s.std)])
    side = axes.get_yaxis_transform()
    for row, s in enumerate(tensors):
        ends = [_shown(s.std), _shown(_size(s))]
        axes.plot(ends, [row, row], color=GRID, linewidth=1.2, zorder=1)
        axes.plot(ends[:1], [row], "o", color=BLUE, markersize=4.5)
        axes.plot(ends[1:], [row], "^", color=ORANGE, markersize=4.5)
        if s.std == 0:
            axes.plot([0.01], [row], "D", color=GREY, markerfacecolor="none", transform=side)
        if s.nans or s.infs:
            axes.plot([0.03], [row], "x", color=RED, transform=side)


def _size(tensor: Statistics) -> float:
    return max(abs(tensor.minimum), abs(tensor.maximum))


def _shown(value: float) -> float:
    return value if value > 0 else math.nan


def _key(colour: str, marker: str, label: str, line: bool = False, face: str | None = None) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=colour,
        marker=marker,
        linestyle="-" if line else "none",
        label=label,
        markerfacecolor=face or colour,
        markersize=4.5,
    )
