"""Models that load as GPTNeoXForCausalLM: their own settings, at a small size, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
from common import assert_same, convert, hf_tensors, make_hf, neox_config

from neox_bridge.api import open_checkpoint
from neox_bridge.verification.logits import compare_logits
from neox_bridge.verification.tokens import read_tokens
from neox_bridge.verification.verify import verify

# what their config.json say that a Pythia's doesn't; the yml's meaning of it
RELATIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # the fused gelu; both norms; rows for TP 2
    "gpt-neox-20b": (
        {"hidden_act": "gelu_fast", "rotary_pct": 0.5, "vocab_size": 384},
        {"bias_gelu_fusion": True, "gpt_j_residual": True},
    ),
    "stablelm-base-alpha": (
        {"max_position_embeddings": 64, "rotary_pct": 0.5},
        {"max_position_embeddings": 64, "gpt_j_residual": True},
    ),
    # one branch after the other, and the whole head rotated
    "redpajama-incite": (
        {"use_parallel_residual": False, "rotary_pct": 1.0},
        {"gpt_j_residual": False, "rotary_pct": 1.0},
    ),
    # rows cut to the tokenizer: no multiple of anything
    "dolly-v2": ({"vocab_size": 281, "rotary_pct": 0.5}, {"gpt_j_residual": True}),
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", RELATIVES)
def test_both_ways(name: str, tp: int, tmp_path: Path) -> None:
    config, meaning = RELATIVES[name]
    hf = make_hf(tmp_path / "hf", **config)
    convert(hf, tmp_path / "neox", tp=tp)
    yml = neox_config(tmp_path / "neox")
    assert {key: yml.get(key) for key in meaning} == meaning
    first, second = open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox"))
    assert verify(first, second).holds
    found = compare_logits(first, second, read_tokens(None, (first, second)).tokens)
    assert found.agrees
    assert found.relative <= 1e-6
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in config} == config
