"""The report: what its page says of each kind of result, and that it needs nothing else."""

import builtins
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from common import convert, fixture, make_hf
from safetensors.torch import load_file, save_file

from neox_bridge.cli.app import app
from neox_bridge.extras import install_command
from neox_bridge.findings import Finding
from neox_bridge.report.page import render, verdict_of
from neox_bridge.report.parts import Section, Table, Verdict
from neox_bridge.report.sections import checkpoint_section, section_of
from neox_bridge.verification.compare import Difference
from neox_bridge.verification.statistics import Statistics

pytestmark = pytest.mark.slow

NEOX = fixture("pythia_fp32_2024_09_old_mlp_pp0_tp2")
HOSTILE = "<script>alert(1)</script>\"'&amp;$\\frac{$<img src=x onerror=alert(2)>"


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def printed(path: Path, *args: object) -> Path:
    """What a command prints with --json, in a file."""
    done = run(*args, "--json")
    assert done.exit_code in (0, 3), done.output
    path.write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of a genuine GPT-NeoX checkpoint."""
    target = tmp_path_factory.mktemp("report") / "pythia-hf"
    convert(NEOX, target)
    return target


@pytest.fixture(scope="module")
def other(hf: Path) -> Path:
    """The same, but for one tensor that has another value and a NaN."""
    made = hf.parent / "other"
    made.mkdir()
    for file in hf.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    tensors = load_file(made / "model.safetensors")
    tensors["gpt_neox.layers.1.attention.dense.weight"][0, :2] = float("nan")
    save_file(tensors, made / "model.safetensors")
    return made


class Page(HTMLParser):
    """The elements of a page, its visible text, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("meta", "path", "use", "rect", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data

    def tags(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def verdict(self) -> str:
        found = re.search(r'id="verdict">(.*?)</p>', self.source, re.DOTALL)
        assert found is not None
        return " ".join(re.sub(r"<[^>]*>", " ", found[1]).split())


def report(tmp_path: Path, *args: object, code: int = 0) -> Page:
    target = tmp_path / "page.html"
    done = run("report", *args, "-o", target, "--overwrite")
    assert done.exit_code == code, done.output
    return Page(target)


def assert_alone(page: Page) -> None:
    """Nothing in the page runs, or refers to anything outside it."""
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "img")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(("#", "data:image/png;base64,"))  # a colour bar
    assert set(re.findall(r"url\(([^)]{1,2})", page.source)) <= {"#s", "#n"}
    assert "@import" not in page.source
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    (policy,) = [m["content"] for m in page.tags("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_a_conversion_with_its_source(hf: Path, tmp_path: Path) -> None:
    page = report(tmp_path, hf, "--source", NEOX)
    assert_alone(page)
    assert page.verdict.startswith("✓")
    assert "Equal, bit by bit: 28 tensors" in page.verdict
    assert "Sound: 28 tensors" in page.verdict
    assert len(page.tags("svg")) == 1
    assert "attention.query_key_value.weight" in page.text
    assert "checkpoints/global_step2" in page.text  # provenance
    assert ["num_layers", "2"] in page.rows  # the run's settings
    names = [row[0] for row in page.rows if row[1:2] == ["float32"]]
    assert len(names) == 28
    assert names == list(dict.fromkeys(names))
    assert [meta["content"] for meta in page.tags("meta") if meta.get("name") == "viewport"]


def test_paths_are_as_they_were_told(hf: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A page goes to others, whom the folders of this machine don't concern."""
    monkeypatch.chdir(hf.parent)
    (hf.parent / "source").symlink_to(NEOX)
    page = report(tmp_path, hf.name, "--source", "source")
    assert hf.name in page.text
    assert str(hf.parent) not in page.source
    assert str(NEOX) not in page.source


def test_a_checkpoint_that_is_none_of_ours(tmp_path: Path) -> None:
    page = report(tmp_path, NEOX)
    assert_alone(page)
    assert "Checkpoint" in page.text
    assert "Provenance" not in page.text


def test_a_run_without_its_yml(tmp_path: Path) -> None:
    """--config names it, as for the other commands; the error says the whole command."""
    shutil.copytree(fixture("pythia_fp32_pp0_tp1"), tmp_path / "run")
    configs = next((tmp_path / "run").glob("global_step*")) / "configs"
    files = sorted(configs.rename(tmp_path / "yml").iterdir())
    named = [word for file in files for word in ("--config", file)]
    words = ["report", tmp_path / "run", "-o", tmp_path / "page.html"]
    done = run(*words)
    assert done.exit_code == 1
    typed = " ".join(map(str, words))
    assert f"neox-bridge {typed} --config" in done.stderr
    done = run(*words, *named)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page.html").is_file()
    done = run("report", fixture("pythia_fp32_pp0_tp1"), *words[2:], "--overwrite", *named)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: --config: only for ")


def test_a_checkpoint_with_nan(hf: Path, other: Path, tmp_path: Path) -> None:
    page = report(tmp_path, other, "--source", hf, code=3)
    assert_alone(page)
    assert page.verdict.startswith("✗")
    assert "Different from the source: 1 tensor" in page.text
    assert "NaN in 1 of 28 tensors" in page.text
    assert len(page.tags("svg")) == 2


def test_results_that_were_printed(hf: Path, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    printed(folder / "1-convert.json", "convert", NEOX, tmp_path / "out")
    printed(folder / "2-plan.json", "convert", NEOX, tmp_path / "no", "--dry-run")
    printed(folder / "3-verify.json", "verify", NEOX, hf)
    printed(folder / "4-diff.json", "diff", hf, other)
    (folder / "notes.txt").write_text("not read")
    page = report(tmp_path, folder, code=3)
    assert_alone(page)
    assert page.verdict.startswith("≠")
    assert "Different: 1 of 28 tensors" in page.verdict
    kinds = re.findall(r'class="kind">(\w+)<', page.source)
    assert kinds == ["Conversion", "Plan", "Verification", "Diff"]
    assert "Written, read back and equal to the source" in page.text
    assert "Planned: nothing was written" in page.text
    assert "Equal, bit by bit: 28 tensors" in page.text
    assert [
        "how attention.dense.bias was spread over 2 ranks",
        "merged: every rank held a part, and their sum is written",
    ] in (page.rows)
    (row,) = [row for row in page.rows if "gpt_neox.layers.1.attention.dense.weight" in row]
    assert row[1:4] == ["values", "2 of 1,024", "inf"]


def test_an_unverified_conversion_is_said_to_be(tmp_path: Path) -> None:
    done = printed(tmp_path / "c.json", "convert", NEOX, tmp_path / "out", "--no-verify")
    page = report(tmp_path, done)
    assert page.verdict == "! Written, but not compared with the source"
    assert page.tags("p")[1]["class"] == "verdict warning"


def test_logits(hf: Path) -> None:
    document = {
        "holds": False,
        "source": "a",
        "target": "b",
        "tensors": 28,
        "size": 5,
        "differences": [],
        "findings": [],
        "logits": {
            "agrees": False,
            "tokens": 40,
            "largest": 0.5,
            "mean": 0.1,
            "relative": 0.2,
            "kl": 0.01,
            "top1": 0.75,
            "place": "block 1: MLP",
            "apart": 0.3,
            "causes": [{"cause": "gelu kind", "text": "tanh, not erf", "inherent": False}],
        },
    }
    section = section_of(document, "v.json", "s0-")
    assert section.verdict == Verdict("bad", "Different from the source: the logits", holds=False)
    assert "block 1: MLP" in dict(section.facts)["logits"]
    assert [finding.severity for finding in section.findings] == ["error"]
    assert "gelu kind: tanh, not erf" in section.findings[0].message


def audit_of(tmp_path: Path, *wrong: tuple[str, str]) -> Path:
    """An audit of two runs of three steps; wrong: (step, step) of run a, the first is copied."""
    suite = tmp_path / "suite"
    for run_name in ("a", "b"):
        for number in range(3):
            make_hf(suite / run_name / f"step{number}", seed=ord(run_name) + number)
    for source, target in wrong:
        data = (suite / "a" / f"step{source}" / "model.safetensors").read_bytes()
        (suite / "a" / f"step{target}" / "model.safetensors").write_bytes(data)
    cache = ("--cache", tmp_path / "cache")
    return printed(tmp_path / "audit.json", "audit", suite, *cache)


def test_an_audit(tmp_path: Path) -> None:
    made = audit_of(tmp_path, ("1", "2"))
    page = report(tmp_path, made, code=3)
    assert_alone(page)
    assert page.verdict.startswith("✗")
    assert "in 6 steps of 2 runs" in page.verdict
    assert "steps 1 and 2 are identical" in page.text
    assert len(page.tags("svg")) == 3  # both runs, and each
    assert "stroke: #000000" not in page.source  # a black line is ink, in the dark too
    steps = [row for row in page.rows if row[0].endswith(("suite/a", "suite/b"))]
    assert [row[1] for row in steps] == ["0", "1", "2"] * 2
    assert {row[2] for row in steps[1:3]} == {"error"}
    assert steps[1][-1] == steps[2][-1]


def test_an_audit_with_warnings_only_ends_as_the_audit_does() -> None:
    step = {"run": "a", "step": 1, "label": "1", "kind": "neox", "tensor_parallel": 2}
    step |= {"dtype": "float16", "bytes": 10, "hash": "0" * 32, "norm": 1.0, "verdict": "ok"}
    step |= {"tensors": {}}
    fault: dict[str, Any] = asdict(Finding("missing", "warning", "step 2 is missing"))
    fault |= {"run": "a", "steps": ["2"], "tensors": []}
    document = {"holds": False, "findings": [fault], "steps": [step]}
    section = section_of(document, "a.json", "s0-")
    assert section.verdict == Verdict("warning", "1 warning in 1 step of 1 run", holds=False)
    assert section.tables[0].rows[0][3] == "GPT-NeoX, TP 2"
    clean = section_of(document | {"holds": True, "findings": []}, "a.json", "s0-")
    assert clean.verdict == Verdict("good", "Nothing is wrong in 1 step of 1 run")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """In every place where a checkpoint, a file or its maker can put a word."""
    numbers = Statistics(
        HOSTILE, HOSTILE, (2, 2), 4, -1.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0, 0, 0, 0, False
    )
    stats = [replace(numbers, name=f"model.layers.0.{HOSTILE}"), numbers]
    found = [Finding(HOSTILE, "error", HOSTILE, HOSTILE)]
    record = {"written_by": HOSTILE, "source": {HOSTILE: HOSTILE}, "config": {HOSTILE: HOSTILE}}
    section = checkpoint_section(HOSTILE, [(HOSTILE, HOSTILE)], record, stats, found, "s0-")
    names = [HOSTILE, f"model.layers.0.{HOSTILE}"]
    apart = [asdict(Difference(name, "values", 4, 1, 1.0, 1.0, 1.0)) for name in names]
    diff = section_of({"equal": False, "tensors": apart}, HOSTILE, "s1-")
    path = tmp_path / "hostile.html"
    text = render(HOSTILE, [section, diff], [("read", HOSTILE)], HOSTILE)
    path.write_text(text, encoding="utf-8")
    page = Page(path)
    assert_alone(page)
    assert page.text.count("<script>alert(1)</script>") > 10
    drawing = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert drawing.count("&lt;script&gt;") >= 3
    assert "\\frac{$" in drawing  # no formula


def test_the_same_arguments_make_the_same_page(hf: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    first, second = (report(tmp_path, hf).source for _ in range(2))
    assert first == second
    assert "1970-01-02 00:00 UTC" in first


def test_long_tables_are_folded(tmp_path: Path) -> None:
    apart = [asdict(Difference(f"t{i}", "values", 9, 1, 1.0, 0.1, 1 / (1 + i))) for i in range(40)]
    section = section_of({"equal": False, "tensors": apart}, "d.json", "s0-")
    assert [(len(table.rows), table.folded) for table in section.tables] == [
        (12, False),
        (40, True),
    ]


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (("good",), "good words"),
        (("good", "good"), "good words. good words"),
        (("good", "good", "good"), "All 3 results hold"),
        (("good", "neutral"), "1 of 2 results hold; the others have no findings"),
        (("good", "bad", "warning"), "K, T: bad words"),
        (("differs", "differs", "good"), "Differences in 2 of 3 results"),
        (("warning", "warning"), "Warnings in 2 of 2 results"),
    ],
)
def test_the_page_s_verdict(states: Any, words: str) -> None:
    sections = [Section("K", "T", Verdict(state, f"{state} words")) for state in states]
    assert verdict_of(sections).words == words


def test_json_says_what_the_page_does(hf: Path, other: Path, tmp_path: Path) -> None:
    diff = printed(tmp_path / "d.json", "diff", hf, other)
    done = run("report", diff, diff, hf, "-o", tmp_path / "page.html", "--json")
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert told["state"] == "differs"
    assert [section["kind"] for section in told["sections"]] == ["Diff", "Diff", "Conversion"]
    assert_alone(Page(tmp_path / "page.html"))  # plots of the same names share no id


def test_what_is_no_result(hf: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for content, said in (
        ("{", "bad.json is not JSON"),
        ("[" * 100_000, "bad.json is not JSON"),
        ("[]", "bad.json is not a result"),
        ('{"a": 1}', "bad.json is not a result that a report can show"),
        (
            '{"equal": false, "tensors": [{"nme": 1}]}',
            "looks like a result of diff, but is incomplete",
        ),
        ('{"holds": true, "differences": 5}', "result of verify, but is incomplete"),
        ('{"holds": 1, "findings": [], "steps": [1]}', "result of audit, but is incomplete"),
    ):
        bad.write_text(content)
        done = run("report", bad, "-o", tmp_path / "page.html")
        assert done.exit_code == 1, content
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    (tmp_path / "empty").mkdir()
    for args, code, said in (
        ((tmp_path / "empty",), 1, "contains neither a checkpoint nor JSON files"),
        ((tmp_path / "missing",), 1, "no such folder"),
        ((bad, "--source", hf), 2, "--source: needs exactly one checkpoint"),
    ):
        bad.write_text('{"equal": true, "tensors": []}')
        done = run("report", *args, "-o", tmp_path / "page.html")
        assert done.exit_code == code
        assert said in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_is_there_stays(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("mine")
    done = run("report", hf, "-o", target)
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert target.read_text() == "mine"
    done = run("report", hf, "-o", target, "--overwrite")
    assert done.exit_code == 4
    assert "was not written by neox-bridge report" in done.stderr
    assert target.read_text() == "mine"
    assert run("report", hf, "-o", tmp_path).exit_code == 1
    assert run("report", hf, "-o", tmp_path / "no" / "page.html").exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]


def test_a_page_behind_a_link_is_replaced_there(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.html").write_text("")
    (tmp_path / "page.html").symlink_to("pages/a.html")
    assert run("report", hf, "-o", tmp_path / "page.html", "--overwrite").exit_code == 0
    assert (tmp_path / "page.html").is_symlink()
    assert "neox-bridge" in (tmp_path / "pages" / "a.html").read_text()
    assert run("report", hf, "-o", tmp_path / "page.html", "--overwrite").exit_code == 0
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["a.html"]


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra(hf: Path, tmp_path: Path, monkeypatch: Any, missing: str) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {missing!r}", name=missing)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    done = run("report", hf, "-o", tmp_path / "page.html")
    assert done.exit_code == 1
    command = install_command("report")
    assert f"{missing} is missing, which reports need. Install it: {command}" in done.stderr


def test_a_table_is_escaped_and_aligned() -> None:
    table = Table("c", ("a", "b"), "lr", [("<b>", "1")], folded=False)
    section = Section("K", "T", Verdict("good", "w"), tables=[table])
    text = render("t", [section], [], "now")
    assert '<td class="l">&lt;b&gt;</td><td class="r">1</td>' in text
