"""What a version of transformers cannot hold of a model."""

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.errors import Refused
from neox_bridge.frameworks.changes import since
from neox_bridge.frameworks.facts import TransformersFacts
from neox_bridge.frameworks.targets import knows


def llama_ignores(family: str, config: ModelConfig, facts: TransformersFacts) -> list[str]:
    """What old versions of transformers leave out of a Llama without a word, and since when not."""
    if family != "llama":
        return []
    ignored = {
        "hf-llama-rope-theta": config.rotary_base != 10000
        and f"rope_theta {config.rotary_base:g}: it computes with 10000",
        "hf-llama-attention-bias": config.attention_bias
        and "attention_bias: the biases of the attention",
    }
    return [
        f"{what} (obeyed since {since(change_id)})"
        for change_id, what in ignored.items()
        if what and not knows(facts, change_id)
    ]


def refuse_version(family: str, config: ModelConfig, facts: TransformersFacts) -> None:
    """Raise Refused for what this version of transformers can't hold of a model."""
    if ignored := llama_ignores(family, config, facts):
        raise Refused(
            f"transformers {facts.version} would silently ignore {'; '.join(ignored)}. Name a "
            "newer version with `era=`."
        )
    plain = not config.attention_bias and config.norm_bias  # gpt_neox; relatives of Llama have none
    if plain and not knows(facts, "hf-attention-bias"):
        raise Refused(
            "attention_bias: the attention of the model has no biases, but transformers "
            f"{facts.version} would create random ones ({since('hf-attention-bias')} added "
            "attention_bias). Name that version or a newer one with `era=`."
        )
