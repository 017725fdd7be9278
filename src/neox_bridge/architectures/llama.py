"""Llama 1, 2 and 3, CodeLlama and others: ``LlamaForCausalLM`` on Hugging Face's side."""

from neox_bridge.architectures.base import About
from neox_bridge.architectures.llama_like import Family, architecture

ARCHITECTURE = architecture(
    Family(
        "llama",
        "LlamaForCausalLM",
        About(
            "Llama 1, 2, 3; CodeLlama; Llemma",
            "fixture, random, GPT-NeoX",
            "consolidated.*.pth are read too; GPT-NeoX has no rope_scaling, so Llama 3.1 and newer "
            "are refused; biases of the MLP for GPT-NeoX `today` only, with geglu for `2024-10` "
            "too",
        ),
        biases="optional",
        write=lambda config: {
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
        },
    )
)
