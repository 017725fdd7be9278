"""How the rows of a model's fused tensors are ordered."""

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.errors import Refused
from neox_bridge.tensors.fused import Fusion, GqaOrder


def fusion_of(config: ModelConfig, order: GqaOrder, te: frozenset[str] = frozenset()) -> Fusion:
    """The row maps of a model. Raises Refused where query heads can't share k and v evenly."""
    heads, kv_heads = config.heads, config.key_value_heads
    head_dim = config.hidden // heads
    if order == "interleaved" and "attention" not in te and head_dim * kv_heads % heads:
        raise Refused(
            f"num_kv_heads: {kv_heads} key-value heads of {head_dim} rows can't be shared by "
            f"{heads} query heads in the interleaved order. Use --gqa-order grouped, with a "
            "GPT-NeoX since 2024-11 (--for today)."
        )
    return Fusion(heads, kv_heads, order, te)
