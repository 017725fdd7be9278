"""Pictures: what stands in them, that they stay the same, and what happens where none can be."""

import dataclasses
import math
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from common import GPT_NEOX, LLAMA, convert, fixture, make_hf
from PIL import Image

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.extras import install_command
from neox_bridge.verification.compare import Difference
from neox_bridge.verification.diff import diff
from neox_bridge.verification.differences_figure import differences_figure
from neox_bridge.verification.drawing import place_of, save, svg_of, ticks
from neox_bridge.verification.lines_figure import lines_figure
from neox_bridge.verification.statistics import Statistics, statistics
from neox_bridge.verification.statistics_figure import statistics_figure

pytestmark = pytest.mark.slow

SVG = "{http://www.w3.org/2000/svg}"
PYTHIA = [
    "attention.query_key_value.weight",
    "attention.dense.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
    "input_layernorm.weight",
    "input_layernorm.bias",
    "attention.query_key_value.bias",
    "attention.dense.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
    "mlp.dense_h_to_4h.bias",
    "mlp.dense_4h_to_h.bias",
]
LLAMA_KINDS = [
    *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("up", "gate", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]


def stats_of(name: str) -> list[Statistics]:
    return statistics(open_checkpoint(str(fixture(name))))


def made_up(kind: str, block: int, **changes: Any) -> Statistics:
    matrix = kind.endswith("weight") and "norm" not in kind
    base = Statistics(
        name=f"gpt_neox.layers.{block}.{kind}",
        dtype="float32",
        shape=(4, 4) if matrix else (4,),
        elements=16 if matrix else 4,
        minimum=-1.0 - block,
        maximum=0.5,
        mean=0.0,
        std=0.02,
        norm=1.0,
        zeros=0.0,
        nans=0,
        infs=0,
        dead_rows=0,
        padding_rows=0,
        constant=False,
    )
    return dataclasses.replace(base, **changes)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def overlaps(figure: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs of drawn texts whose boxes share some area, and texts that leave the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    boxes: list[tuple[str, Any]] = []
    draw = Text.draw

    def seen(self: Any, renderer: Any) -> None:
        draw(self, renderer)
        if self.get_text() and self.get_visible():
            boxes.append((self.get_text(), self.get_window_extent(renderer)))

    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    for _ in range(2):
        canvas.draw()  # the layout, as `plots` lets it settle
    figure.set_layout_engine("none")
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", seen)
        canvas.draw()
    assert len(boxes) > 10
    width, height = canvas.get_width_height()
    outside = [
        (text, "the edge")
        for text, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    return outside + [
        (a, b)
        for i, (a, one) in enumerate(boxes)
        for b, two in boxes[i + 1 :]
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 0.5
        and min(one.y1, two.y1) - max(one.y0, two.y0) > 0.5
    ]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gpt_neox.layers.13.mlp.dense_h_to_4h.bias", ("mlp.dense_h_to_4h.bias", 13)),
        ("model.layers.0.self_attn.q_proj.weight", ("self_attn.q_proj.weight", 0)),
        ("layers.3.attention.dense.bias", ("attention.dense.bias", 3)),
        ("gpt_neox.final_layer_norm.bias", ("final_layer_norm.bias", None)),
        ("embed_out.weight", ("embed_out.weight", None)),
    ],
)
def test_kind_and_block(name: str, place: tuple[str, int | None]) -> None:
    assert place_of(name) == place


@pytest.mark.parametrize("layers", [1, 2, 6, 12, 24, 32, 40, 48, 96, 1000])
def test_ticks(layers: int) -> None:
    found = ticks(layers, 7)
    assert found[0] == 0
    assert found[-1] < layers
    assert len(found) <= 7
    assert layers < 3 or len(found) > 2


@pytest.mark.parametrize("name", [GPT_NEOX[0], LLAMA[0]])
def test_a_panel_for_each_kind(name: str) -> None:
    stats = stats_of(name)
    figure = statistics_figure(stats)
    kinds = {place_of(s.name)[0] for s in stats if place_of(s.name)[1] is not None}
    panels = [axes.get_title(loc="left") for axes in figure.axes]
    assert sorted(panels) == sorted([*kinds, "outside the blocks"])
    if not name.startswith("llama"):
        assert panels == [*PYTHIA, "outside the blocks"]
    written = texts(svg_of(figure))
    assert set(panels) <= set(written)
    assert {"standard deviation", "largest absolute value", "block"} <= set(written)
    assert {place_of(s.name)[0] for s in stats} <= set(written)
    # what is drawn is what was measured
    for axes in figure.axes[:-1]:
        mine = [s for s in stats if place_of(s.name)[0] == axes.get_title(loc="left")]
        largest, spread = axes.get_lines()[:2]
        assert list(spread.get_ydata()) == [s.std for s in mine]
        assert list(largest.get_ydata()) == [max(-s.minimum, s.maximum) for s in mine]
        assert list(spread.get_xdata()) == [0, 1]


def test_what_has_no_place_on_the_axis_is_marked() -> None:
    zero = {"minimum": 0.0, "maximum": 0.0, "std": 0.0, "constant": True}
    gone = dict.fromkeys(("minimum", "maximum", "mean", "std"), math.nan)
    stats = [made_up("attention.dense.weight", block) for block in range(4)]
    stats[1] = made_up("attention.dense.weight", 1, nans=3)
    stats[2] = made_up("attention.dense.weight", 2, **zero)
    stats += [made_up("attention.dense.bias", block, **zero) for block in range(4)]
    stats += [made_up("mlp.dense_4h_to_h.bias", 0, nans=4, **gone)]
    figure = statistics_figure(stats)
    first, biases, lost = figure.axes
    _, spread, equal, broken = first.get_lines()
    assert [math.isnan(y) for y in spread.get_ydata()] == [False, False, True, False]
    assert (list(equal.get_xdata()), list(broken.get_xdata())) == ([2], [1])
    assert list(biases.get_lines()[2].get_xdata()) == [0, 1, 2, 3]
    assert [text.get_text() for text in biases.texts] == ["all zeros"]
    assert [text.get_text() for text in lost.texts] == ["no finite value"]


@pytest.mark.parametrize("layers", [1, 2, 12, 48])
@pytest.mark.parametrize("kinds", [PYTHIA, LLAMA_KINDS], ids=["pythia", "llama"])
def test_no_text_lies_on_another(
    kinds: list[str], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = [made_up(kind, block) for kind in kinds for block in range(layers)]
    names = ("model.embed_tokens.weight", "gpt_neox.final_layer_norm.weight", "embed_out.weight")
    stats += [dataclasses.replace(stats[0], name=name) for name in names]
    assert overlaps(statistics_figure(stats), monkeypatch) == []
    differences = [
        Difference(s.name, "values", 10, 1, 1e-3, 1e-4, 1.2345e-7 * (n + 1))
        for n, s in enumerate(stats)
    ]
    assert overlaps(differences_figure(differences), monkeypatch) == []


def test_differences() -> None:
    kind = "gpt_neox.layers.{}.attention.dense.weight"
    found = [
        Difference(kind.format(0), "equal", 10),
        Difference(kind.format(1), "values", 10, 1, 0.1, 0.1, 0.001),
        Difference(kind.format(2), "values", 10, 10, 1.0, 1.0, math.inf),
        Difference(kind.format(3), "only-first", 10),
        Difference(kind.format(10), "shape", 10),
        Difference("embed_out.weight", "values", 10, 10, 1.0, 1.0, 0.5),
        Difference("gpt_neox.embed_in.weight", "dtype", 10),
    ]
    figure = differences_figure(found)
    blocks, outside = figure.axes[:2]
    rows = [label.get_text() for label in blocks.get_yticklabels()]
    assert rows == ["attention.dense.weight"]
    cells = {round(cell.get_x() + 0.5): cell for cell in blocks.patches}
    assert sorted(cells) == [0, 1, 2, 3, 10]
    assert [cells[x].get_hatch() for x in (0, 1, 2, 3, 10)] == [None, None, None, "////", "////"]
    assert len({cells[x].get_facecolor() for x in (0, 1, 2, 3)}) == 4
    assert [text.get_text() for text in blocks.texts] == ["=", "0.001", "inf", "only A", "shape"]
    assert [text.get_text() for text in outside.texts] == ["dtype", "0.5"]
    written = texts(svg_of(figure))
    assert {"equal values", "no counterpart", "infinite or NaN", "embed_in.weight"} <= set(written)
    assert "largest difference / largest value" in written


def test_equal_checkpoints_have_no_scale(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=2)
    found = diff(open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox")))
    written = texts(svg_of(differences_figure(found)))
    assert written.count("=") == len(found) == 28
    assert "largest difference / largest value" not in written
    assert texts(svg_of(differences_figure([])))[-3:] == [
        "equal values",
        "no counterpart",
        "infinite or NaN",
    ]
    assert texts(svg_of(statistics_figure([])))


def test_lines() -> None:
    series = {
        "attention": [(0, 1.0), (1000, 2.0), (2000, math.nan)],
        "mlp": [(0, 0.0), (1000, 30.0)],
    }
    figure = lines_figure(
        "Norms", series, x_label="step", y_label="L2", log=True, marks=[(1000, "a jump")]
    )
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()[:2]] == ["attention", "mlp"]
    assert [math.isnan(y) for y in axes.get_lines()[1].get_ydata()] == [True, False]
    assert {"Norms", "step", "L2", "attention", "mlp", "a jump"} <= set(texts(svg_of(figure)))
    many = {f"line {n}": [(0, n), (1, n)] for n in range(28)}
    styles = {
        (line.get_color(), line.get_linestyle())
        for line in lines_figure("", many).axes[0].get_lines()
    }
    assert len(styles) == 28
    assert lines_figure("nothing", {}).axes


def test_files(tmp_path: Path) -> None:
    """The suffix is the format, and the same figure the same bytes."""
    stats = stats_of(GPT_NEOX[0])
    found = [Difference(s.name, "values", 1, 1, 1.0, 1.0, s.std) for s in stats]
    series = {"x": [(0.0, 1.0), (1.0, 2.0)]}
    for name in ("a", "b"):
        save(statistics_figure(stats), str(tmp_path / f"{name}-stats.svg"))
        save(differences_figure(found), str(tmp_path / f"{name}-diff.SVG"))
        save(lines_figure("x", series), str(tmp_path / f"{name}-lines.svg"))
    save(statistics_figure(stats), str(tmp_path / "stats.png"))
    for what in ("stats.svg", "diff.SVG", "lines.svg"):
        text = (tmp_path / f"a-{what}").read_text()
        assert text.startswith("<?xml")
        assert text == (tmp_path / f"b-{what}").read_text()
        assert "dc:date" not in text
        assert "<image" not in text
    with Image.open(tmp_path / "stats.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_svg_for_a_page() -> None:
    figure = statistics_figure(stats_of(GPT_NEOX[0]))
    svg = svg_of(figure, prefix="first-")
    assert svg.startswith("<svg")
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(found.startswith("first-") for found in ids)
    used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg))
    assert used
    assert {a or b for a, b in used} <= set(ids)
    assert svg_of(figure) == svg_of(figure)


# the commands


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_plots(tmp_path: Path) -> None:
    done = run("inspect", fixture(GPT_NEOX[0]), "--plot", tmp_path / "stats.svg")
    assert done.exit_code == 0
    assert "gpt_neox.embed_in.weight" in done.stdout, "--plot implies --stats"
    assert set(PYTHIA) <= set(texts((tmp_path / "stats.svg").read_text()))


def test_diff_plots(tmp_path: Path) -> None:
    one, two = (make_hf(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    done = run("diff", one, two, "--stat", "--plot", tmp_path / "diff.svg")
    assert (done.exit_code, done.stdout) == (3, "28 tensors: 0 equal, 28 different\n")
    assert set(PYTHIA) <= set(texts((tmp_path / "diff.svg").read_text()))


@pytest.mark.parametrize("command", ["inspect", "diff"])
@pytest.mark.parametrize("name", ["x.pdf", "png", "x.svg.gz", "svg"])
def test_other_suffixes_are_usage_errors(command: str, name: str, tmp_path: Path) -> None:
    sides = [fixture(GPT_NEOX[0])] * (2 if command == "diff" else 1)
    done = run(command, *sides, "--plot", tmp_path / name)
    assert done.exit_code == 2
    assert "is neither a .png nor an .svg file" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_no_folder_no_matplotlib(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said at once, not after the weights were read."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("neox_bridge.layouts.open.open_checkpoint", never)
    sides = [fixture(GPT_NEOX[0])] * (2 if command == "diff" else 1)
    done = run(command, *sides, "--plot", tmp_path / "nowhere" / "x.png")
    assert done.exit_code == 1
    assert f"the folder {tmp_path / 'nowhere'} does not exist" in done.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(command, *sides, "--plot", tmp_path / "x.png")
    assert done.exit_code == 1
    message = "error: matplotlib is missing, which draws plots. Install it: "
    assert done.stderr == f"{message}{install_command('plot')}\n"


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    """Names are anybody's: matplotlib would read what stands between two as mathematics."""
    stats = [made_up("attention.$dense_{$.weight", block) for block in range(2)]
    save(statistics_figure(stats), str(tmp_path / "a.png"))
    assert "attention.$dense_{$.weight" in svg_of(statistics_figure(stats))
    for number, figure in enumerate(
        (
            statistics_figure(stats),
            differences_figure([Difference("a.$.weight", "values", 4, 2, relative=0.2)]),
            lines_figure("norms", {"$": [(0.0, 1.0), (1.0, 1e5)]}, log=True),
            lines_figure("norms", {"$": [(0.0, 1.0), (1.0, 1e5)]}),
        )
    ):
        assert "mathdefault" not in svg_of(figure), number
    save(lines_figure("$x^$", {"$\\frac$": [(0.0, 1.0), (1.0, 2.0)]}), str(tmp_path / "b.svg"))
