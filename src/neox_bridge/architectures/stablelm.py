"""StableLM 3B and 1.6B: ``StableLmForCausalLM``, Llama with LayerNorm and partial rotation.

Its attention biases are those of q, k and v, as in ``qwen2``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import About, ModelConfig, Refusal, refusals
from neox_bridge.architectures.llama_like import Family, architecture
from neox_bridge.architectures.neox_config import number
from neox_bridge.findings import Finding


def _refuse(raw: Mapping[str, Any]) -> list[Refusal]:
    checks = (
        (
            "use_parallel_residual",
            bool(raw.get("use_parallel_residual")),
            "GPT-NeoX leaves the attention out of parallel blocks whose MLP has no biases "
            "(megatron/model/transformer.py, ParallelTransformerLayer.forward)",
        ),
        (
            "qk_layernorm",
            bool(raw.get("qk_layernorm")),
            "GPT-NeoX has one norm for q and k, but this model has one for each head",
        ),
    )
    return refusals(checks)


def _find(raw: Mapping[str, Any], _config: ModelConfig) -> list[Finding]:
    """Its dropout is only that of the MLP (models/stablelm/modeling_stablelm.py)."""
    value = number("hidden_dropout", raw.get("hidden_dropout") or 0.0, float)
    if not value:
        return []
    return [
        Finding(
            "mlp-dropout",
            "warning",
            f"config.json sets hidden_dropout: {value:g}. stablelm in transformers applies it "
            "after the MLP only, but GPT-NeoX would apply it to the embeddings and after the "
            "attention too. The yml does not take it over",
            "if you train the model further with dropout, change hidden_dropout",
        )
    ]


_FAMILY = architecture(
    Family(
        "stablelm",
        "StableLmForCausalLM",
        About(
            "StableLM 3B, StableLM 2 1.6B",
            "random, GPT-NeoX",
            "attention.dense gets a bias of zeros where q, k and v have biases; parallel blocks "
            "and qk_layernorm (StableLM 2 12B) are refused",
        ),
        norm="layernorm",
        ids=(0, 0),
        head_dim=False,
        rotary_pct=0.25,
        biases="optional qkv",
        bias_key=("use_qkv_bias", False),
        max_positions=4096,
        write=lambda config: {
            "use_qkv_bias": config.attention_bias,
            "use_parallel_residual": False,
            "qk_layernorm": False,
            "hidden_dropout": config.hidden_dropout,
        },
        refuse=_refuse,
    )
)
ARCHITECTURE = replace(_FAMILY, findings_to_neox=_find)
