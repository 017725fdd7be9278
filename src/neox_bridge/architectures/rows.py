"""The table of weights of one model: a row for each weight of each block."""

from dataclasses import dataclass
from functools import lru_cache

from neox_bridge.architectures.base import Architecture, ModelConfig, Weight


@dataclass(frozen=True, slots=True)
class Row:
    """One weight of one model.

    Attributes:
        weight: Its line in the table of the family.
        block: The number of its block; 0 outside the blocks.
        layer: The number of its layer in GPT-NeoX (megatron/model/gpt2_model.py).
        hf: Its name in Hugging Face files.
    """

    weight: Weight
    block: int
    layer: int
    hf: str


@lru_cache(16)  # every stage, and in a batch every step, needs the rows of the same model
def table_rows(architecture: Architecture, layers: int) -> tuple[Row, ...]:
    """All rows of a model, in the order of GPT-NeoX's layers.

    They include derived buffers and weights that only GPT-NeoX has.
    """
    first_layers = {"embed": 0, "block": 2, "norm": layers + 3, "head": layers + 4}
    return tuple(
        Row(weight, block, first_layer + block, weight.hf.format(i=block))
        for place, first_layer in first_layers.items()
        for block in range(layers if place == "block" else 1)
        for weight in architecture.weights
        if weight.place == place and (weight.blocks is None or block in weight.blocks)
    )


def model_rows(architecture: Architecture, config: ModelConfig) -> tuple[Row, ...]:
    """The rows of the weights that a model with this config has on both sides."""
    return tuple(
        row
        for row in table_rows(architecture, config.layers)
        if not row.weight.neox_only and row.weight.is_in(config)
    )


@lru_cache(16)
def rows_by_name(architecture: Architecture, layers: int) -> dict[str, Row]:
    """All rows of a model by Hugging Face name."""
    return {row.hf: row for row in table_rows(architecture, layers)}
