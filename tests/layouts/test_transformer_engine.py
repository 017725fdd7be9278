"""Transformer Engine's names, both ways: state dicts that follow its source, bits and logits."""

import io
from pathlib import Path
from typing import Any

import pytest
import te_forward
import torch
import yaml
from common import (
    assert_same,
    convert,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_files,
    neox_ranks,
    plan_of,
    step_of,
)

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.frameworks.eras import era_named
from neox_bridge.layouts.transformer_engine import KEYS
from neox_bridge.verification.verify import verify

NEOX = {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-5}
SEQUENTIAL = {**NEOX, "use_parallel_residual": False}
LLAMA = {"rms_norm_eps": 1e-8}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
# family, settings of its config, ranks
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("gpt_neox", NEOX, 1),
    ("gpt_neox", SEQUENTIAL, 2),
    ("gpt_neox", {**SEQUENTIAL, "hidden_act": "relu", "tie_word_embeddings": True}, 3),
    ("llama", LLAMA, 2),
    ("llama", GROUPED, 1),
    ("llama", GROUPED, 2),
    ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}, 2),
    ("mistral", {**GROUPED, "sliding_window": None}, 2),
    ("qwen2", GROUPED, 2),
    ("phi3", {**GROUPED, "partial_rotary_factor": 0.5}, 2),
    ("starcoder2", {"num_key_value_heads": 2}, 2),
    ("glm", GROUPED, 2),
]
IDS = [f"{family}{number}" for number, (family, *_) in enumerate(CASES)]
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def tensors_of(root: Path) -> list[dict[str, torch.Tensor]]:
    return [{k: t for k, t in rank.items() if t is not None} for rank in neox_ranks(root)]


def logits_of(root: Path) -> torch.Tensor:
    return te_forward.forward(tensors_of(root), neox_config(root), TOKENS)[..., :300]


@pytest.mark.parametrize("layout", ["layers", "ranks"])
@pytest.mark.parametrize(("family", "config", "tp"), CASES, ids=IDS)
def test_both_ways(
    family: str, config: dict[str, Any], tp: int, layout: str, tmp_path: Path
) -> None:
    """Its modules would compute the model's logits, and the model comes back, bit by bit."""
    hf = make_hf(tmp_path / "hf", family=family, **config)
    plan = convert(hf, tmp_path / "te", te=True, tp=tp, layout=layout)
    assert [f.code for f in plan.findings] == []
    assert float((logits_of(tmp_path / "te") - hf_logits(hf, TOKENS)).abs().max()) <= 1e-5
    opened = open_checkpoint(str(tmp_path / "te"))
    assert verify(open_checkpoint(str(hf)), opened).holds
    assert opened.architecture.name == family
    assert opened.neox is not None
    assert opened.neox.te == {"attention", "mlp"}
    convert(tmp_path / "te", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "plain")  # the record's yml doesn't bring its keys back
    assert not [key for key in neox_config(tmp_path / "plain") if key in KEYS]


@pytest.mark.parametrize(("family", "config", "tp"), CASES, ids=IDS)
def test_to_its_names_and_back_within_gpt_neox(
    family: str, config: dict[str, Any], tp: int, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    convert(hf, tmp_path / "plain", tp=tp)
    convert(tmp_path / "plain", tmp_path / "te", to="neox", te=True)
    convert(tmp_path / "te", tmp_path / "same", to="neox")
    convert(tmp_path / "te", tmp_path / "again", to="neox", te=False)
    for a, b in zip(tensors_of(tmp_path / "te"), tensors_of(tmp_path / "same"), strict=True):
        assert_same(a, b)
    for a, b in zip(tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "again"), strict=True):
        assert_same(a, b)
    for told in ("plain", "again"):
        assert not [key for key in neox_config(tmp_path / told) if key.startswith("te_")]


