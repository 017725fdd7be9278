"""The names of the settings that each framework knows, from ``keys.json``."""

import json
from functools import cache
from pkgutil import get_data  # importlib.resources takes 10 ms to import
from typing import Any

# mamba_ssm: models/config_mamba.py, and the arguments of Mamba (modules/mamba_simple.py)
MAMBA_SSM = frozenset(
    """d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm
    residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings""".split()
)
MAMBA_SSM_BLOCK = frozenset(
    """layer d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias
    bias use_fast_path""".split()
)
# Meta's params.json (meta-llama/llama, llama/model.py, ModelArgs), and Mistral's of the same form
META_LLAMA = frozenset(
    """dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier hidden_dim
    norm_eps rope_theta use_scaled_rope max_batch_size max_seq_len moe quantization_args
    model_type head_dim max_position_embeddings sliding_window tied_embeddings""".split()
)
# what every transformers config.json may have beside the fields of PreTrainedConfig: written by
# save_pretrained, by the Hub, by quantizers (quantization is judged elsewhere) and by trainers
_BESIDE = frozenset(
    """auto_map custom_pipelines quantization_config compression_config pre_quantization_dtype
    _pre_quantization_dtype _flash_attn_2_enabled unsloth_fixed unsloth_version
    transformers.js_config _diffusers_version""".split()
)
# fields of transformers' classes that change the model and that no reader here reads
UNREAD = frozenset({"pruned_heads", "per_layer_config", "layer_types"})
# rope_scaling and rope_parameters (modeling_rope_utils.py), and the older remote code of YaRN
ROPE = frozenset(
    """rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
    attention_factor beta_fast beta_slow short_factor long_factor low_freq_factor high_freq_factor
    mscale mscale_all_dim truncate finetuned""".split()
)
SOFT_PROMPT = frozenset({"enabled", "num_tokens", "init_string", "init_range"})
# keys of blocks of the yml that GPT-NeoX or DeepSpeed's sparse attention and optimizers take
_IN_BLOCKS = frozenset(
    """type params enabled auto_cast load_from_fp32_weights block num_local_blocks num_global_blocks
    num_random_blocks num_sliding_window_blocks different_layout_per_head attention
    horizontal_global_attention""".split()
)


@cache
def _facts() -> dict[str, Any]:
    data = get_data("neox_bridge.frameworks", "keys.json")
    assert data is not None, "it is part of the package"
    facts: dict[str, Any] = json.loads(data)
    return facts


@cache
def neox_keys(tree: str = "") -> frozenset[str]:
    """The yml keys that GPT-NeoX takes: in one of the trees of ``keys.json``, or in any of them."""
    keys: dict[str, str] = _facts()["gpt_neox"]["keys"]
    return frozenset(key for key, trees in keys.items() if not tree or tree in trees.split())


def is_shipped(key: str, value: object) -> bool:
    """Whether a yml in GPT-NeoX's own configs folder has this, although its code does not take it.

    Such ymls say in other words what other keys of theirs say.
    """
    return str(value) in _facts()["gpt_neox"]["shipped"].get(key, ())


def removed_from_neox(key: str) -> str:
    """The date on which GPT-NeoX lost a key that none of the trees has; "" for other keys."""
    return str(_facts()["gpt_neox"]["removed"].get(key, ""))


@cache
def block_keys() -> frozenset[str]:
    """The keys within blocks of a yml: those of DeepSpeed's config."""
    return frozenset(_facts()["deepspeed"]["keys"]) | _IN_BLOCKS


@cache
def transformers_keys(family: str) -> frozenset[str]:
    """The keys of a config.json that transformers' class of a family knows, in some version.

    For a family that is not in ``keys.json``: those that any of the others knows.
    """
    facts = _facts()["transformers"]
    everyone = (key for keys in facts["families"].values() for key in keys)
    return frozenset({*facts["common"], *facts["families"].get(family, everyone), *_BESIDE})
