"""GPTBigCode, both ways: bits, logits, and what can't be."""

import json
from pathlib import Path
from typing import Any

import pytest
import reference_logits
import torch
from checkpoint_edits import edit_yml
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

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import Refused
from neox_bridge.frameworks.eras import ERAS, LATER_ERAS, era_named
from neox_bridge.verification.logits import compare_logits
from neox_bridge.verification.tokens import read_tokens
from neox_bridge.verification.verify import verify

SIXTEEN = {"n_embd": 64, "n_head": 4}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SIXTEEN, {"num_kv_heads": 1, "bias_gelu_fusion": True, "pos_emb": "learned"}),
    (
        {**SIXTEEN, "activation_function": "gelu", "tie_word_embeddings": False},
        {"bias_gelu_fusion": False, "no_weight_tying": True},
    ),
    ({**SIXTEEN, "multi_query": False}, {"num_kv_heads": None, "pos_emb": "learned"}),
]
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
# config.json of bigcode/starcoder, without its sizes
PUBLISHED = {
    "inference_runner": 0,
    "max_batch_size": None,
    "max_sequence_length": None,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "validate_runner_input": True,
}


def make(folder: Path, **config: Any) -> Path:
    return make_hf(folder, family="gpt_bigcode", **{**SIXTEEN, **config})


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("era", [era.name for era in LATER_ERAS])
@pytest.mark.parametrize("layout", [{"pp": 2}, {"layout": "ranks"}], ids=["layers", "ranks"])
@pytest.mark.parametrize(("config", "meaning"), CASES)
def test_both_ways(
    config: dict[str, Any],
    meaning: dict[str, Any],
    layout: dict[str, Any],
    era: str,
    tmp_path: Path,
) -> None:
    hf = make_hf(tmp_path / "hf", family="gpt_bigcode", **config)
    plan = convert(hf, tmp_path / "neox", era=era_named(era), **layout)
    assert plan.findings == ()
    yml = neox_config(tmp_path / "neox")
    assert {key: yml.get(key) for key in meaning} == meaning
    order = "grouped" if era == "today" else "interleaved"
    ranks = neox_ranks(tmp_path / "neox")
    computed = reference_logits.forward(ranks, yml, TOKENS, gqa_order=order)[..., :300]
    assert float((computed - hf_logits(hf, TOKENS)).abs().max()) <= 1e-5
    pair = open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox"))
    assert verify(*pair).holds
    compared = compare_logits(*pair, read_tokens(None, pair).tokens)
    assert compared.agrees
    assert compared.relative <= 1e-6
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((hf / "config.json").read_text())
    assert {key: written.get(key) for key in original} == original


@pytest.mark.parametrize("multi_query", [True, False])
def test_the_rows_of_c_attn_are_those_of_gpt_neox(multi_query: bool, tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", multi_query=multi_query)
    convert(hf, tmp_path / "neox")
    (rank,) = neox_ranks(tmp_path / "neox")
    for leaf in ("weight", "bias"):
        stored = hf_tensors(hf)[f"transformer.h.1.attn.c_attn.{leaf}"]
        assert torch.equal(rank[f"3.attention.query_key_value.{leaf}"], stored)


def test_with_as_many_heads_it_is_split_over_ranks(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", multi_query=False)
    convert(hf, tmp_path / "neox", tp=2)
    ranks = neox_ranks(tmp_path / "neox")
    computed = reference_logits.forward(ranks, neox_config(tmp_path / "neox"), TOKENS)
    assert float((computed[..., :300] - hf_logits(hf, TOKENS)).abs().max()) <= 1e-5
    (step_of(tmp_path / "neox") / "neox_bridge.json").unlink()
    convert(tmp_path / "neox", tmp_path / "back", vocab_rows=300)  # a GPT-2, which has these too
    assert open_checkpoint(str(tmp_path / "back")).architecture.name == "gpt2"
    apart = hf_logits(tmp_path / "back", TOKENS) - hf_logits(hf, TOKENS)
    assert float(apart.abs().max()) <= 1e-5


def test_without_a_record_the_yml_tells(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", activation_function="relu")
    convert(hf, tmp_path / "neox")
    (step_of(tmp_path / "neox") / "neox_bridge.json").unlink()
    assert open_checkpoint(str(tmp_path / "neox")).architecture.name == "gpt_bigcode"
    convert(tmp_path / "neox", tmp_path / "back", vocab_rows=300)
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    assert float((hf_logits(tmp_path / "back", TOKENS) - hf_logits(hf, TOKENS)).abs().max()) == 0


@pytest.mark.parametrize(
    ("config", "options", "key"),
    [
        ({"scale_attn_weights": False}, {}, "scale_attn_weights"),
        ({"activation_function": "gelu_10"}, {}, "activation_function"),
        ({}, {"tp": 2}, "1 key-value heads"),
        ({"n_embd": 48, "n_head": 12}, {"gqa_order": "interleaved"}, "4 rows"),
        ({}, {"era": ERAS[0]}, "num_kv_heads"),
    ],
)
def test_refused(config: dict[str, Any], options: dict[str, Any], key: str, tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", **config)
    with pytest.raises(Refused, match=key):
        plan_of(hf, tmp_path / "neox", **options)


def test_attention_to_an_encoder_is_refused(tmp_path: Path) -> None:
    hf = edited(make(tmp_path / "hf"), add_cross_attention=True)
    with pytest.raises(Refused, match="add_cross_attention"):
        plan_of(hf, tmp_path / "neox")


def test_keys_of_the_published_models_do_not_matter(tmp_path: Path) -> None:
    hf = edited(make(tmp_path / "hf"), **PUBLISHED)
    assert {key.effect for key in open_checkpoint(str(hf)).unknown_keys} <= {"none", "off"}
    plan_of(hf, tmp_path / "neox")


@pytest.mark.parametrize(
    "changes",
    [
        {"gpt_j_residual": True},
        {"opt_pos_emb_offset": 2},
        {"activation": "softsign", "bias_gelu_fusion": False},
        {"use_mup": True},
    ],
)
def test_what_transformers_does_not_have(changes: dict[str, Any], tmp_path: Path) -> None:
    """Without a class for them, such models move between layouts of GPT-NeoX."""
    convert(make(tmp_path / "hf"), tmp_path / "neox")
    step = step_of(tmp_path / "neox")
    (step / "neox_bridge.json").unlink()
    edit_yml(**changes)(step)
    with pytest.raises(Refused, match=next(iter(changes))):
        plan_of(tmp_path / "neox", tmp_path / "out", to="hf")
    convert(tmp_path / "neox", tmp_path / "one", to="neox", layout="ranks")
