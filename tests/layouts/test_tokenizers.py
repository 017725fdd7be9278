"""Tokenizers come along where there is one, decide the vocabulary, and are never needed."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_edits import tokenizer
from common import convert, fixture, hf_tensors, make_hf, neox_config, plan_of, step_of


def test_there_and_back(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    tokenizer(hf / "tokenizer.json")
    (hf / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    plan = convert(hf, tmp_path / "neox", tp=2)
    assert plan.blanks == (("finetune.yml", "data_path"),)
    told = yaml.safe_load((tmp_path / "neox/finetune.yml").read_text())["vocab_file"]
    assert Path(told).read_bytes() == (hf / "tokenizer.json").read_bytes()
    convert(tmp_path / "neox", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_from_a_runs_vocab_file(tmp_path: Path) -> None:
    """A GPT-NeoX run names one file; what Hugging Face needs beside it is made."""
    import shutil

    from transformers import AutoTokenizer

    root = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp32_pp1_tp2"), root)
    tokenizer(root / "20B_tokenizer.json")
    convert(root, tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("t5 t7").input_ids == [5, 7]
    assert loaded.eos_token == "<|endoftext|>"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)


def test_without_one_a_note_says_so(tmp_path: Path) -> None:
    plan = convert(fixture("pythia_fp32_pp1_tp2"), tmp_path / "hf")
    assert "`tokenizer=PATH`" in plan.notes[0]
    named = tokenizer(tmp_path / "mine.json")
    convert(fixture("pythia_fp32_pp1_tp2"), tmp_path / "other", tokenizer=str(named))
    assert (tmp_path / "other/tokenizer.json").read_bytes() == named.read_bytes()


def test_its_size_decides_the_padding(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=300)
    tokenizer(hf / "tokenizer.json", 250)
    plan = convert(hf, tmp_path / "neox")
    assert plan.target["vocab_rows"] == 300  # 128 and 256 would leave rows out, 512 add some
    assert plan.target["vocab_multiple"] == 300
    convert(tmp_path / "neox", tmp_path / "back")
    assert len(hf_tensors(tmp_path / "back")["embed_out.weight"]) == 300


def test_rows_are_cut_only_when_asked(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=300)
    tokenizer(hf / "tokenizer.json", 250)
    convert(hf, tmp_path / "neox", vocab_rows="tokenizer")
    assert neox_config(tmp_path / "neox")["make_vocab_size_divisible_by"] == 250
    convert(tmp_path / "neox", tmp_path / "back")
    back, source = hf_tensors(tmp_path / "back"), hf_tensors(hf)
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        assert torch.equal(back[name], source[name][:250])


def test_a_larger_one_is_reported(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=300)
    tokenizer(hf / "tokenizer.json", 700)
    plan = plan_of(hf, tmp_path / "neox")
    assert [finding.code for finding in plan.findings] == ["tokenizer-larger"]
    assert plan.target["vocab_rows"] == 768


def test_the_size_is_remembered_without_the_files(tmp_path: Path) -> None:
    import shutil

    hf = make_hf(tmp_path / "hf", vocab_size=300)
    tokenizer(hf / "tokenizer.json", 250)
    convert(hf, tmp_path / "neox")
    shutil.rmtree(tmp_path / "neox/tokenizer")
    record = json.loads((step_of(tmp_path / "neox") / "neox_bridge.json").read_text())
    assert record["tokenizer_size"] == 250
    plan = plan_of(tmp_path / "neox", tmp_path / "tp4", to="neox", tp=4)
    assert (plan.target["vocab_rows"], plan.target["vocab_multiple"]) == (300, 75)


@pytest.mark.parametrize("content", ["{}", '{"model": {}}', "no json", '{"model": {"vocab": 5}}'])
def test_what_is_no_tokenizer_is_an_error(content: str, tmp_path: Path) -> None:
    from neox_bridge.errors import BridgeError

    (tmp_path / "t.json").write_text(content)
    with pytest.raises(BridgeError, match=r"t\.json"):
        plan_of(fixture("pythia_fp32_pp1_tp2"), tmp_path / "o", tokenizer=str(tmp_path / "t.json"))
