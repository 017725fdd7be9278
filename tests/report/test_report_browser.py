"""The report in a headless Chromium: on a phone, in the dark, on paper, and silent."""

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import chromium
import pytest
from common import convert, fixture

from neox_bridge.cli.app import app
from neox_bridge.findings import Finding
from neox_bridge.report.page import render
from neox_bridge.report.parts import Section, Table, Verdict
from neox_bridge.report.sections import section_of
from neox_bridge.verification.compare import Difference

BINARY = chromium.find()
if BINARY is None:
    pytest.skip(
        "no Chromium: set CHROMIUM, have one on PATH, or run python tests/helpers/chromium.py",
        allow_module_level=True,
    )
playwright = pytest.importorskip("playwright.sync_api")
NAME = "gpt_neox.layers.{}.attention.query_key_value_of_a_rather_long_name.weight"
THEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as manager:
        made = manager.chromium.launch(
            executable_path=BINARY,
            env=chromium.environment(),
            args=["--disable-gpu", "--no-zygote", "--disable-dev-shm-usage"],
        )
        yield made
        made.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a genuine checkpoint's conversion and verification look like."""
    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("report")
    source = fixture("pythia_fp32_2024_09_old_mlp_pp0_tp2")
    convert(source, folder / "hf")
    page = folder / "conversion.html"
    arguments = ["report", folder / "hf", "--source", source, "-o", page]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return page


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a page may hold, of every state, with words that don't break."""
    base = Difference("", "values", 9, 3, 1.0, 0.1)
    apart = [replace(base, name=NAME.format(i), relative=1 / (1 + i)) for i in range(40)]
    document = {"equal": False, "tensors": [asdict(difference) for difference in apart]}
    endless = "x" * 300
    findings = [Finding("c", word, endless, endless) for word in ("error", "warning", "info")]
    table = Table(endless, ("a", "b"), "ll", [(endless, endless)], folded=False)
    states = ("good", "neutral", "warning", "differs", "bad")
    sections = [section_of(document, endless, "s-")]
    sections += [
        Section("K", endless, Verdict(s, endless), [("k" * 40, endless)], findings, (), [table])
        for s in states
    ]
    page = tmp_path_factory.mktemp("crowded") / "page.html"
    page.write_text(render(endless, sections, [("read", endless)], "now"), encoding="utf-8")
    return page


@pytest.fixture(params=["report", "crowded"])
def page(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def opened(browser: Any, page: Path, theme: str = "light", width: int = 1200) -> Any:
    """The page, with what it said and asked for in ``tab.heard``."""
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 800})
    tab = context.new_page()
    tab.heard = []
    tab.on("console", lambda message: tab.heard.append(message.text))
    tab.on("pageerror", lambda error: tab.heard.append(str(error)))
    tab.on("request", lambda request: tab.heard.append(request.url))
    tab.goto(page.as_uri())
    return tab


@pytest.mark.parametrize("theme", THEMES)
def test_nothing_is_asked_for_and_nothing_complained_of(
    browser: Any, page: Path, theme: str
) -> None:
    heard = opened(browser, page, theme).heard
    assert [said for said in heard if not said.startswith("data:")] == [page.as_uri()]


@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_the_page_is_no_wider_than_the_screen(browser: Any, page: Path, width: int) -> None:
    tab = opened(browser, page, width=width)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # nothing is cut off either: what is wider scrolls within itself
    wide = tab.evaluate(
        """[...document.querySelectorAll('body *:not(svg *)')].filter(e =>
           !e.closest('.scroll') && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 &&
           getComputedStyle(e).display != 'inline').map(e => e.outerHTML.slice(0, 80))"""
    )
    assert wide == []


def test_wide_tables_scroll_by_keyboard(browser: Any, crowded: Path) -> None:
    tab = opened(browser, crowded, width=375)
    regions = tab.locator(".scroll").filter(has=tab.locator("table"))
    first = regions.first
    assert first.get_attribute("tabindex") == "0"  # not every browser gives it by itself
    assert first.evaluate("e => e.scrollWidth > e.clientWidth")
    first.focus()
    tab.keyboard.press("ArrowRight")
    for _ in range(100):  # the policy forbids Playwright's own waiting
        if moved := first.evaluate("e => e.scrollLeft"):
            break
        tab.wait_for_timeout(50)
    assert moved > 0


