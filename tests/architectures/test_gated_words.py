"""Gated MLPs of models that only GPT-NeoX has, in the words of trees of another time."""

from typing import Any

import pytest

from neox_bridge.architectures.base import Presence
from neox_bridge.architectures.neox_only import neox_only
from neox_bridge.errors import Refused

NEW = ("linear1", "linear2")
BLOCK = {"attention.query_key_value.weight": 2, "attention.dense.weight": 2}
BLOCK |= {"input_layernorm.weight": 1, "post_attention_layernorm.weight": 1}


def written(names: tuple[str, ...], old: bool, bias: bool = False, **settings: Any) -> Any:
    """The settings of a model of one block, as a tree of a time has them."""
    mlp = {f"mlp.{name}.weight": 2 for name in names}
    biases = {f"mlp.{name}.bias": 1 for name in names} if bias else {}
    tensors = {
        0: {"word_embeddings.weight": 2},
        2: {**BLOCK, **mlp, **biases},
        4: {"norm.weight": 1},
        5: {"final_linear.weight": 2},
    }
    raw = {"num_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8, **settings}
    architecture = neox_only(raw, tensors, 1, 1)
    assert architecture is not None
    dims = {"hidden": 8, "ffn": 12, "vocab": 16}
    config = architecture.read_neox(raw, dims, Presence(frozenset(), "float32", 1))
    return architecture.write_neox(config, old)


def test_a_gated_mlp_that_only_old_trees_have() -> None:
    names, llama = ("w1", "w2", "w3"), {"mlp_type": "llama"}
    assert written(names, old=False, activation="silu", **llama)["activation"] == "swiglu"
    with pytest.raises(Refused, match=r"MLP with tanh exists only .* Use `era=neox@2024-03`"):
        written(names, old=False, activation="tanh", **llama)


def test_a_gated_mlp_that_only_new_trees_have() -> None:
    assert written(NEW, old=True, activation="swiglu")["mlp_type"] == "llama"
    with pytest.raises(Refused, match=r"no gated MLP with glu\. Use `era=today`"):
        written(NEW, old=True, activation="glu")
    with pytest.raises(Refused, match=r"no gated MLP with geglu and biases\. Use `era=today`"):
        written(NEW, old=True, bias=True, activation="geglu")
