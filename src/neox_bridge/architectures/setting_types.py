"""Checks the kinds of the values in settings, so that later code can rely on them.

Sources: the configuration classes of transformers for config.json, and neox_args.py and
deepspeed_args.py in megatron/neox_arguments of GPT-NeoX for the yml.
"""

from collections.abc import Callable, Mapping
from typing import Any

from neox_bridge.errors import BridgeError

MOST_LAYERS = 4096
_MOST_HEADS = 4096
_MOST_COUNT = 2**53
_NAME_CHARACTERS = 200

_Kind = tuple[str, Callable[[Any], bool]]


def _whole(most: int, shown: str = "") -> _Kind:
    return (
        f"a whole number from 0 to {shown or most}",
        lambda v: _is_number(v) and float(v).is_integer() and 0 <= v <= most,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


_LARGEST = 1e300  # the largest valid number; it excludes infinity and NaN
_COUNT, _LAYERS, _HEADS = _whole(_MOST_COUNT, "2**53"), _whole(MOST_LAYERS), _whole(_MOST_HEADS)
_NUMBER: _Kind = ("a finite number", _is_number)
_SHARE: _Kind = ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_BASE: _Kind = ("a number above 0", lambda v: _is_number(v) and v > 0)
_SWITCH: _Kind = ("true or false", lambda v: isinstance(v, int) and v in (0, 1))
_MAPPING: _Kind = ("keys and values", lambda v: isinstance(v, dict))
_LIST: _Kind = ("a list", lambda v: isinstance(v, list))
_NAME: _Kind = (
    "a name",
    lambda v: isinstance(v, str) and len(v) <= _NAME_CHARACTERS and v.isprintable(),
)


def _table(kinds: Mapping[_Kind, str]) -> dict[str, _Kind]:
    return {key: kind for kind, keys in kinds.items() for key in keys.split()}


_ROPE = {"rope_theta": _BASE, "partial_rotary_factor": _SHARE}
HF = _table(
    {
        _COUNT: """num_hidden_layers hidden_size intermediate_size vocab_size
            max_position_embeddings head_dim sliding_window state_size conv_kernel expand n_layer
            d_model n_embd n_inner n_positions ffn_dim word_embed_proj_dim""",
        _HEADS: "num_attention_heads num_key_value_heads n_head",
        _NUMBER: """layer_norm_eps rms_norm_eps layer_norm_epsilon norm_epsilon hidden_dropout
            resid_pdrop attn_pdrop embd_pdrop residual_dropout embedding_dropout attention_dropout
            initializer_range""",
        _SHARE: "rotary_pct partial_rotary_factor",
        _BASE: "rotary_emb_base rope_theta",
        _SWITCH: """tie_word_embeddings use_parallel_residual attention_bias mlp_bias use_bias
            use_conv_bias use_qkv_bias qk_layernorm rms_norm residual_in_fp32 use_sliding_window
            tie_embeddings scale_attn_weights scale_attn_by_inverse_layer_idx
            reorder_and_upcast_attn multi_query attention_softmax_in_fp32
            scale_attention_softmax_in_fp32 add_cross_attention do_layer_norm_before
            _remove_final_layer_norm enable_bias layer_norm_elementwise_affine""",
        _MAPPING: "rope_parameters rope_scaling",
        _LIST: "architectures",
        _NAME: "model_type hidden_act activation_function transformers_version torch_dtype dtype",
    }
)
NEOX = _table(
    {
        _LAYERS: "num_layers num_unique_layers",
        _HEADS: "num_attention_heads num_kv_heads",
        _COUNT: """hidden_size intermediate_size max_position_embeddings seq_length moe_num_experts
            num_experts make_vocab_size_divisible_by mlp_multiple_of sliding_window_width
            padded_vocab_size model_parallel_size pipe_parallel_size iteration""",
        _NUMBER: """layernorm_epsilon rms_norm_epsilon scalenorm_epsilon hidden_dropout
            attention_dropout expansion_factor""",
        _SHARE: "rotary_pct",
        _BASE: "rotary_emb_base",
        _SWITCH: """gpt_j_residual gpt_j_tied no_weight_tying bias_gelu_fusion
            use_bias_in_attn_linear use_bias_in_mlp use_bias_in_norms use_qk_layernorm use_mup
            te_mha te_layernorm_mlp rmsnorm_fusion rotary_save_freqs_buffer mamba_use_bias_in_conv
            mamba_use_bias_in_linears""",
        _MAPPING: "soft_prompt_tuning",
        _NAME: "norm pos_emb activation mlp_type tokenizer_type train_impl precision",
    }
)


def check_hf(raw: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise BridgeError, which names the key, for a value of another kind. where: the file."""
    _check(raw, HF, where)
    _check(raw.get("rope_parameters") or {}, _ROPE, f"{where}: rope_parameters")


def check_neox(raw: Mapping[str, Any], where: str) -> None:
    """The same for a merged yml or the args of a checkpoint. Numbers may be texts such as 1e-5."""
    numbers = {key: _as_number(value) for key, value in raw.items() if key in NEOX}
    _check(numbers, NEOX, where)


def _check(raw: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str) -> None:
    for key, (what, fits) in kinds.items():
        if raw.get(key) is not None and not fits(raw[key]):
            raise BridgeError(f"{where}: {key}: {str(raw[key])[:60]!r} is not {what}. Correct it.")


def _as_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def is_count(value: object) -> bool:
    """Whether a value is a count: a whole number and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_COUNT


def is_name(value: object) -> bool:
    """Whether a value is a short printable text."""
    return _NAME[1](value)
