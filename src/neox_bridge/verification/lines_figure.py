"""Draws values over steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neox_bridge.verification.drawing import COLOURS, GRID, RED, figure_of, log_axis, styled

Series = Mapping[str, Sequence[tuple[float, float]]]


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
    """Draw a line through (x, y) points for each name. log: use a logarithmic y axis.

    marks: x values with a short text about a finding there. Points that are not finite, or not
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