CONTRAST = """() => {
  const number = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = number(c).slice(0, 3).map(v => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
    return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (number(c)[3] !== 0) return c } return 'rgb(255, 255, 255)' };
  const found = {};
  for (const e of document.querySelectorAll('body *:not(svg *)')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    const key = e.tagName + '.' + e.className;
    found[key] = Math.min(found[key] ?? 99, (a + .05) / (b + .05)) }
  return found }"""


@pytest.mark.parametrize("theme", THEMES)
def test_every_text_stands_out(browser: Any, page: Path, theme: str) -> None:
    """WCAG 2's contrast of 4.5 at least (AA), headings, badges and small print included."""
    tab = opened(browser, page, theme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = tab.evaluate(CONTRAST)
    assert len(found) > 8
    assert {key: value for key, value in found.items() if value < 4.5} == {}


def test_the_dark_page_is_dark_plots_and_all(browser: Any, report: Path) -> None:
    colours = {}
    for theme in THEMES:
        tab = opened(browser, report, theme)
        style = "getComputedStyle(document.querySelector('{}')).{}"
        colours[theme] = [
            tab.evaluate(style.format(*what))
            for what in (
                ("body", "backgroundColor"),
                ("body", "color"),
                ("section", "backgroundColor"),
                ("svg text", "fill"),
                ("#verdict", "color"),
            )
        ]
    # no sheet under the plot
    (plot,) = re.findall(r"<svg.*?</svg>", report.read_text(encoding="utf-8"), re.DOTALL)
    assert not re.search(r"fill[:=][ \"]*(#fff|white|var\(--plot-empty)", plot)
    assert all(a != b for a, b in zip(*colours.values(), strict=True))
    light, dark = (sum(map(int, re.findall(r"\d+", c[0]))) for c in colours.values())
    assert light > 700
    assert dark < 100
    assert colours["dark"][3] == colours["dark"][1]  # the plot's letters are the page's


@pytest.mark.parametrize("theme", THEMES)
def test_it_prints_dark_on_white_with_everything_unfolded(
    browser: Any, crowded: Path, theme: str
) -> None:
    tab = opened(browser, crowded, theme)
    seen = "document.querySelector('details td').checkVisibility()"
    assert not tab.evaluate(seen)
    tab.emulate_media(media="print", color_scheme=theme)
    assert tab.evaluate(seen)
    ink = tab.evaluate("getComputedStyle(document.body).color")
    assert sum(map(int, re.findall(r"\d+", ink))) < 150
    paper = "getComputedStyle(document.documentElement).{}"
    assert tab.evaluate(paper.format("backgroundColor")) == "rgb(255, 255, 255)"
    assert tab.evaluate(paper.format("colorScheme")) == "light"
    sheet = "getComputedStyle(document.querySelector('section')).backgroundColor"
    assert tab.evaluate(sheet) == "rgba(0, 0, 0, 0)"
    # A4 less margins, in CSS pixels
    tab.set_viewport_size({"width": 718, "height": 1000})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 718
    assert tab.pdf(format="A4").startswith(b"%PDF-")


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    name = "<script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"
    apart = asdict(Difference(f"layers.0.{name}", "values", 4, 1, 1.0, 1.0, 1.0))
    section = section_of({"equal": False, "tensors": [apart]}, name, "s0-")
    path = tmp_path / "page.html"
    path.write_text(render(name, [section], [("read", name)], "now"), encoding="utf-8")
    tab = opened(browser, path)
    assert tab.title() != "run"
    assert tab.locator("script, img").count() == 0
    assert [said for said in tab.heard if not said.startswith("data:")] == [path.as_uri()]


def test_the_policy_stops_what_would_get_in(browser: Any, report: Path, tmp_path: Path) -> None:
    """Were a name not escaped, it would still not run, nor call home."""
    text = report.read_text(encoding="utf-8")
    bad = "<script>document.title = 'run'</script><img src='http://localhost:9/x.png'>"
    path = tmp_path / "page.html"
    path.write_text(text.replace("</main>", bad + "</main>"), encoding="utf-8")
    tab = opened(browser, path)
    assert tab.title() != "run"
    assert any("Content Security Policy" in said for said in tab.heard)
