"""The order in which GPT-NeoX registers the parameters of a block.

torch lists parameters in that order, and DeepSpeed lays its flat optimizer states out by it, with
no names in them. Files that list another order would give a parameter the states of its neighbor.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

# ParallelTransformerLayer, ParallelSelfAttention, ParallelMLP and LLaMAParallelMLP in
# megatron/model/transformer.py; the order is the same from v1.0 to 2026-05
_MODULES = (
    "input_layernorm",
    "attention.query_key_value",
    "attention.rotary_emb",
    "attention.dense",
    "post_attention_layernorm",
    "mlp.w1",
    "mlp.w3",
    "mlp.w2",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    "mlp.linear1",
    "mlp.linear2",
)
_RANKS = {module: rank for rank, module in enumerate(_MODULES)}


def in_module_order(parameters: Mapping[tuple[int, str], T]) -> dict[tuple[int, str], T]:
    """Sorts parameters, named by layer and by name in it, as GPT-NeoX registers them.

    Args:
        parameters: In the order of their layers. A layer that has a module of another kind, such
            as a Mamba block, keeps its own order.

    Returns:
        The same items, sorted.
    """
    by_layer: dict[int, list[str]] = {}
    for layer, name in parameters:
        by_layer.setdefault(layer, []).append(name)
    return {
        (layer, name): parameters[layer, name]
        for layer, names in by_layer.items()
        for name in _sorted(names)
    }


def _sorted(names: list[str]) -> Iterable[str]:
    modules = [name.rpartition(".")[0] for name in names]
    if not all(module in _RANKS for module in modules):
        return names
    return sorted(names, key=lambda name: _RANKS[name.rpartition(".")[0]])
