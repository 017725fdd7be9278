"""Small tests of checkpoints, with which the known changes decide whether they affect one."""

from collections.abc import Callable, Mapping
from typing import Any

from neox_bridge.frameworks.change import Described

GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu")  # megatron/model/activations.py
HALF = ("float16", "bfloat16")
# Keys of mixtures of experts that GPT-NeoX removed.
MOE_KEYS = tuple(
    """create_moe_param_group enable_expert_tensor_parallelism expert_interval
    moe_eval_capacity_factor moe_expert_parallel_size moe_glu moe_loss_coeff moe_min_capacity
    moe_token_dropping moe_train_capacity_factor moe_type moe_use_residual""".split()
)

# however a tree with norms for q and k spells them: q_norm, k_layernorm, query_norm
SEPARATE_QK_NORMS = r"\battention\.(q|k|query|key)_?(layer)?norm\."


def has_usual_head_width(raw: Mapping[str, Any]) -> bool:
    """Whether head_dim of a yml is the width that heads have without the key."""
    width, heads, hidden = (
        raw.get(key) for key in ("head_dim", "num_attention_heads", "hidden_size")
    )
    sizes = isinstance(width, int) and isinstance(heads, int) and isinstance(hidden, int)
    return width is None or (sizes and width * heads == hidden)


def neox(test: Callable[[Described], bool]) -> Callable[[Described], bool]:
    """The test, for GPT-NeoX checkpoints only."""
    return lambda c: c.neox is not None and test(c)


def on(name: str) -> Callable[[Described], bool]:
    """The test whether the yml turns this key on."""
    return neox(lambda c: bool(c.raw.get(name)))


def has_gated_mlp(raw: Mapping[str, Any]) -> bool:
    return raw.get("activation") in GATED or raw.get("mlp_type") == "llama"


def is_gated(c: Described) -> bool:
    return has_gated_mlp(c.raw)


def is_te(c: Described) -> bool:
    keys = ("te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha")
    return any(c.raw.get(key) for key in keys)


def is_grouped(c: Described) -> bool:
    return c.raw.get("num_kv_heads") not in (None, c.raw.get("num_attention_heads"))


def is_wide(c: Described) -> bool:
    return not is_gated(c) and c.config.dims["ffn"] != 4 * c.config.hidden


def one_stage_ranks(c: Described) -> bool:
    """Whether all weights are in mp_rank files, although the yml says one pipeline stage."""
    return c.neox is not None and c.neox.layout == "ranks" and c.raw.get("pipe_parallel_size") == 1


def sums(c: Described) -> bool:
    return c.neox is not None and c.neox.tp > 1 and (c.config.attention_bias or c.config.mlp_bias)


def hf(family: str, test: Callable[[Described], bool]) -> Callable[[Described], bool]:
    """The test, for Hugging Face folders only, of a model_type ("": of any)."""
    return lambda c: c.kind == "hf" and family in ("", c.raw.get("model_type")) and test(c)


def stores_bf16(c: Described) -> bool:
    """Whether it is of a GPT-NeoX run in bfloat16, in the newer spelling."""
    if c.neox is None:
        return False
    named = "bf16" in c.raw or c.raw.get("precision") == "bfloat16"
    return named or any(name.startswith("bf16_") for name in c.neox.optimizer)
