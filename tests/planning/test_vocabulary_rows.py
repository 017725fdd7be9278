"""The vocabulary's rows over Hugging Face -> GPT-NeoX -> training -> Hugging Face.

tests/neox/test_vocabulary_neox.py trains in the real GPT-NeoX between the two ways.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_edits import tokenizer
from click.testing import CliRunner
from common import convert, fixture, hf_tensors, make_hf, neox_config, plan_of, step_of
from resharding import reshard

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused, UsageError
from neox_bridge.findings import Finding
from neox_bridge.planning.vocabulary import fit, padded_size
from neox_bridge.verification.verify import verify


def made(tmp_path: Path, rows: int, entries: int | None = None, **how: Any) -> Path:
    """A Hugging Face model, converted to tmp_path / "run"."""
    hf = make_hf(tmp_path / "hf", vocab_size=rows)
    if entries is not None:
        tokenizer(hf / "tokenizer.json", entries)
    convert(hf, tmp_path / "run", **how)
    return tmp_path / "run"


def trained(root: Path, target: Path, change: float = 0.5) -> Path:
    """What GPT-NeoX saves after training: another step, its yml the one that it was started with.

    change: what is added to the last row of the output head.
    """
    shutil.copytree(root, target)
    step = step_of(target)
    (step / "neox_bridge.json").unlink()
    shutil.rmtree(step / "configs")
    (step / "configs").mkdir()
    settings = yaml.safe_load((root / "finetune.yml").read_text())
    (step / "configs" / "finetune.yml").write_text(json.dumps(settings))  # no comments are left
    path = sorted(step.glob("layer_06-model_*.pt"))[-1]  # of the last rank
    tensors = torch.load(path, weights_only=False)
    tensors["final_linear.weight"][-1] += change
    torch.save(tensors, path)
    (target / "finetune.yml").unlink()
    return target


def rows_of(folder: Path) -> int:
    rows = len(hf_tensors(folder)["embed_out.weight"])
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows
    return rows


def coded(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings if finding.code.startswith("padding")}


@pytest.mark.parametrize(
    ("rows", "entries", "tp", "multiple"),
    [
        (50304, 50277, 1, 128),  # Pythia
        (50304, 50277, 2, 64),
        (50304, 50277, 4, 32),
        (50304, 50277, 8, 16),
        (50432, 50277, 2, 128),
        (384, 377, 2, 64),
        (384, 250, 2, 192),  # 64 would make 256 rows of it
        (300, 250, 1, 300),
        (300, 300, 4, 75),
        (32000, 32000, 2, 128),
        (151936, 151646, 2, 75968),
    ],
)
def test_the_multiple_keeps_the_rows(rows: int, entries: int, tp: int, multiple: int) -> None:
    found = fit(rows, entries, tp, None)
    assert (found.rows, found.padded) == (rows, rows)
    assert padded_size(entries, found.multiple, tp) == rows  # as GPT-NeoX computes it at start
    assert found.multiple == multiple


def test_without_a_tokenizer_the_multiple_is_right_for_any() -> None:
    found = fit(384, 384, 2, None, known=False)
    assert (found.padded, found.multiple) == (384, 192)
    assert {padded_size(size, 192, 2) for size in range(1, 385)} == {384}
    assert fit(512, 512, 2, None, known=False).multiple == 128


@pytest.mark.parametrize(
    ("rows", "tp", "padded"), [(301, 2, 512), (50257, 2, 50432), (50257, 1, 50257)]
)
def test_rows_that_no_multiple_keeps_are_padded(rows: int, tp: int, padded: int) -> None:
    assert fit(rows, rows, tp, None).padded == padded


def test_a_round_trip_with_training_keeps_the_rows(tmp_path: Path) -> None:
    """The multiple that keeps them, and so nothing that has to be told."""
    run = made(tmp_path, 384, 377, tp=2)
    assert neox_config(run)["make_vocab_size_divisible_by"] == 64
    assert "config_files" not in (run / "finetune.yml").read_text()
    plan = convert(trained(run, tmp_path / "trained"), tmp_path / "back")
    assert rows_of(tmp_path / "back") == 384
    assert set(coded(plan.findings)) <= {"padding-unknown"}


def test_trained_padding_is_left_out_with_a_warning(tmp_path: Path) -> None:
    run = made(tmp_path, 301, 290, tp=2)
    assert neox_config(run)["config_files"] == {"neox_bridge": {"vocab_size": 301}}
    plan = convert(trained(run, tmp_path / "trained"), tmp_path / "back")
    assert rows_of(tmp_path / "back") == 301
    warning = coded(plan.findings)["padding-trained"]
    assert warning.severity == "warning"
    for words in ("301", "511", "embed_out.weight", "config_files"):
        assert words in warning.message
    assert "embed_in" not in warning.message
    assert torch.equal(
        hf_tensors(tmp_path / "back")["embed_out.weight"],
        hf_tensors(tmp_path / "hf")["embed_out.weight"],
    )
    # what it advises
    args = ["convert", str(tmp_path / "trained"), str(tmp_path / "all"), "--vocab-rows", "all"]
    assert CliRunner().invoke(app, args).exit_code == 0
    assert rows_of(tmp_path / "all") == 512
    assert verify(
        open_checkpoint(str(tmp_path / "trained")), open_checkpoint(str(tmp_path / "all"))
    ).holds


def test_padding_that_was_not_trained_needs_no_warning(tmp_path: Path) -> None:
    run = made(tmp_path, 301, 290, tp=2)
    plan = convert(trained(run, tmp_path / "trained", change=0.0), tmp_path / "back")
    assert coded(plan.findings) == {}
    assert rows_of(tmp_path / "back") == 301
    assert "vocabulary rows 301 to 511" in [dropped.name for dropped in plan.dropped]


def test_padding_that_is_not_told_is_kept_with_a_finding(tmp_path: Path) -> None:
    run = made(tmp_path, 301, 290, tp=2)
    later = trained(run, tmp_path / "trained")
    path = step_of(later) / "configs" / "finetune.yml"
    settings = json.loads(path.read_text())
    del settings["config_files"]
    path.write_text(json.dumps(settings))
    plan = convert(later, tmp_path / "back")
    assert rows_of(tmp_path / "back") == 512
    finding = coded(plan.findings)["padding-unknown"]
    assert "512" in finding.message
    assert "290" in finding.message
    assert "`vocab_rows=N`" in finding.remedy
    # what it advises
    for value, rows in (("301", 301), ("tokenizer", 290)):
        args = ["convert", str(later), str(tmp_path / value), "--vocab-rows", value]
        assert CliRunner().invoke(app, args).exit_code == 0
        assert rows_of(tmp_path / value) == rows


def test_another_layout_keeps_trained_padding_and_what_is_told(tmp_path: Path) -> None:
    """GPT-NeoX's softmax sees the padding, so in GPT-NeoX it stays."""
    later = trained(made(tmp_path, 301, 290, tp=2), tmp_path / "trained")
    convert(later, tmp_path / "one", to="neox", tp=1)
    last = open_checkpoint(str(tmp_path / "one")).tensors["embed_out.weight"]
    assert last.shape[0] == 512
    settings = yaml.safe_load((tmp_path / "one" / "finetune.yml").read_text())
    assert settings["config_files"] == {"neox_bridge": {"vocab_size": 301}}
    assert verify(open_checkpoint(str(later)), open_checkpoint(str(tmp_path / "one"))).holds
    again = trained(tmp_path / "one", tmp_path / "again")
    convert(again, tmp_path / "back")
    assert rows_of(tmp_path / "back") == 301


