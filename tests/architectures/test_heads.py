"""Reward models: GPT-NeoX's train_impl: rm and transformers' …ForSequenceClassification."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_logits
import torch
import yaml
from common import (
    assert_same,
    convert,
    hf_tensors,
    neox_config,
    neox_files,
    neox_ranks,
    plan_of,
    step_of,
)
from scorers import make_scorer, scores

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import Refused
from neox_bridge.frameworks.eras import era_named
from neox_bridge.verification.verify import verify

GENUINE = Path(__file__).parents[1] / "data" / "reward"  # written and scored by the real GPT-NeoX
NAMES = sorted(path.name for path in GENUINE.iterdir())
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {}),
    ("llama", {"num_key_value_heads": 2}),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("olmo", {"num_key_value_heads": 2}),
    ("gpt2", {}),
    ("opt", {}),
    ("gpt_bigcode", {"n_embd": 64, "n_head": 4}),
    ("stablelm", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    ("phi3", {"num_key_value_heads": 2, "eos_token_id": 2}),
    ("starcoder2", {"num_key_value_heads": 2}),
    ("glm", {"num_key_value_heads": 2, "eos_token_id": 2, "head_dim": 16}),
]
IDS = [family for family, _ in CASES]
TOKENS = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_gpt_neox_scores_are_transformers_scores(name: str, tmp_path: Path) -> None:
    plan = convert(GENUINE / name / "checkpoints", tmp_path / "hf")
    known = {"gqa-order-unknown", "tokenizer-missing"}
    assert {f.code for f in plan.findings} - known == {"pad-token-unknown"}
    with np.load(GENUINE / name / "logits.npz") as file:
        tokens, rewards = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
    # with two ranks each had all of the reward, and the recorder put them side by side
    rewards = rewards[..., :1]
    # a score at a token 0 is padding's only where pad_token_id says so, and here none does
    computed = scores(tmp_path / "hf", tokens)
    assert float((computed - rewards).abs().max()) <= 1e-5
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card


@pytest.mark.parametrize("name", NAMES)
def test_genuine_ones_come_back_as_the_same_bits(name: str, tmp_path: Path) -> None:
    source = GENUINE / name / "checkpoints"
    state = open_checkpoint(str(source)).neox
    assert state is not None
    convert(source, tmp_path / "hf")
    # every rank had made the same biases
    again: dict[str, Any] = {"tp": state.tp, "layout": state.layout, "row_bias": "split"}
    again["vocab_multiple"] = neox_config(source)["make_vocab_size_divisible_by"]
    convert(tmp_path / "hf", tmp_path / "neox", **again)
    for a, b in zip(neox_ranks(source), neox_ranks(tmp_path / "neox"), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("family", "config"), CASES, ids=IDS)
def test_both_ways(family: str, config: dict[str, Any], tp: int, tmp_path: Path) -> None:
    hf = make_scorer(tmp_path / "hf", family, **config)
    if tp > 1 and family == "gpt_bigcode":  # it has one head of k and v
        with pytest.raises(Refused, match="1 key-value heads"):
            plan_of(hf, tmp_path / "neox", tp=tp)
        return
    plan = convert(hf, tmp_path / "neox", tp=tp)
    # OPT has a dropout of 0.1, and none of the embeddings
    codes = ["embedding-dropout"] if family == "opt" else []
    assert [finding.code for finding in plan.findings] == codes
    yml = neox_config(tmp_path / "neox")
    assert yml["train_impl"] == "rm"
    assert yml["no_weight_tying"] is True
    assert yml["pipe_parallel_size"] == 0  # GPT-NeoX trains reward models without stages only
    ranks = neox_ranks(tmp_path / "neox")
    assert [rank["6.rm_linear.weight"].shape[0] for rank in ranks] == [1] * tp
    assert not [key for key in ranks[0] if "final_linear" in key]
    computed = reference_logits.forward(ranks, yml, TOKENS)
    assert float((computed - scores(hf, TOKENS)).abs().max()) <= 1e-5
    assert verify(open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox"))).holds
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((hf / "config.json").read_text())
    assert {k: written.get(k) for k in original} == original


@pytest.mark.parametrize(("family", "config"), CASES, ids=IDS)
def test_without_a_record_the_class_is_that_of_scores(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    convert(make_scorer(tmp_path / "hf", family, **config), tmp_path / "neox")
    (step_of(tmp_path / "neox") / "neox_bridge.json").unlink()
    convert(tmp_path / "neox", tmp_path / "back")
    (name,) = json.loads((tmp_path / "back" / "config.json").read_text())["architectures"]
    assert name.endswith("ForSequenceClassification")


def test_layers_and_transformer_engine(tmp_path: Path) -> None:
    hf = make_scorer(tmp_path / "hf", "llama", rms_norm_eps=1e-8)
    convert(hf, tmp_path / "neox", layout="layers", te=True)
    files = neox_files(tmp_path / "neox")
    assert list(files["layer_06-model_00-model_states.pt"]) == ["rm_linear.weight"]
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))


@pytest.mark.parametrize("labels", [2, 3])
def test_more_labels_are_refused_by_name(labels: int, tmp_path: Path) -> None:
    hf = make_scorer(tmp_path / "hf", labels=labels)
    assert open_checkpoint(str(hf)).config.dims["labels"] == labels
    with pytest.raises(Refused, match=f"num_labels: .* this model has {labels}"):
        plan_of(hf, tmp_path / "neox")


def test_trees_without_reward_models_are_refused(tmp_path: Path) -> None:
    hf = make_scorer(tmp_path / "hf")
    with pytest.raises(Refused, match="train_impl"):
        plan_of(hf, tmp_path / "neox", era=era_named("2024-09"))
    plan_of(hf, tmp_path / "neox", era=era_named("2024-10"))


def test_a_tied_one_has_no_head(tmp_path: Path) -> None:
    """With tied embeddings the real GPT-NeoX computes the vocabulary's logits instead."""
    name = "tied_embeddings_fp32_tp2"
    source = Path(__file__).parents[1] / "data" / "fixtures" / name / "checkpoints"
    rm = tmp_path / "rm.yml"
    rm.write_text(yaml.safe_dump({**neox_config(source), "train_impl": "rm"}))
    opened = open_checkpoint(str(source), configs=[str(rm)])
    assert [r.key for r in opened.refusals] == ["train_impl"]


def test_a_language_model_trained_on_to_score(tmp_path: Path) -> None:
    """The record's config.json is the language model's; the class that is written is not."""
    hf = make_scorer(tmp_path / "hf")
    raw = json.loads((hf / "config.json").read_text())
    convert(hf, tmp_path / "neox")
    record = step_of(tmp_path / "neox") / "neox_bridge.json"
    told = json.loads(record.read_text())
    told["config"] |= {"architectures": ["GPTNeoXForCausalLM"]}
    del told["config"]["id2label"], told["config"]["label2id"]
    record.write_text(json.dumps(told))
    convert(tmp_path / "neox", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == raw["architectures"] == ["GPTNeoXForSequenceClassification"]
    assert scores(tmp_path / "back", TOKENS).shape == (2, 24, 1)
