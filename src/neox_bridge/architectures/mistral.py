"""Mistral 7B and others: ``MistralForCausalLM``, Llama without biases and with a sliding window."""

from neox_bridge.architectures.base import About
from neox_bridge.architectures.llama_like import Family, architecture

ARCHITECTURE = architecture(
    Family(
        "mistral",
        "MistralForCausalLM",
        About(
            "Mistral 7B",
            "random, GPT-NeoX",
            "sliding_window: N is sliding_window_width: N-1; heads of another size are refused",
        ),
        window=True,
        max_positions=131072,
        write=lambda config: {"sliding_window": config.window},
    )
)