def test_reshard_hands_it_on(tmp_path: Path) -> None:
    run = made(tmp_path, 301, 290, tp=2, optimizer="fresh")
    reshard(run, tmp_path / "one", tp=1)
    settings = yaml.safe_load((tmp_path / "one" / "resume.yml").read_text())
    assert settings["config_files"] == {"neox_bridge": {"vocab_size": 301}}


@pytest.mark.parametrize(
    ("value", "rows"), [(300, 300), (301, 301), ("all", 512), ("keep", 301), ("tokenizer", 290)]
)
def test_vocab_rows_to_hugging_face(value: Any, rows: int, tmp_path: Path) -> None:
    run = made(tmp_path, 301, 290, tp=2)
    convert(run, tmp_path / "back", vocab_rows=value)
    assert rows_of(tmp_path / "back") == rows


@pytest.mark.parametrize(("value", "padded"), [(260, 260), ("all", 301), (290, 290)])
def test_vocab_rows_to_gpt_neox(value: Any, padded: int, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=301)
    plan = convert(hf, tmp_path / "run", vocab_rows=value)
    assert plan.target["vocab_rows"] == padded
    convert(tmp_path / "run", tmp_path / "back")
    assert torch.equal(
        hf_tensors(tmp_path / "back")["embed_out.weight"],
        hf_tensors(hf)["embed_out.weight"][:padded],
    )


