"""Shared by all figures: colors, style, axes, files. matplotlib is in the extra ``[plot]``.

No figure is shown in a window, so pyplot and its global state are not used. The colors are those of
Okabe and Ito, which people with any kind of color vision can distinguish.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from io import BytesIO
from typing import Any, ParamSpec, TypeVar

from neox_bridge.errors import BridgeError
from neox_bridge.extras import missing

_P = ParamSpec("_P")
_T = TypeVar("_T")

BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", RED, "#000000")
SUFFIXES = (".png", ".svg")
GREY, GRID = "#666666", "#dddddd"
_STYLE = {
    "svg.fonttype": "none",  # text stays text, so it can be searched and uses the page's fonts
    "svg.hashsalt": "neox-bridge",  # the same figure is the same file
    "text.parse_math": False,  # a $ in a name does not start a formula
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}
_METADATA = {"Date": None, "Creator": None}  # the same figure is the same file


def require() -> None:
    """Raise BridgeError early if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing("matplotlib is missing, which draws plots", "plot") from None


def check_plot(path: str) -> None:
    """Raise BridgeError early if the picture cannot be written."""
    require()
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise BridgeError(f"{path}: the folder {folder} does not exist. Create it first.")


def styled(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a function that draws: apply this style; BridgeError if matplotlib is missing."""

    @wraps(draw)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        require()
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return run


def figure_of(width: float, height: float) -> Any:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # the font of a page may be wider than the measured one
    return Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))


def place_of(name: str) -> tuple[str, int | None]:
    """A Hugging Face name as (kind, block): the name without its block, and the block's number.

    ``gpt_neox.layers.3.attention.dense.bias`` is (``attention.dense.bias``, 3); names outside the
    blocks are shortened to start at their last module, and have None.
    """
    if match := re.search(r"(?:^|\.)layers\.(\d+)\.(.+)", name):
        return match[2], int(match[1])
    return ".".join(name.split(".")[-2:]), None


def log_axis(axis: Any, values: Iterable[float]) -> bool:
    """Make a logarithmic axis for the positive values. Without any, no ticks and returns False."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    vertical = axis.axis_name == "y"
    positive = [v for v in values if math.isfinite(v) and v > 0]
    if not positive:
        axis.set_ticks([])
        return False
    low, high = min(positive) / 1.4, max(positive) * 1.4
    if high / low < 6:  # space for two ticks out of 1, 2, 5
        low, high = low / 1.6, high * 1.6
    (axis.axes.set_yscale if vertical else axis.axes.set_xscale)("log")
    (axis.axes.set_ylim if vertical else axis.axes.set_xlim)(low, high)
    axis.set_major_locator(
        LogLocator(subs=(1.0,) if high / low > 60 else (1.0, 2.0, 5.0), numticks=6)
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    return True


def ticks(layers: int, most: int) -> list[int]:
    """The blocks to number on an axis, at most about this many."""
    steps = (1, 2, 4, 5, 8, 10, 20, 25, 50)
    fits = (step for step in steps if layers <= step * most)
    return list(range(0, layers, next(fits, -(-layers // most))))


def legend(figure: Any, handles: Sequence[Any]) -> None:
    """One legend below all panels."""
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8
    )


def save(figure: Any, path: str) -> None:
    """Write a figure in the format of the file suffix."""
    data = _drawn(figure, "svg" if path.lower().endswith(".svg") else "png")
    with open(path, "wb") as file:
        file.write(data)


def svg_of(figure: Any, prefix: str = "") -> str:
    """A figure as one ``<svg>`` element for an HTML page; text stays text.

    prefix: added to every id, so that ids are unique in a page with several figures.
    """
    text = _drawn(figure, "svg").decode()
    text = text[text.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text) if prefix else text


@styled
def _drawn(figure: Any, form: str) -> bytes:
    """The figure as a file. It is drawn twice, because the layout is final only the second time."""
    out = BytesIO()
    for _ in range(2):
        out = BytesIO()
        figure.savefig(out, format=form, dpi=150, metadata=_METADATA if form == "svg" else None)
    return out.getvalue()
