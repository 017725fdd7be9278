"""Genuine GPT-NeoX checkpoints, converted, compute in transformers what GPT-NeoX computed."""

import json
from pathlib import Path

import pytest
import torch
from common import (
    GPT_NEOX,
    assert_same,
    convert,
    fixture,
    hf_logits,
    hf_tensors,
    neox_files,
    neox_ranks,
    recorded,
    same_bits,
)

from neox_bridge.api import open_checkpoint


def source_dtype(name: str) -> torch.dtype:
    return next(iter(neox_ranks(fixture(name))[0].values())).dtype


@pytest.mark.parametrize("name", GPT_NEOX)
def test_logits_agree_with_gpt_neox(name: str, tmp_path: Path) -> None:
    convert(fixture(name), tmp_path / "hf")
    tokens, logits = recorded(name)
    computed = hf_logits(tmp_path / "hf", tokens)[..., : logits.shape[-1]]
    difference = float((computed - logits).abs().max())
    fp32 = source_dtype(name) == torch.float32
    assert difference <= (1e-5 if fp32 else 0.01 * float(logits.abs().max()))


@pytest.mark.parametrize("name", GPT_NEOX)
def test_dtype_is_the_sources(name: str, tmp_path: Path) -> None:
    convert(fixture(name), tmp_path / "hf")
    dtypes = {tensor.dtype for tensor in hf_tensors(tmp_path / "hf").values()}
    assert dtypes == {source_dtype(name)}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(source_dtype(name)).split(".")[1]


@pytest.mark.parametrize("name", GPT_NEOX)
def test_same_layout_is_the_same_bits(name: str, tmp_path: Path) -> None:
    """GPT-NeoX to GPT-NeoX in the same layout: every tensor of every rank stays."""
    convert(fixture(name), tmp_path / "neox", to="neox")
    before, after = neox_ranks(fixture(name)), neox_ranks(tmp_path / "neox")
    for a, b in zip(before, after, strict=True):
        assert_same(a, b)
    names = set(neox_files(tmp_path / "neox"))
    assert names == {p.name for p in fixture(name).glob("*/*model_states.pt")}


def exact_way_back(name: str) -> bool:
    """Hugging Face can't hold split biases, norms that differ, an unused norm."""
    return len(neox_ranks(fixture(name))) == 1 or "sequential" in name


@pytest.mark.parametrize("name", [n for n in GPT_NEOX if exact_way_back(n)])
def test_to_hf_and_back_is_the_same_bits(name: str, tmp_path: Path) -> None:
    state = open_checkpoint(str(fixture(name))).neox
    assert state is not None
    convert(fixture(name), tmp_path / "hf")
    convert(
        tmp_path / "hf",
        tmp_path / "neox",
        tp=state.tp,
        layout=state.layout,
        pp=state.pp,
        inv_freq=state.inv_freq,
        mlp_names=state.mlp_names,
    )
    for a, b in zip(neox_ranks(fixture(name)), neox_ranks(tmp_path / "neox"), strict=True):
        for key in a:
            # rows of padding may be more: the tokenizer isn't known
            assert same_bits(a[key], b[key][: len(a[key])]), key


def test_row_biases_are_summed_or_kept(tmp_path: Path) -> None:
    """With gpt_j_residual the ranks' biases add up; without it each holds the whole one."""
    for name, sums in (("pythia_fp32_pp1_tp2", True), ("sequential_residual_fp32_tp2", False)):
        plan = convert(fixture(name), tmp_path / name)
        ranks = neox_ranks(fixture(name))
        parts = [rank["2.attention.dense.bias"] for rank in ranks]
        want = parts[0] + parts[1] if sums else parts[0]
        got = hf_tensors(tmp_path / name)["gpt_neox.layers.0.attention.dense.bias"]
        assert torch.equal(got, want)
        told = [drop.name for drop in plan.dropped if "spread" in drop.name]
        assert len(told) == (2 if sums else 0)


def test_tied_norms_are_written_twice(tmp_path: Path) -> None:
    plan = convert(fixture("tied_norms_fp32_pp0_tp2"), tmp_path / "hf")
    tensors = hf_tensors(tmp_path / "hf")
    prefix = "gpt_neox.layers.0."
    for part in ("weight", "bias"):
        first = tensors[f"{prefix}input_layernorm.{part}"]
        assert torch.equal(first, tensors[f"{prefix}post_attention_layernorm.{part}"])
    assert any("gpt_j_tied" in drop.reason for drop in plan.dropped)


def test_fused_gelu_is_the_tanh_form(tmp_path: Path) -> None:
    convert(fixture("pythia_fp32_fused_gelu_tp1"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["hidden_act"] == "gelu_fast"


def test_both_spellings_of_rope(tmp_path: Path) -> None:
    convert(fixture("pythia_fp32_pp1_tp2"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.25, 10000)
    rope = config["rope_parameters"]
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (0.25, 10000)
