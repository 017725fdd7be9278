"""The order in which GPT-NeoX registers the parameters of a block.

torch lists parameters in that order, and DeepSpeed lays its flat optimizer states out by it, with
no names in them. Files that list another order would give a parameter the states of its neighbor.
"""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# ParallelTransformerLayer, ParallelSelfAttention, ParallelMLP and LLaMAParallelMLP in
# megatron/model/transformer.py; the order is the same from v1.0 to 2026-05
_MODULES = (
    "input_layernorm",
    "attention.qk_layernorm",
    "attention.query_key_value",
    "attention.rpe",
    "attention.alibi_embed",
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


def in_module_order(parameters: Mapping[tuple[int, str], T]) -> dict[tuple[int, str], T]:
    """Sorts parameters, named by layer and by name in it, as GPT-NeoX registers them.

    They come in the order of their layers. A layer that has a module of another kind, such as a
    Mamba block, keeps its own order.
    """
    by_layer: dict[int, list[str]] = {}
    for layer, name in parameters:
        by_layer.setdefault(layer, []).append(name)
    for names in by_layer.values():
        if all(_module(name) in _MODULES for name in names):
            names.sort(key=lambda name: _MODULES.index(_module(name)))
    return {(layer, n): parameters[layer, n] for layer, names in by_layer.items() for n in names}


def _module(name: str) -> str:
    return name.rpartition(".")[0]
