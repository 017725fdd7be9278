"""StarCoder and SantaCoder: ``GPTBigCodeForCausalLM``, a GPT-2 with one head of k and v.

Its matrices are those of Linear, which are not transposed. ``c_attn`` has all rows of q, then those
of k and v, as the tensor of GPT-NeoX on its one rank.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.architectures import gpt2
from neox_bridge.architectures.base import About, ModelConfig, Presence, Refusal, refusals
from neox_bridge.architectures.learned_positions import Family, architecture

_NAME, _ACTIVATION = "gpt_bigcode", "gelu_pytorch_tanh"


def _heads(raw: Mapping[str, Any]) -> tuple[int, int]:
    heads = int(raw.get("n_head") or 12)
    return heads, heads if raw.get("multi_query") is False else 1


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **gpt2.write(config),
        "multi_query": True,
        "num_key_value_heads": 1,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "add_cross_attention": False,
    }


def _refuse(raw: Mapping[str, Any]) -> list[Refusal]:
    checks = (
        (
            "multi_query",
            raw.get("multi_query") is False,
            f"{_NAME} is converted with one head of k and v only, but this model has as many as "
            "of q",
        ),
    )
    return gpt2.refuse(raw) + refusals(checks)


_FAMILY = architecture(
    Family(
        name=_NAME,
        hf_class="GPTBigCodeForCausalLM",
        about=About(
            "StarCoder, SantaCoder",
            "random, GPT-NeoX",
            "one tensor-parallel rank only, because it has one head of k and v; multi_query: "
            "false is refused",
        ),
        prefix="transformer.",
        weights=tuple(replace(row, transposed=False) for row in gpt2.ARCHITECTURE.weights),
        keys=gpt2.KEYS,
        hf_keys=gpt2.HF_KEYS,
        ids=(50256, 50256),
        activation=_ACTIVATION,
        dropped={**gpt2.ARCHITECTURE.dropped, "transformer.bias": "not learned: the causal mask"},
        joined=gpt2.ARCHITECTURE.joined,
        hf_heads=_heads,
        write=_write,
        refuse=_refuse,
        find=gpt2.find,
    )
)


def _read_hf(raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence) -> ModelConfig:
    heads, kv_heads = _heads(raw)
    config = _FAMILY.read_hf(raw, dims, presence)
    return replace(config, kv_heads=None if heads == kv_heads else kv_heads)


def _refuse_neox_source(raw: Mapping[str, Any]) -> list[Refusal]:
    reasons = [r for r in _FAMILY.refuse_neox_source(raw) if r.key != "num_kv_heads"]
    heads = raw.get("num_kv_heads") or raw.get("num_attention_heads")
    reason = f"{_NAME} in transformers has one head of k and v, but this model has {heads}"
    return reasons + refusals([("num_kv_heads", heads != 1, reason)], neox_only=True)


ARCHITECTURE = replace(_FAMILY, read_hf=_read_hf, refuse_neox_source=_refuse_neox_source)
