"""Figures of statistics, differences and of anything over steps, as PNG or SVG files or SVG text.

The functions named ``*_figure`` make a matplotlib figure, ``plot_*`` write one to a file, and
``svg_of`` gives one as text for a page.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

from neox_bridge.verification.compare import Difference
from neox_bridge.verification.differences_figure import differences_figure
from neox_bridge.verification.drawing import (
    COLOURS,
    GRID,
    RED,
    figure_of,
    log_axis,
    require,
    styled,
)
from neox_bridge.verification.statistics import Statistics
from neox_bridge.verification.statistics_figure import statistics_figure

__all__ = [
    "SUFFIXES",
    "differences_figure",
    "lines_figure",
    "plot_differences",
    "plot_lines",
    "plot_statistics",
    "require",
    "save",
    "statistics_figure",
    "svg_of",
]
SUFFIXES = (".png", ".svg")
Series = Mapping[str, Sequence[tuple[float, float]]]
_METADATA = {"Date": None, "Creator": None}  # the same figure is the same file


def plot_statistics(stats: Sequence[Statistics], path: str) -> None:
    """Draw ``statistics_figure`` to a .png or .svg file."""
    save(statistics_figure(stats), path)


def plot_differences(differences: Sequence[Difference], path: str) -> None:
    """Draw ``differences_figure`` to a .png or .svg file."""
    save(differences_figure(differences), path)


def plot_lines(
    title: str,
    series: Series,
    path: str,
    *,
    x_label: str = "",
    y_label: str = "",
    log: bool = False,
    marks: Iterable[tuple[float, str]] = (),
) -> None:
    """Draw ``lines_figure`` to a .png or .svg file."""
    figure = lines_figure(title, series, x_label=x_label, y_label=y_label, log=log, marks=marks)
    save(figure, path)


def save(figure: Any, path: str) -> None:
    """Write a figure in the format that the file's suffix names."""
    data = _drawn(figure, "svg" if path.lower().endswith(".svg") else "png")
    with open(path, "wb") as file:
        file.write(data)


def svg_of(figure: Any, prefix: str = "") -> str:
    """A figure as one ``<svg>`` element, to stand in an HTML page; text stays text.

    prefix: of every id, so that several figures of one page don't share any.
    """
    text = _drawn(figure, "svg").decode()
    text = text[text.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text) if prefix else text


@styled
def _drawn(figure: Any, form: str) -> bytes:
    """The figure as a file; drawn twice, as its layout settles only in the second drawing."""
    out = BytesIO()
    for _ in range(2):
        out = BytesIO()
        figure.savefig(out, format=form, dpi=150, metadata=_METADATA if form == "svg" else None)
    return out.getvalue()


@styled
def lines_figure(
    title: str,
    series: Series,
    *,
    x_label: str = "",
    y_label: str = "",
    log: bool = False,
    marks: Iterable[tuple[float, str]] = (),
) -> Any:
    """Lines through (x, y) points, one for each name; log: a logarithmic y axis.

    marks: x values with a short text, for what was found there. Points that aren't finite, or not
    positive on a logarithmic axis, leave a gap.
    """
    figure = figure_of(8.0, max(3.6, 0.19 * min(len(series), 32)))
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    styles = ("-", "--", ":", "-.")
    for number, (name, points) in enumerate(series.items()):
        ys = [y if math.isfinite(y) and (y > 0 or not log) else math.nan for _, y in points]
        axes.plot(
            [x for x, _ in points],
            ys,
            styles[number // len(COLOURS) % len(styles)],
            color=COLOURS[number % len(COLOURS)],
            marker="o" if len(points) <= 60 else None,
            markersize=3,
            linewidth=1.4,
            label=name,
        )
    if log:
        log_axis(axes.yaxis, [y for points in series.values() for _, y in points])
    for x, text in marks:
        axes.axvline(x, color=RED, linewidth=0.8, linestyle=":")
        axes.annotate(
            text,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -2),
            textcoords="offset points",
            rotation=90,
            va="top",
            color=RED,
            fontsize=7,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=GRID, linewidth=0.5)
    if len(series) > 1:
        columns = 1 + (len(series) - 1) // 32
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=columns)
    return figure
