"""Draws the differences between two checkpoints."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neox_bridge.verification.compare import Difference
from neox_bridge.verification.drawing import GREY, RED, figure_of, legend, place_of, styled, ticks

_COLOUR_MAP = "viridis"
_EQUAL = "#e8e8e8"
_WITH_NUMBERS = 12  # up to this many blocks, numbers fit into the cells
_ABSENT = ("only-first", "only-second", "shape", "bytes")

Rows = Mapping[str, Mapping[int, Difference]]


@styled
def differences_figure(differences: Sequence[Difference]) -> Any:
    """A map of relative differences: a row for each kind of weight, a column for each block.

    The color scale is logarithmic. Equal tensors and tensors that cannot be compared have separate
    colors. Tensors outside the blocks are in a map of one column below.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    blocks: dict[str, dict[int, Difference]] = {}
    others: dict[str, dict[int, Difference]] = {}
    for difference in sorted(differences, key=lambda d: _order(place_of(d.name)[0])):
        kind, block = place_of(difference.name)
        (others if block is None else blocks).setdefault(kind, {})[block or 0] = difference
    layers = 1 + max((block for row in blocks.values() for block in row), default=0)
    parts: list[tuple[Rows, int]] = [
        (rows, columns) for rows, columns in ((blocks, layers), (others, 1)) if rows
    ]
    heights = [0.2 * len(rows) + 0.1 for rows, _ in parts] or [0.5]
    wide = 6.0 if layers > _WITH_NUMBERS else min(6.0, max(3.0, 0.5 * layers))
    figure = figure_of(wide + 3.4, sum(heights) + 1.0)
    norm = LogNorm(*_limits(d.relative for d in differences))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for place, (rows, columns) in enumerate(parts):
        axes = figure.add_subplot(grid[place, 0])
        _map(axes, rows, columns, norm)
        axes.set_xticks(ticks(layers, 16) if rows is blocks else [])
        axes.set_xlabel("block" if rows is blocks else "")
    if any(0 < d.relative < math.inf for d in differences):
        bar = figure.colorbar(
            ScalarMappable(norm, _COLOUR_MAP),
            ax=figure.axes,
            format=lambda value, _: f"{value:g}",  # matplotlib's default labels are formulas
            fraction=0.04,
            pad=0.02,
            aspect=30,
        )
        bar.solids.set(rasterized=False, edgecolor="face")  # no raster image within the SVG
        bar.set_label("largest difference / largest value")
    legend(
        figure,
        [
            Patch(facecolor=_EQUAL, label="equal values"),
            Patch(facecolor="white", edgecolor=GREY, hatch="////", label="no counterpart"),
            Patch(facecolor=RED, label="infinite or NaN"),
        ],
    )
    return figure


def _is_absent(difference: Difference) -> bool:
    """Whether no value of the tensor could be compared."""
    compared = difference.kind != "values" or difference.differing > 0
    return difference.kind in _ABSENT or not compared


def _map(axes: Any, rows: Rows, columns: int, norm: Any) -> None:
    """Cells as rectangles, which stay sharp at any size."""
    import matplotlib
    from matplotlib.patches import Rectangle

    colours = matplotlib.colormaps[_COLOUR_MAP]
    for y, cells in enumerate(rows.values()):
        for x, difference in cells.items():
            absent, level = _is_absent(difference), difference.relative
            colour: Any = colours(norm(level)) if 0 < level < math.inf else _EQUAL
            colour = RED if not math.isfinite(level) else "white" if absent else colour
            cell = Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                facecolor=colour,
                edgecolor=GREY if absent else "white",
                linewidth=0.5,
                hatch="////" if absent else None,
            )
            axes.add_patch(cell)
            if columns <= _WITH_NUMBERS:
                # the upper half of the color scale is light
                dark = level > 0 and (not math.isfinite(level) or norm(level) < 0.6)
                axes.text(
                    x,
                    y,
                    _word(difference),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if absent else None,
                )
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _word(difference: Difference) -> str:
    words = {"only-first": "only A", "only-second": "only B", "equal": "="}
    if difference.relative:
        return f"{difference.relative:.1g}".replace("e-0", "e-")
    return words.get(difference.kind, difference.kind)


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """Limits around the positive finite values, at least one decade apart."""
    positive = [v for v in values if 0 < v < math.inf] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(positive)))
    return low, max(*positive, 10 * low)


def _order(kind: str) -> tuple[bool, bool, str]:
    """Matrices first, then norms, then biases."""
    return kind.endswith(".bias"), "norm" in kind, kind