def test_names_shapes_and_states(tmp_path: Path) -> None:
    """As module/layernorm_mlp.py and attention.py register them, for two ranks of a Llama."""
    hf = make_hf(tmp_path / "hf", torch.bfloat16, family="llama", **GROUPED)
    convert(hf, tmp_path / "te", te=True, tp=2)
    block = neox_files(tmp_path / "te")["layer_02-model_01-model_states.pt"]
    shapes = {key: None if t is None else (tuple(t.shape), t.dtype) for key, t in block.items()}
    half = torch.bfloat16
    assert shapes == {
        "input_layernorm.scale": ((64,), half),
        "attention.qkv.weight": ((64, 64), half),
        "attention.qkv.bias": ((64,), half),
        "attention.qkv._extra_state": None,
        "attention.core_attention._extra_state": None,
        "attention.proj.weight": ((64, 32), half),
        "attention.proj.bias": ((64,), half),
        "attention.proj._extra_state": None,
        "mlp.layer_norm_weight": ((64,), half),
        "mlp.fc1_weight": ((88, 64), half),
        "mlp.fc1_bias": ((88,), half),
        "mlp.fc2_weight": ((64, 44), half),
        "mlp.fc2_bias": ((64,), half),
        "mlp._extra_state": None,
    }
    yml = neox_config(tmp_path / "te")
    assert yml["te_mha"]
    assert yml["te_layernorm_mlp"]
    assert yml["intermediate_size"] == 88  # TELayerNormMLP takes it as it is
    assert yml["activation"] == "swiglu"


def edit(root: Path, change: Any, **settings: Any) -> None:
    """Change every block's tensors in place, and the yml."""
    for path in step_of(root).glob("layer_*"):
        value = torch.load(path, weights_only=False)
        if "attention.qkv.weight" in value:
            change(value)
            torch.save(value, path)
    yml = step_of(root) / "configs" / "neox_bridge.yml"
    yml.write_text(yaml.safe_dump({**yaml.safe_load(yml.read_text()), **settings}))
    (step_of(root) / "neox_bridge.json").unlink()


def test_a_genuine_run(tmp_path: Path) -> None:
    """States as io.BytesIO, wrapped norms, unused norms of trees before #1355, its other keys."""
    hf = make_hf(tmp_path / "hf", **NEOX)
    convert(hf, tmp_path / "te", te=True)

    def change(block: dict[str, Any]) -> None:
        state = io.BytesIO()
        torch.save({"scale_fwd": torch.ones(3)}, state)
        for key in [key for key in block if key.endswith("_extra_state")]:
            block[key] = state
        for kind in ("weight", "bias"):
            block[f"input_layernorm.norm.{kind}"] = block.pop(f"input_layernorm.{kind}")
            block[f"post_attention_layernorm.norm.{kind}"] = torch.ones(48)
            block[f"post_attention_layernorm.{kind}"] = torch.ones(48)

    edit(
        tmp_path / "te",
        change,
        norm="te_layernorm",
        te_columnparallel=True,
        gpt_j_tied=True,
        bias_gelu_fusion=False,
    )
    plan = convert(tmp_path / "te", tmp_path / "back", vocab_rows="keep")
    back, want = hf_tensors(tmp_path / "back"), hf_tensors(hf)
    for name in [name for name in want if "embed" in name]:
        back[name] = back[name][:300]
    assert_same({k: back[k].contiguous() for k in back}, want)
    dropped = {entry.name for entry in plan.dropped}
    assert {
        "layer 2: mlp._extra_state",
        "layer 3: attention.core_attention._extra_state",
        "layer 2: post_attention_layernorm.norm.weight",
    } <= dropped
    computed = hf_logits(tmp_path / "back", TOKENS)[..., :300]
    assert float((computed - hf_logits(hf, TOKENS)).abs().max()) <= 1e-6


def test_biases_that_were_trained_stay(tmp_path: Path) -> None:
    """The yml denies them, and Transformer Engine has them all the same."""
    hf = make_hf(tmp_path / "hf", family="mistral", **GROUPED, sliding_window=None)
    convert(hf, tmp_path / "te", te=True)
    edit(tmp_path / "te", lambda block: block["mlp.fc1_bias"].add_(0.5))
    opened = open_checkpoint(str(tmp_path / "te"))
    assert opened.config.mlp_bias
    assert not opened.config.attention_bias
    dropped = {entry.name for entry in opened.dropped}
    assert "layer 2: attention.qkv.bias" in dropped
    assert "layer 2: mlp.fc1_bias" not in dropped
    convert(tmp_path / "te", tmp_path / "back")
    computed = hf_logits(tmp_path / "back", TOKENS)[..., :300]
    assert float((computed - logits_of(tmp_path / "te")).abs().max()) <= 1e-5


