"""Phi-3 and GLM: joined tensors, and rows of q and k in another order."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference_logits
import torch
from checkpoint_edits import edit_yml
from click.testing import CliRunner
from common import (
    assert_same,
    convert,
    fixture,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_ranks,
    plan_of,
    recorded,
    step_of,
)
from resharding import logical
from safetensors.torch import load_file, save_file

from neox_bridge.api import diff, open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.verification.logits import compare_logits
from neox_bridge.verification.tokens import read_tokens
from neox_bridge.verification.verify import verify

QKV = "model.layers.1.self_attn.qkv_proj.weight"
GATE_UP = "model.layers.1.mlp.gate_up_proj.weight"


def edited(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def stored(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """The folder with other tensors in its file, and without those that are None."""
    path = folder / "model.safetensors"
    merged = {**load_file(path), **tensors}
    save_file({name: value for name, value in merged.items() if value is not None}, path)
    return folder


def as_llama(phi3: Path, folder: Path) -> Path:
    """The same model as a Llama, cut by hand. It has 4 heads of 16 rows, and 2 of k and v."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in hf_tensors(phi3).items():
        if name.endswith("qkv_proj.weight"):
            parts, rows, module = ("q_proj", "k_proj", "v_proj"), (64, 32, 32), "qkv_proj"
        elif name.endswith("gate_up_proj.weight"):
            parts, rows, module = ("gate_proj", "up_proj"), (88, 88), "gate_up_proj"
        else:
            tensors[name] = value
            continue
        for part, cut in zip(parts, value.split(rows), strict=True):
            tensors[name.replace(module, part)] = cut.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((phi3 / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    del config["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def command(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output


@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "phi3", family="phi3", num_key_value_heads=2)


def test_it_is_a_llama_in_gpt_neox(phi3: Path, tmp_path: Path) -> None:
    llama = as_llama(phi3, tmp_path / "llama")
    tokens = torch.arange(20)[None]
    assert float((hf_logits(phi3, tokens) - hf_logits(llama, tokens)).abs().max()) <= 1e-6
    convert(phi3, tmp_path / "first", tp=2)
    convert(llama, tmp_path / "second", tp=2)
    ranks = zip(neox_ranks(tmp_path / "first"), neox_ranks(tmp_path / "second"), strict=True)
    for a, b in ranks:
        assert_same(a, b)
    assert diff(open_checkpoint(str(phi3)), open_checkpoint(str(llama))).equal


@pytest.mark.parametrize("family", ["phi3", "glm"])
def test_logits_are_verified(family: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family=family)
    convert(hf, tmp_path / "neox", tp=2)
    pair = open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox"))
    assert verify(*pair).holds
    compared = compare_logits(*pair, read_tokens(None, pair).tokens)
    assert compared.agrees
    assert compared.relative <= 1e-6


def test_without_a_record_a_llama_stays_a_llama(phi3: Path, tmp_path: Path) -> None:
    convert(phi3, tmp_path / "neox")
    assert open_checkpoint(str(tmp_path / "neox")).architecture.name == "phi3"
    (step_of(tmp_path / "neox") / "neox_bridge.json").unlink()
    assert open_checkpoint(str(tmp_path / "neox")).architecture.name == "llama"


def test_only_phi3_rotates_a_part_of_each_head(tmp_path: Path) -> None:
    """The reference forward pass of GPT-NeoX computes the logits of what is written."""
    shutil.copytree(fixture("llama_gqa_fp32_tp2"), tmp_path / "neox")
    edit_yml(rotary_pct=0.5, sliding_window_width=7, hidden_dropout=0.1)(step_of(tmp_path / "neox"))
    convert(tmp_path / "neox", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["sliding_window"]) == (["Phi3ForCausalLM"], 8)
    assert (config["partial_rotary_factor"], config["resid_pdrop"]) == (0.5, 0.1)
    tokens, logits = recorded("llama_gqa_fp32_tp2")
    computed = reference_logits.forward(
        neox_ranks(tmp_path / "neox"), neox_config(tmp_path / "neox"), tokens
    )[..., : logits.shape[-1]]
    assert float((computed - logits).abs().max()) > 1e-2  # the settings make another model
    written = hf_logits(tmp_path / "hf", tokens)[..., : logits.shape[-1]]
    assert float((computed - written).abs().max()) <= 1e-5
    convert(tmp_path / "hf", tmp_path / "back", tp=2)
    yml = neox_config(tmp_path / "back")
    assert (yml["rotary_pct"], yml["sliding_window_width"], yml["hidden_dropout"]) == (0.5, 7, 0.1)


@pytest.mark.parametrize("family", ["phi3", "glm"])
def test_defaults_are_those_of_the_class(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    default = AutoConfig.for_model(family)
    kept = {"num_attention_heads", "num_hidden_layers", "architectures", "model_type"}
    folder = make_hf(
        tmp_path / "hf",
        family=family,
        hidden_size=512,
        num_key_value_heads=2 if family == "glm" else 4,
        head_dim=128,
        attention_bias=True,
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k in kept}))
    checkpoint = open_checkpoint(str(folder))
    read = checkpoint.config
    assert read.norm_eps == default.rms_norm_eps
    assert read.max_positions == default.max_position_embeddings
    assert read.rotary_pct == default.rope_parameters["partial_rotary_factor"]
    assert read.key_value_heads == (2 if family == "glm" else 4)
    assert checkpoint.raw.get("head_dim") == getattr(default, "head_dim", None)
    assert [f for f in checkpoint.findings if f.code == "biases-denied"] == []


def test_rows_of_glm_are_reordered(tmp_path: Path) -> None:
    """Heads of 16 rows, of which 8 are rotated: even rows before odd ones in GPT-NeoX."""
    hf = make_hf(tmp_path / "hf", family="glm", num_key_value_heads=2)
    convert(hf, tmp_path / "neox")
    (rank,) = neox_ranks(tmp_path / "neox")
    tensors = hf_tensors(hf)
    head = [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    rows = [16 * number + row for number in range(6) for row in head] + list(range(96, 128))
    for leaf in ("weight", "bias"):
        names = [f"model.layers.1.self_attn.{part}_proj.{leaf}" for part in "qkv"]
        whole = torch.cat([tensors[name] for name in names])
        assert torch.equal(rank[f"3.attention.query_key_value.{leaf}"], whole[rows])


def test_matrices_without_rows_are_read(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="glm")
    parts = {f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qkv"}
    empty = {f"{part}.weight": torch.zeros(0, 64) for part in parts}
    empty |= {f"{part}.bias": torch.zeros(0) for part in parts}
    outputs = {f"model.layers.{n}.self_attn.o_proj.weight": torch.zeros(64, 0) for n in (0, 1)}
    stored(hf, **empty, **outputs)
    assert open_checkpoint(str(hf)).config.dims["q"] == 0


def test_biases_of_glm_without_a_record(tmp_path: Path) -> None:
    """Only GLM has biases of q, k and v, RMSNorm, and partly rotated heads."""
    hf = make_hf(tmp_path / "hf", family="glm")
    convert(hf, tmp_path / "neox", tp=2)
    (step_of(tmp_path / "neox") / "neox_bridge.json").unlink()
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    for path in step_of(tmp_path / "neox").glob("layer_02-*"):
        tensors = torch.load(path, weights_only=False)
        tensors["attention.dense.bias"] += 0.5
        torch.save(tensors, path)
    with pytest.raises(Refused, match="rotary_pct"):
        plan_of(tmp_path / "neox", tmp_path / "out", to="hf")
    convert(tmp_path / "neox", tmp_path / "one", to="neox", tp=1)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({QKV: torch.zeros(127, 64)}, {}, rf"{QKV} has the shape \[127, 64\]"),
        ({QKV: torch.zeros(())}, {}, rf"{QKV} has the shape \[\]"),
        ({GATE_UP: torch.zeros(3, 64)}, {}, rf"{GATE_UP} has the shape \[3, 64\]"),
        ({}, {"num_key_value_heads": 4}, "of 4 heads and 4 key-value heads"),
        ({QKV: None}, {}, rf"tensors are missing: {QKV}\. "),
        ({"model.layers.1.self_attn.q_proj.weight": torch.zeros(64, 64)}, {}, "no phi3 model has"),
    ],
)
def test_other_tensors_are_errors(
    tensors: dict[str, Any], config: dict[str, Any], message: str, phi3: Path
) -> None:
    with pytest.raises(BridgeError, match=message):
        open_checkpoint(str(edited(stored(phi3, **tensors), **config)))


@pytest.mark.parametrize("family", ["phi3", "glm"])
def test_optimizer_states_are_those_of_the_files(family: str, tmp_path: Path) -> None:
    """The fresh master weights are the weights, by their names and in their order."""
    hf = make_hf(tmp_path / "hf", torch.bfloat16, family=family, num_key_value_heads=2)
    run, states = tmp_path / "run", tmp_path / "states"
    convert(hf, run, tp=2, optimizer="fresh", dp=1)
    command("export-optimizer", run, states)
    weights = {name: value.float() for name, value in hf_tensors(hf).items()}
    assert_same(load_file(states / "master.safetensors"), weights)
    groups = json.loads((states / "optimizer.json").read_text())["groups"]
    assert sorted(name for group in groups for name in group["tensors"]) == sorted(weights)
    command("reshard", run, tmp_path / "back", "--states", states, "--tp", "1")
    before, after = logical(run), logical(tmp_path / "back")
    for state in before:
        assert_same(before[state], after[state])


def test_a_partly_rotated_model_with_biases_is_refused(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", attention_bias=True)
    convert(hf, tmp_path / "neox")
    edit_yml(rotary_pct=0.5)(step_of(tmp_path / "neox"))
    with pytest.raises(Refused, match="rotary_pct: llama rotates whole heads"):
        plan_of(tmp_path / "neox", tmp_path / "out", to="hf")
