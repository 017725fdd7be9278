"""Hugging Face -> GPT-NeoX TP 2 -> three steps of the real one -> Hugging Face: as many rows."""

import json
from pathlib import Path

import pytest
import real_neox
import yaml
from common import convert, hf_tensors, make_hf, plan_of

pytestmark = pytest.mark.neox
TREES = {"today": "gpt-neox", "2024-03": "neox-2024-03"}


@pytest.mark.parametrize(("rows", "padded"), [(384, 384), (300, 300), (301, 512)])
@pytest.mark.parametrize("tree", TREES)
def test_the_rows_come_back(
    tree: str, rows: int, padded: int, neox_python: str, tmp_path: Path
) -> None:
    """GPT-NeoX takes the yml, and copies it into its step: what stands there tells the rows."""
    hf = real_neox.with_tokenizer(make_hf(tmp_path / "hf", vocab_size=rows))
    plan = convert(hf, tmp_path / "run", tp=2, era=real_neox.era(tree))
    assert plan.target["vocab_rows"] == padded
    saved = tmp_path / "saved"
    job = {"yml": str(tmp_path / "run" / "finetune.yml"), "losses": 3, "save": str(saved)}
    assert real_neox.run(neox_python, TREES[tree], 2, [job], tmp_path) == [None]
    (written,) = (saved / (saved / "latest").read_text().strip() / "configs").iterdir()
    settings = yaml.safe_load(written.read_text())
    origin = {"neox_bridge": {"vocab_size": rows}} if padded > rows else None
    assert settings.get("config_files") == origin
    plan = plan_of(saved, tmp_path / "back")
    codes = [finding.code for finding in plan.findings]
    assert ("padding-trained" in codes) == (padded > rows)
    convert(saved, tmp_path / "back")
    assert len(hf_tensors(tmp_path / "back")["embed_out.weight"]) == rows
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == rows
    convert(saved, tmp_path / "all", vocab_rows="all")
    assert len(hf_tensors(tmp_path / "all")["embed_out.weight"]) == padded