@pytest.mark.parametrize("module", ["attention", "mlp"])
def test_one_module_alone(module: str, tmp_path: Path) -> None:
    """te_mha or te_layernorm_mlp without the other: the tensors' names tell."""
    hf = make_hf(tmp_path / "hf", family="llama", **GROUPED)
    convert(hf, tmp_path / "te", te=True)
    convert(hf, tmp_path / "plain")
    plain = {int(k.split(".")[0]): {} for k in neox_ranks(tmp_path / "plain")[0]}
    for key, tensor in neox_ranks(tmp_path / "plain")[0].items():
        layer, name = key.split(".", 1)
        plain[int(layer)][name] = tensor
    other = ("post_attention", "mlp.") if module == "attention" else ("attention.",)
    for layer in (2, 3):
        path = step_of(tmp_path / "te") / f"layer_{layer:02d}-model_00-model_states.pt"
        block = torch.load(path, weights_only=False)
        kept = {k: t for k, t in block.items() if not k.startswith(other)}
        torch.save(kept | {k: t for k, t in plain[layer].items() if k.startswith(other)}, path)
    state = open_checkpoint(str(tmp_path / "te")).neox
    assert state is not None
    assert state.te == {module}
    convert(tmp_path / "te", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    convert(tmp_path / "te", tmp_path / "own", to="neox")
    assert_same(neox_ranks(tmp_path / "plain")[0], neox_ranks(tmp_path / "own")[0])


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("gpt_neox", {**NEOX, "hidden_act": "gelu"}, {}, "gelu_fast"),
    ("gpt_neox", {**NEOX, "hidden_act": "silu"}, {}, "does not support silu"),
    ("gpt_neox", NEOX, {"tp": 2}, "gpt_j_residual"),
    ("llama", {"hidden_act": "gelu"}, {}, "activation"),
    ("llama", {}, {"era": era_named("2024-10")}, "`era=today`"),
    ("mistral", {"sliding_window": 5}, {}, "sliding_window_width"),
    ("gpt2", {}, {}, "fails with learned positions"),
]


@pytest.mark.parametrize(("family", "config", "options", "word"), REFUSED)
def test_what_it_cannot_be(
    family: str, config: dict[str, Any], options: dict[str, Any], word: str, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    with pytest.raises(Refused, match=word):
        plan_of(hf, tmp_path / "te", te=True, **options)


def test_options_that_do_not_go_with_it(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", **GROUPED)
    with pytest.raises(BridgeError, match="gqa_order"):
        plan_of(hf, tmp_path / "te", te=True, gqa_order="grouped")
    convert(hf, tmp_path / "te", te=True)
    with pytest.raises(BridgeError, match="gqa_order"):
        plan_of(tmp_path / "te", tmp_path / "back", gqa_order="grouped")
    with pytest.raises(BridgeError, match="te:"):
        plan_of(tmp_path / "te", tmp_path / "back", te=True)


def test_another_epsilon_is_said(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", rms_norm_eps=1e-5)
    plan = convert(hf, tmp_path / "te", te=True)
    assert [f.code for f in plan.findings] == ["te-epsilon"]
    assert "1e-08" in plan.findings[0].message
    assert [f.code for f in open_checkpoint(str(tmp_path / "te")).findings] == ["te-epsilon"]


def test_a_geglu_that_nothing_else_computes_is_refused(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf", family="llama"), tmp_path / "te", te=True)
    edit(tmp_path / "te", lambda _: None, activation="geglu")
    with pytest.raises(Refused, match="activation: Transformer Engine computes geglu with tanh"):
        open_checkpoint(str(tmp_path / "te"))


def test_sums_that_nothing_else_computes_are_refused(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", **SEQUENTIAL)
    convert(hf, tmp_path / "te", te=True, tp=2)
    edit(tmp_path / "te", lambda _: None, gpt_j_residual=True)
    with pytest.raises(Refused, match="then sums the result again"):
        open_checkpoint(str(tmp_path / "te"))
