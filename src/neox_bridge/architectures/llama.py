"""Llama 1, 2 and 3, CodeLlama and others: ``LlamaForCausalLM`` on Hugging Face's side."""

from typing import Any

from neox_bridge.architectures.base import About, ModelConfig
from neox_bridge.architectures.llama_like import Family, architecture


def _write(config: ModelConfig) -> dict[str, Any]:
    """Biases are a choice in LlamaConfig."""
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


ARCHITECTURE = architecture(
    Family(
        "llama",
        "LlamaForCausalLM",
        About(
            "Llama 1, 2, 3; CodeLlama; Llemma",
            "fixture, random, GPT-NeoX",
            "consolidated.*.pth are read too; GPT-NeoX has no rope_scaling, so Llama 3.1 and newer "
            "are refused; biases of the MLP with `--for today` only, or for geglu `neox@2024-10`",
        ),
        biases="optional",
        write=_write,
    )
)