@pytest.mark.parametrize("value", [0, 302, -1])
def test_vocab_rows_that_the_source_has_not(value: int, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=301)
    with pytest.raises(UsageError, match="1 to 301"):
        plan_of(hf, tmp_path / "run", vocab_rows=value)


@pytest.mark.parametrize("value", ["x", "-3", "0", "1.5", ""])
def test_vocab_rows_that_are_no_number(value: str, tmp_path: Path) -> None:
    source = str(fixture("pythia_fp32_pp1_tp2"))
    args = ["convert", source, str(tmp_path / "o"), f"--vocab-rows={value}"]
    assert CliRunner().invoke(app, args).exit_code == 2


def test_batch_takes_it_too(tmp_path: Path) -> None:
    later = trained(made(tmp_path, 301, 290, tp=2), tmp_path / "trained")
    for name, value in (("line", "301"), ("file", "all")):
        args = ["batch", str(later), str(tmp_path / name / "{name}"), "--vocab-rows", value]
        if name == "file":
            described = {"sources": [str(later)], "target": args[2], "vocab_rows": value}
            (tmp_path / "batch.yml").write_text(json.dumps(described))
            args = ["batch", str(tmp_path / "batch.yml")]
        done = CliRunner().invoke(app, args)
        assert done.exit_code == 0, done.output
        (folder,) = [path.parent for path in (tmp_path / name).rglob("config.json")]
        assert rows_of(folder) == (301 if name == "line" else 512)


@pytest.mark.parametrize("rows", [0, 512, 600, None, "many", 1e30, {"a": 1}])
def test_what_is_told_is_not_believed_blindly(rows: object, tmp_path: Path) -> None:
    later = trained(made(tmp_path, 301, 290, tp=2), tmp_path / "trained")
    path = step_of(later) / "configs" / "finetune.yml"
    settings = json.loads(path.read_text())
    settings["config_files"] = {"neox_bridge": {"vocab_size": rows}}
    path.write_text(json.dumps(settings))
    if isinstance(rows, int | None):
        convert(later, tmp_path / "back")
        assert rows_of(tmp_path / "back") == 512
        return
    with pytest.raises(BridgeError, match="config_files"):
        convert(later, tmp_path / "back")


def test_the_yml_says_no_unknown_key(tmp_path: Path) -> None:
    run = made(tmp_path, 301, 290, tp=2)
    assert open_checkpoint(str(run)).unknown_keys == ()


def test_padding_is_said_where_none_can_be_avoided(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=301)
    plan = plan_of(hf, tmp_path / "run", tp=2)
    assert "301" in coded(plan.findings)["padding-rows"].message
    assert coded(plan_of(hf, tmp_path / "run", tp=1).findings) == {}
    with pytest.raises(Refused, match="`vocab_multiple=4`"):
        tokenizer(hf / "tokenizer.json", 200)
        plan_of(hf, tmp_path / "run", vocab_multiple=4)
