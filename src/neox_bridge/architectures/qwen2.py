"""Qwen 1.5, 2 and 2.5: ``Qwen2ForCausalLM``, Llama with biases of q, k and v only.

GPT-NeoX's use_bias_in_attn_linear gives attention.dense a bias as well
(megatron/model/transformer.py, ParallelSelfAttention). It is written as -0.0, which adds nothing.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import About, Refusal
from neox_bridge.architectures.llama_like import Family, architecture


def _refuse(raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse a window in some of the layers (Qwen2Config, layer_types)."""
    if not raw.get("use_sliding_window"):
        return []
    return [
        Refusal(
            "use_sliding_window",
            "GPT-NeoX uses one attention window for all layers, but this model has a window in "
            "only some of them",
            "if the model is used only within its window, set it to false",
        )
    ]


ARCHITECTURE = architecture(
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        About(
            "Qwen 1.5, 2, 2.5",
            "random, GPT-NeoX",
            "attention.dense gets a bias of zeros; trained further it becomes a Llama with biases",
        ),
        biases="qkv",
        max_positions=32768,
        write=lambda _config: {"use_sliding_window": False},
        refuse=_refuse,
    )
)
