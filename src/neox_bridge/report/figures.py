"""Converts matplotlib figures to the colors of a page, light and dark."""

import re
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from neox_bridge.report.parts import Plot
from neox_bridge.wording import wording

if TYPE_CHECKING:
    from neox_bridge.verification.lines_figure import Series

PLOTTED_RUNS = 8  # runs that get a separate plot
_INK, _GRID = "#123456", "#dddddd"  # text and axes, distinct from black text on a colored cell
_RC = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
# the plot colors by their CSS names in the page, which are lighter in dark mode
_THEMED = {
    _INK: "currentColor",
    _GRID: "var(--grid)",
    "#666666": "var(--plot-grey)",
    "#0072b2": "var(--plot-blue)",
    "#e8e8e8": "var(--plot-equal)",
}
_HEAD = re.compile(r'<svg\b[^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>')


def plot_of(draw: Callable[[], Any], caption: str, prefix: str) -> Plot:
    """A figure for a page. draw: makes the matplotlib figure. prefix: added to its ids.

    Raises BridgeError if matplotlib is missing.
    """
    from neox_bridge.verification.drawing import require, svg_of

    require()
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # for names in scripts that the font does not support, but the font of the page may
        warnings.simplefilter("ignore")
        svg = svg_of(draw(), prefix)
    head = _HEAD.match(svg)
    assert head is not None
    # without matplotlib's metadata and fixed size, which the page's style sets
    svg = f'<svg viewBox="0 0 {head[1]} {head[2]}" role="img">' + svg[head.end() :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>", "", svg, flags=re.DOTALL)
    # use the font of the page, so that names have the same width in every theme and in print
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg).replace("xlink:href", "href")
    return Plot(wording(_themed(svg)), caption, round(float(head[1]) * 4 / 3))


def lines_plot(
    caption: str,
    lines: "Series",
    prefix: str,
    *,
    y_label: str = "L2 norm",
    log: bool = True,
    marks: Iterable[tuple[float, str]] = (),
) -> Plot:
    """Lines over the steps, for a page. marks: steps with a short text."""
    from neox_bridge.verification.lines_figure import lines_figure

    labels = {"x_label": "step", "y_label": y_label}
    return plot_of(lambda: lines_figure("", lines, **labels, log=log, marks=marks), caption, prefix)


def _themed(svg: str) -> str:
    for colour, name in _THEMED.items():
        svg = svg.replace(colour, name)
    # letters on colored cells stay black or white; other black parts get the text color
    parts = re.split(r"(<text\b[^>]*>)", svg)
    parts = [part if part.startswith("<text") else _inked(part) for part in parts]
    return re.sub(r"\n\s*", "\n", "".join(parts))


def _inked(drawing: str) -> str:
    drawing = re.sub(r'(fill: |fill=")#ffffff', r"\1var(--plot-empty)", drawing)
    return drawing.replace("#000000", "currentColor")
