"""What a version of transformers cannot hold of a model."""

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.errors import Refused
from neox_bridge.frameworks.facts import TransformersFacts
from neox_bridge.frameworks.targets import knows_attention_bias, version_number


def llama_ignores(family: str, config: ModelConfig, facts: TransformersFacts) -> list[str]:
    """What old versions of transformers leave out of a Llama without a word, and since when not.

    rope_theta: huggingface/transformers #25740; attention_bias: configuration_llama.py of 4.34.
    """
    ignored, version = [], version_number(facts.version)
    if family == "llama" and config.rotary_base != 10000 and version < (4, 33):
        ignored.append(
            f"rope_theta {config.rotary_base:g}: it computes with 10000 (obeyed since 4.33)"
        )
    if family == "llama" and config.attention_bias and version < (4, 34):
        ignored.append("the biases of the attention (attention_bias is known since 4.34)")
    return ignored


def refuse_version(family: str, config: ModelConfig, facts: TransformersFacts) -> None:
    """Raise Refused for what this version of transformers can't hold of a model."""
    if ignored := llama_ignores(family, config, facts):
        raise Refused(
            f"transformers {facts.version} would leave out, without a word: {'; '.join(ignored)}. "
            "Name a newer one with --for."
        )
    plain = not config.attention_bias and config.norm_bias  # gpt_neox; relatives of Llama have none
    if plain and not knows_attention_bias(facts):
        raise Refused(
            f"attention_bias: the model has no biases in its attention, and transformers "
            f"{facts.version} would make some up (it learned attention_bias in 4.37). Name 4.37 or "
            "newer with --for."
        )
