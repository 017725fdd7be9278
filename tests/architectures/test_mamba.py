"""Mamba, both ways: a genuine checkpoint's logits, bits, and what can't be."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from common import (
    assert_same,
    convert,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_ranks,
    plan_of,
    step_of,
)
from mamba_checkpoints import CASES, GENUINE, edit
from safetensors.torch import save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.frameworks.eras import era_named
from neox_bridge.verification.verify import verify


def test_logits_agree_with_gpt_neox(tmp_path: Path) -> None:
    plan = convert(GENUINE, tmp_path / "hf")
    assert [finding.code for finding in plan.findings] == ["tokenizer-missing"]
    with np.load(GENUINE.parent / "logits.npz") as file:
        tokens, logits = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
    assert float((hf_logits(tmp_path / "hf", tokens) - logits).abs().max()) <= 1e-5
    assert verify(open_checkpoint(str(GENUINE)), open_checkpoint(str(tmp_path / "hf"))).holds


@pytest.mark.parametrize("to", ["neox", "hf"])
def test_back_in_gpt_neox_it_is_the_same_bits(to: Any, tmp_path: Path) -> None:
    convert(GENUINE, tmp_path / "between", to=to)
    convert(tmp_path / "between", tmp_path / "neox", to="neox", vocab_multiple=1)
    for a, b in zip(neox_ranks(GENUINE), neox_ranks(tmp_path / "neox"), strict=True):
        assert_same(a, b)
    was, now = neox_config(GENUINE), neox_config(tmp_path / "neox")
    for told in (was, now):  # yaml reads 1e-05 as text
        told["rms_norm_epsilon"] = float(told["rms_norm_epsilon"])
    # but for settings that mean nothing to a Mamba
    model = "hidden_size num_layers num_attention_heads norm pos_emb rms_norm_epsilon".split()
    model += ["attention_config", "no_weight_tying", "max_position_embeddings"]
    assert {key: now[key] for key in model} == {key: was[key] for key in model}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [{"layout": "ranks"}, {"pp": 2}], ids=["ranks", "layers"])
@pytest.mark.parametrize("config", CASES, ids=["", "untied", "wide"])
def test_both_ways(
    config: dict[str, Any], layout: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", dtype, family="mamba", **config)
    plan = convert(hf, tmp_path / "neox", **layout)
    half = ["residual-dtype"] if dtype == torch.bfloat16 else []
    assert [f.code for f in plan.findings] == half
    assert list(plan_of(hf, tmp_path / "fp32", dtype="float32").findings) == []
    assert verify(open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox"))).holds
    width = 3 * 48 if config.get("expand") == 3 else None  # GPT-NeoX's own is twice the hidden size
    assert neox_config(tmp_path / "neox").get("intermediate_size") == width
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((hf / "config.json").read_text())
    assert {key: written.get(key) for key in original} == original
    # without the record it is found to be the same Mamba, but for the residuals' dtype
    (step_of(tmp_path / "neox") / "neox_bridge.json").unlink()
    convert(tmp_path / "neox", tmp_path / "again")
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    assert told["residual_in_fp32"] is False
    edit(tmp_path / "again" / "config.json", residual_in_fp32=True)
    tokens = torch.arange(20)[None]
    again = hf_logits(tmp_path / "again", tokens)[..., :300]
    assert torch.equal(again, hf_logits(hf, tokens))


def test_the_names_of_mamba_ssm_and_the_default_tie(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba")
    want = hf_tensors(hf)
    edit(hf / "config.json", tie_word_embeddings=None)
    own = {k.replace("embeddings", "embedding"): v for k, v in want.items()}
    own["lm_head.weight"] = own["backbone.embedding.weight"].clone()
    save_file(own, hf / "model.safetensors")
    plan = convert(hf, tmp_path / "neox")
    assert [d.name for d in plan.dropped] == ["lm_head.weight"]
    assert neox_config(tmp_path / "neox")["no_weight_tying"] is False
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(want, hf_tensors(tmp_path / "back"))


def as_mamba_ssm(hf: Path, **changes: Any) -> Path:
    """The folder as mamba_ssm saves it: its names, pytorch_model.bin, a config of its own."""
    own = {k.replace("embeddings", "embedding"): v for k, v in hf_tensors(hf).items()}
    own["lm_head.weight"] = own["backbone.embedding.weight"]
    torch.save(own, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    told = {"d_model": 40, "n_layer": 2, "vocab_size": 299, "ssm_cfg": {}, "rms_norm": True}
    told |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 4}
    (hf / "config.json").write_text(json.dumps({**told, **changes}))
    return hf


def test_mamba_ssm_is_read(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba")
    want = hf_tensors(hf)
    plan = convert(as_mamba_ssm(hf), tmp_path / "neox")
    assert (list(plan.findings), [d.name for d in plan.dropped]) == ([], ["lm_head.weight"])
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(want, hf_tensors(tmp_path / "back"))
    tokens = torch.arange(20)[None]
    again = make_hf(tmp_path / "again", family="mamba")
    assert torch.equal(hf_logits(tmp_path / "back", tokens), hf_logits(again, tokens))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "mamba2"),
        ({"attn_layer_idx": [1]}, "mamba with attention"),
        ({"rms_norm": False}, "rms_norm"),
    ],
)
def test_what_mamba_ssm_has_besides(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    hf = as_mamba_ssm(make_hf(tmp_path / "hf", family="mamba"), **changes)
    with pytest.raises(Refused, match=what):
        plan_of(hf, tmp_path / "neox")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"state_size": 8}, "state_size"),
        ({"conv_kernel": 3}, "conv_kernel"),
        ({"time_step_rank": 5}, "time_step_rank"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_what_gpt_neox_has_fixed(config: dict[str, Any], key: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba", **config)
    with pytest.raises(Refused, match=key):
        plan_of(hf, tmp_path / "neox")


def test_a_size_that_the_tensors_deny(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba")
    edit(hf / "config.json", state_size=8)
    with pytest.raises(BridgeError, match=r"state_size: 8, but the tensors say 16"):
        open_checkpoint(str(hf))


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [("in_proj", (158, 40), 160), ("x_proj", (34, 80), 35), ("conv1d", (80, 2, 4), 1)],
)
def test_a_matrix_that_the_others_deny(
    name: str, shape: tuple[int, ...], size: int, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba")
    tensors = hf_tensors(hf)
    for key in tensors:
        if key.endswith(f"mixer.{name}.weight"):
            tensors[key] = torch.zeros(shape)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    message = rf"{hf}: mixer\.{name}\.weight: a size of {size} follows from the other tensors"
    with pytest.raises(BridgeError, match=message):
        open_checkpoint(str(hf))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tp": 2}, "x_proj"),
        ({"era": era_named("2024-10")}, "`era=today`"),
        ({"mlp_names": "dense"}, "`era=today`"),
        ({"te": True}, "`te=True`"),
    ],
)
def test_what_no_target_can_be(options: dict[str, Any], what: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba")
    with pytest.raises(Refused, match=what):
        plan_of(hf, tmp_path / "neox", **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_emb": "learned"},
        {"norm": "layernorm"},
        {"mamba_use_bias_in_linears": True},
        {"intermediate_size": 72},
        {"train_impl": "rm"},
        {"attention_config": [[["mamba", "global"], 1]]},
    ],
)
def test_what_transformers_has_not(changes: dict[str, Any], tmp_path: Path) -> None:
    convert(GENUINE, tmp_path / "neox", to="neox")
    edit(tmp_path / "neox", **changes)
    with pytest.raises(Refused, match=next(iter(changes))):
        plan_of(tmp_path / "neox", tmp_path / "out")


def test_two_ranks_are_another_model(tmp_path: Path) -> None:
    convert(GENUINE, tmp_path / "neox", to="neox")
    for path in step_of(tmp_path / "neox").glob("layer_*-model_00-*"):
        path.with_name(path.name.replace("model_00", "model_01")).write_bytes(path.read_bytes())
    for path in step_of(tmp_path / "neox").glob("mp_rank_00_*"):
        told = torch.load(path, weights_only=False)
        told["args"]["model_parallel_size"] = 2
        torch.save(told, path)
    with pytest.raises(Refused, match="does not sum x_proj"):
        plan_of(tmp_path / "neox", tmp_path / "hf", to="hf")
    with pytest.raises(Refused, match="does not sum x_proj"):
        plan_of(tmp_path / "neox", tmp_path / "one", to="neox", tp=1)
    assert (
        plan_of(tmp_path / "neox", tmp_path / "two", to="neox", pp=0).target["tensor_parallel"] == 2
    )


def test_the_logits_are_not_computed_here(tmp_path: Path) -> None:
    convert(GENUINE, tmp_path / "hf")
    words = ["verify", str(GENUINE), str(tmp_path / "hf"), "--logits"]
    command = [sys.executable, "-m", "neox_bridge", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert "attention_config: [[['mamba'], 2]] is not supported" in line


def test_inspect_and_doctor_know_it(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["inspect", str(GENUINE)]).output
    assert re.search(r"^rotary +none$", said, re.MULTILINE)
    convert(GENUINE, tmp_path / "hf")
    for version, loads in (("4.38", False), ("4.39", True)):
        words = ["doctor", str(tmp_path / "hf"), "--for", f"transformers@{version}"]
        assert ("needs transformers 4.39" in CliRunner().invoke(app, words).output) != loads
