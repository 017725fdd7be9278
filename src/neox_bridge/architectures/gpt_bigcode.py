"""StarCoder and SantaCoder: ``GPTBigCodeForCausalLM``, a GPT-2 with one head of k and v.

Its matrices are those of Linear, which are not transposed. ``c_attn`` has all rows of q, then those
of k and v, as the tensor of GPT-NeoX on its one rank. With ``multi_query: false`` it has the rows
of q, k and v for each head (models/gpt_bigcode/modeling_gpt_bigcode.py), as that of GPT-NeoX.
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
        "multi_query": config.key_value_heads == 1,
        "num_key_value_heads": config.key_value_heads,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "add_cross_attention": False,
    }


_FAMILY = architecture(
    Family(
        name=_NAME,
        hf_class="GPTBigCodeForCausalLM",
        about=About(
            "StarCoder, SantaCoder",
            "random, GPT-NeoX",
            "one tensor-parallel rank only, because it has one head of k and v, except with "
            "multi_query: false",
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
        refuse=gpt2.refuse,
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
    is_other = heads not in (1, raw.get("num_attention_heads"))
    reason = (
        f"{_NAME} in transformers has one head of k and v, or as many as of q, but this model has "
        f"{heads}"
    )
    return reasons + refusals([("num_kv_heads", is_other, reason)], neox_only=True)


ARCHITECTURE = replace(
    _FAMILY,
    read_hf=_read_hf,
    refuse_neox_source=_refuse_neox_source,
    joined_by_heads=True,
)
