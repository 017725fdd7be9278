"""OLMo 1: ``OlmoForCausalLM``, Llama with norms that have no weights.

Its norm is GPT-NeoX's ``non_parametric_layernorm`` (megatron/model/norms.py). In transformers, its
epsilon is a constant (models/olmo/modeling_olmo.py, OlmoLayerNorm).
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import About, Refusal, refusals
from neox_bridge.architectures.llama_like import Family, architecture
from neox_bridge.architectures.neox_config import number

_EPSILON = 1e-5


def _refuse(raw: Mapping[str, Any]) -> list[Refusal]:
    limit = raw.get("clip_qkv")
    reason = f"GPT-NeoX does not limit the values of q, k and v, but this model does, to {limit}"
    return refusals([("clip_qkv", limit is not None, reason)])


def _refuse_neox(raw: Mapping[str, Any]) -> list[Refusal]:
    epsilon = number("layernorm_epsilon", raw.get("layernorm_epsilon", _EPSILON), float)
    reason = f"the norms of olmo in transformers always add {_EPSILON}, but these add {epsilon}"
    return refusals([("layernorm_epsilon", epsilon != _EPSILON, reason)], neox_only=True)


ARCHITECTURE = architecture(
    Family(
        "olmo",
        "OlmoForCausalLM",
        About(
            "OLMo 1",
            "fixture, random, GPT-NeoX",
            "the norms have no weights; clip_qkv (OLMo 7B) is refused",
        ),
        norm="non_parametric_layernorm",
        ids=(None, None),
        head_dim=False,
        biases="attention",
        write=lambda config: {"attention_bias": config.attention_bias, "clip_qkv": None},
        refuse=_refuse,
        refuse_neox=_refuse_neox,
    )
)
