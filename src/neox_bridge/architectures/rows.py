"""A family's table of weights, written out for one model: a row for each weight of each block."""

from dataclasses import dataclass
from functools import lru_cache

from neox_bridge.architectures.base import Architecture, ModelConfig, Weight


@dataclass(frozen=True, slots=True)
class Row:
    """One weight of one model.

    weight: its line in the family's table. block: the number of its block; 0 outside the blocks.
    layer: GPT-NeoX's number of the layer that holds it (megatron/model/gpt2_model.py).
    hf: its name in Hugging Face files.
    """

    weight: Weight
    block: int
    layer: int
    hf: str


@lru_cache(16)  # a model's rows are asked for again by every stage, and in a batch by every step
def table_rows(architecture: Architecture, layers: int) -> tuple[Row, ...]:
    """Every row of the table, in the order of GPT-NeoX's layers.

    Derived buffers and what only GPT-NeoX has are among them.
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
    """The rows of the weights that a model of this config has on both sides."""
    return tuple(
        row
        for row in table_rows(architecture, config.layers)
        if not row.weight.neox_only and row.weight.is_in(config)
    )


@lru_cache(16)
def rows_by_name(architecture: Architecture, layers: int) -> dict[str, Row]:
    """Every row of the table by its Hugging Face name."""
    return {row.hf: row for row in table_rows(architecture, layers)}
