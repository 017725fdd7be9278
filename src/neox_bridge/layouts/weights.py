"""Which weights a model of this config has, by name and block."""

from collections.abc import Callable, Container, Iterator

from neox_bridge.architectures.base import Architecture, ModelConfig, Weight

_FLAGS: dict[str, Callable[[ModelConfig], bool]] = {
    "": lambda _: True,
    "attention_bias": lambda c: c.attention_bias,
    "mlp_bias": lambda c: c.mlp_bias,
    "norm_bias": lambda c: c.norm_bias,
    "conv_bias": lambda c: c.conv_bias,
    "untied": lambda c: not c.tied_embeddings and not c.reward,
    "reward": lambda c: c.reward,
}


# between an optimizer's state and the tensor that it is of, where both make one name
STATE_OF = ": "

INV_FREQ = "attention.rotary_emb.inv_freq"  # GPT-NeoX's name of the rotary buffer in a block

# what GPT-NeoX's files hold and Hugging Face's don't
NEOX_ONLY = ("derived", "zero")


def exists(weight: Weight, config: ModelConfig) -> bool:
    """Whether a model of this config has the weight."""
    return _FLAGS[weight.flag](config)


def layer_of(weight: Weight, block: int, layers: int) -> int:
    """GPT-NeoX's number of the layer that holds a weight (megatron/model/gpt2_model.py)."""
    fixed = {"embed": 0, "norm": layers + 3, "head": layers + 4}
    return fixed.get(weight.place, block + 2)


def expand(architecture: Architecture, layers: int) -> Iterator[tuple[Weight, int]]:
    """Every weight with its block (0 outside the blocks), in the order of GPT-NeoX's layers."""
    for place in ("embed", "block", "norm", "head"):
        weights = [weight for weight in architecture.weights if weight.place == place]
        for block in range(layers if place == "block" else 1):
            for weight in weights:
                yield weight, block


def model_weights(architecture: Architecture, config: ModelConfig) -> Iterator[tuple[Weight, int]]:
    """The weights, none of the derived values, that a model of this config has.

    Those that Hugging Face hasn't (the split "zero") aren't among them.
    """
    for weight, block in expand(architecture, config.layers):
        if weight.split not in NEOX_ONLY and exists(weight, config):
            yield weight, block


def by_name(architecture: Architecture, layers: int) -> dict[str, Weight]:
    """The table's rows by their Hugging Face names."""
    return {weight.hf.format(i=block): weight for weight, block in expand(architecture, layers)}


def lacking(
    architecture: Architecture, layers: int, names: Container[str]
) -> Iterator[tuple[Weight, int, str]]:
    """Weights that every model has and these Hugging Face names haven't, with block and name."""
    for weight, block in expand(architecture, layers):
        name = weight.hf.format(i=block)
        if not weight.flag and weight.split not in NEOX_ONLY and name not in names:
            yield weight, block, name


def tensor_of(name: str) -> str:
    """The tensor that an optimizer's state is of; any other name is its own."""
    return name.rpartition(STATE_OF)[2]
