"""What a version of transformers does not support of a model."""

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.errors import Refused
from neox_bridge.frameworks.changes import since
from neox_bridge.frameworks.facts import TransformersFacts
from neox_bridge.frameworks.targets import knows


def llama_ignores(family: str, config: ModelConfig, facts: TransformersFacts) -> list[str]:
    """What a version of transformers ignores of a Llama or a Phi-3, and which one does not."""
    ignored: dict[str, str | bool] = {}
    if family == "phi3":
        ignored = {
            "hf-phi3-partial-rotary": config.rotary_pct != 1
            and f"partial_rotary_factor {config.rotary_pct:g}: it rotates whole heads",
        }
    if family == "llama":
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
    """Raise Refused if a version of transformers does not support a model."""
    if ignored := llama_ignores(family, config, facts):
        raise Refused(
            f"transformers {facts.version} would silently ignore {'; '.join(ignored)}. Name a "
            "newer version with `era=`."
        )
    plain = not config.attention_bias and config.norm_bias  # gpt_neox; others have none
    if plain and not knows(facts, "hf-attention-bias"):
        raise Refused(
            "attention_bias: the attention of the model has no biases, but transformers "
            f"{facts.version} would create random ones ({since('hf-attention-bias')} added "
            "attention_bias). Name that version or a newer one with `era=`."
        )
