"""Paths that are not UTF-8: legal on Linux, and found in old archives. Every command takes them."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from commands import run_all
from common import convert, fixture

from neox_bridge.wording import plain

DATA = Path(__file__).parents[1] / "data"
NAME = os.fsdecode(b"caf\xe9")  # Latin-1


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    base = tmp_path / NAME
    base.mkdir()
    try:
        os.fsencode(NAME)
        (base / NAME).touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    shutil.copytree(fixture("pythia_fp32_pp1_tp2"), base / f"run{NAME}")
    convert(base / f"run{NAME}", base / f"hf{NAME}")
    return {"run": str(base / f"run{NAME}"), "hf": str(base / f"hf{NAME}")}


@pytest.mark.slow
def test_every_command_takes_them(sources: dict[str, str], tmp_path: Path) -> None:
    run, hf = sources["run"], sources["hf"]
    out = str(tmp_path / NAME / "out")
    trained = str(tmp_path / NAME / "trained")
    shutil.copytree(DATA / "reshard" / "fp32", trained)
    jobs = [
        ["convert", run, out + "1"],
        ["convert", hf, out + "2", "--tp", "2"],
        ["convert", run, out + "3", "--to", "neox", "--tp", "1"],
        ["convert", hf, out + "4", "--json"],
        ["convert", hf, out + "5", "--dry-run"],
        ["convert", hf, out + "6", "--dry-run", "--json"],
        ["inspect", run],
        ["inspect", hf, "--json"],
        ["inspect", "--security", run],
        ["verify", run, hf],
        ["verify", hf],
        ["verify", hf, "--json"],
        ["diff", run, hf, "--json"],
        ["doctor", run],
        ["doctor", run, "--json"],
        ["doctor", run, "--fix", out + "7", "--for", "neox@2024-03"],
        ["audit", run],
        ["audit", run, "--json"],
        ["batch", run, out + "8"],
        ["batch", run, out + "8", "--json"],
        ["batch", run, out + "9", "--log", out + ".log"],
        ["batch", run, out + "10", "--dry-run"],
        ["report", run, "-o", out + ".html"],
        ["convert", hf, out + "11", "--to", "neox", "--optimizer", "fresh"],
        ["reshard", trained, out + "12", "--tp", "1"],
        ["export-optimizer", trained, out + "13"],
        ["verify", out + "2"],
        ["convert", hf, out + "2", "--tp", "2", "--overwrite"],
        ["convert", out + "2", out + "14"],
        ["convert", out + "12", out + "15"],
    ]
    results = run_all(jobs, tmp_path)
    wrong = [
        (job, code, err)
        for job, (code, _, err) in zip(jobs, results, strict=True)
        if code != 0 or "this is a bug" in err
    ]
    assert wrong == []
    card = Path(out + "1", "README.md").read_text()
    assert "xe9" in card
    for folder, name, keys in (
        ("2", "finetune.yml", ["data_path", "load", "save"]),
        ("11", "resume.yml", ["data_path", "load", "save"]),
        ("12", "resume.yml", ["load", "save"]),
    ):
        settings = yaml.safe_load(Path(out + folder, name).read_text())
        # a list, with which GPT-NeoX ends: it would start from scratch where nothing is there
        assert settings["load"] == [f"fill in: {plain(out + folder)}, which is not UTF-8"]
        number = next(i for i, job in enumerate(jobs) if out + folder in job[2:3])
        err = results[number][2]
        assert f"cannot be written into {name}" in err
        assert all(key in err for key in keys if key != "data_path")


@pytest.mark.slow
def test_relative_to_such_a_folder(sources: dict[str, str], tmp_path: Path) -> None:
    run = os.path.basename(sources["run"])
    results = run_all([["convert", run, "out"], ["batch", run, "out2"]], tmp_path / NAME)
    assert [code for code, _, _ in results] == [0, 0], results
