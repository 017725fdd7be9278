"""The page of models of no known family, and of audits of their suites."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hf_families import changed, make
from safetensors.torch import load_file

from neox_bridge.cli.app import app
from neox_bridge.report import sections
from neox_bridge.report.sections import checkpoint_section
from neox_bridge.verification.statistics import Statistics

pytestmark = pytest.mark.slow


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("family", ["qwen3_moe", "t5"])
def test_a_model_of_no_known_family(family: str, tmp_path: Path) -> None:
    model = make(family, tmp_path / "model")
    page = tmp_path / "report.html"
    done = run("report", model, "-o", page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "names, shapes and dtypes as stored, not by a family" in text
    assert f"All {len(load_file(model / 'model.safetensors'))} tensors" in text
    assert "<svg" in text


def test_weights_without_a_config(tmp_path: Path) -> None:
    model = make("qwen3", tmp_path / "model")
    (model / "config.json").unlink()
    assert run("report", model, "-o", tmp_path / "report.html").exit_code == 0


def test_a_model_compared_with_its_source(tmp_path: Path) -> None:
    model, copy = make("gemma2", tmp_path / "a"), make("gemma2", tmp_path / "b")
    page = tmp_path / "report.html"
    same = run("report", copy, "--source", model, "-o", page)
    assert same.exit_code == 0, same.output
    changed(copy, lambda tensors: next(iter(tensors.values())).add_(1))
    done = run("report", copy, "--source", model, "-o", page, "--overwrite")
    assert done.exit_code == 3, done.output
    assert "Different from the source: 1 tensor" in page.read_text()


def test_tensors_that_are_not_decoded(tmp_path: Path) -> None:
    entries = {
        "w": {"dtype": "F4", "shape": [4, 8], "data_offsets": [0, 16]},
        "v": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]},
    }
    for count, verdict in (
        (2, "Sound: 1 tensor without NaN, infinities or dead weights; 1 not decoded"),
        (1, "Not judged: 1 tensor not decoded"),
    ):
        header = json.dumps(dict(list(entries.items())[:count]))
        data = len(header).to_bytes(8, "little") + header.encode() + bytes(16 * count)
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "model.safetensors").write_bytes(data)
        page = tmp_path / "report.html"
        done = run("report", tmp_path / "model", "-o", page, "--overwrite")
        assert done.exit_code == 0, done.output
        assert verdict in page.read_text()


def test_an_audit_says_how_each_step_was_read(tmp_path: Path) -> None:
    for step in range(3):
        make("qwen3", tmp_path / "run" / f"step{step}", seed=step)
    done = run("audit", tmp_path / "run", "--json", "--cache", "none")
    (tmp_path / "audit.json").write_text(done.stdout)
    page = tmp_path / "report.html"
    assert run("report", tmp_path / "audit.json", "-o", page).exit_code == 0
    assert page.read_text().count("Hugging Face, by names") == 3


def test_a_table_and_a_plot_stay_small_enough_for_a_browser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tensor(name: str) -> Statistics:
        return Statistics(
            name, "float32", (2, 2), 4, -1.0, 1.0, 0.0, 0.5, 1.0, 0.0, 0, 0, 0, 0, False
        )

    monkeypatch.setattr(sections, "_MOST_ROWS", 5)
    monkeypatch.setattr(sections, "_MOST_PANELS", 3)
    monkeypatch.setattr(sections, "_MOST_OUTSIDE", 2)
    stats = [tensor(f"layers.{n % 2}.experts.{n // 2}.up") for n in range(20)]
    stats += [tensor(f"outside.{n}") for n in range(10)]
    section = checkpoint_section("x", [], {}, stats, [], "s0-")
    (table,) = section.tables
    assert (table.caption, len(table.rows)) == ("The first 5 of 30 tensors", 5)
    (plot,) = section.plots
    assert plot.caption.endswith("Not every tensor is drawn.")
    assert plot.svg.count("experts.") == 3
    assert plot.svg.count("outside.") == 2
