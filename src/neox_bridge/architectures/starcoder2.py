"""StarCoder 2: ``Starcoder2ForCausalLM``, with separate q, k and v, LayerNorm and a plain MLP.

In GPT-NeoX it has the tensors of ``gpt_neox``, with grouped queries. Both frameworks rotate halves
of whole heads (megatron/model/positional_embeddings.py; models/starcoder2/ of transformers).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from neox_bridge.architectures.base import (
    About,
    ModelConfig,
    Presence,
    Refusal,
    Weight,
    refusals,
)
from neox_bridge.architectures.gpt_neox import ACTIVATIONS, refuse_plain
from neox_bridge.architectures.gpt_neox import ARCHITECTURE as GPT_NEOX
from neox_bridge.architectures.heads import head_config
from neox_bridge.architectures.hf_config import (
    hf_fields,
    hf_settings,
    refuse_hf_common,
    stored_biases,
    whole_number,
)
from neox_bridge.architectures.llama_like import kv_heads_of, refuse_heads, rope_base
from neox_bridge.architectures.llama_weights import LAYER, weights
from neox_bridge.architectures.neox_config import SIZE_KEYS, Keys, number, read_keys
from neox_bridge.findings import Finding

_NAME, _CLASS, _TANH = "starcoder2", "Starcoder2ForCausalLM", "gelu_pytorch_tanh"
_block = partial(Weight, "block")
_UP, _OLD_UP = "mlp.linear1", "mlp.dense_h_to_4h"
_DOWN, _OLD_DOWN = "mlp.linear2", "mlp.dense_4h_to_h"
_FFN = ("ffn", "hidden")
_WEIGHTS = (
    # GPT-NeoX may have norms without biases (use_bias_in_norms)
    *(
        replace(row, flag="norm_bias") if row.neox.endswith("norm.bias") else row
        for row in weights("layernorm", "attention")
        if not row.neox.startswith("mlp.")
    ),
    _block(f"{_UP}.weight", f"{LAYER}mlp.c_fc.weight", "column", _FFN, old=f"{_OLD_UP}.weight"),
    _block(
        f"{_UP}.bias",
        f"{LAYER}mlp.c_fc.bias",
        "column",
        _FFN[:1],
        "mlp_bias",
        old=f"{_OLD_UP}.bias",
    ),
    _block(
        f"{_DOWN}.weight", f"{LAYER}mlp.c_proj.weight", "row", _FFN[::-1], old=f"{_OLD_DOWN}.weight"
    ),
    _block(
        f"{_DOWN}.bias",
        f"{LAYER}mlp.c_proj.bias",
        "row_bias",
        ("hidden",),
        "mlp_bias",
        old=f"{_OLD_DOWN}.bias",
    ),
)
_KEYS: Keys = (
    *SIZE_KEYS,
    ("norm_eps", float, "norm_epsilon", 1e-5, "layernorm_epsilon", 1e-5),
    ("hidden_dropout", float, "residual_dropout", 0.0, "hidden_dropout", 0.0),
    ("attention_dropout", float, "attention_dropout", 0.0, "attention_dropout", 0.0),
)
# of transformers' class, which leaves values that are equal to them out of config.json
_DEFAULTS = {"tie_word_embeddings": True, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def _complete(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**_DEFAULTS, **raw} if raw.get("model_type") == _NAME else raw


def _read_hf(raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence) -> ModelConfig:
    keys = read_keys(_KEYS, raw, hf=True)
    act, window = raw.get("hidden_act") or _TANH, raw.get("sliding_window")
    first = LAYER.format(i=0)
    return ModelConfig(
        **keys,
        **hf_fields(raw, dims, presence, ids=(50256, 50256)),
        rotary_pct=1.0,
        rotary_base=rope_base(raw),
        activation=next((k for k, (hf, _, _) in ACTIVATIONS.items() if act in hf), str(act)),
        parallel_residual=False,
        tied_norms=False,
        attention_bias=presence.has(f"{first}self_attn.q_proj.bias"),
        mlp_bias=presence.has(f"{first}mlp.c_fc.bias"),
        norm_bias=presence.has(f"{first}input_layernorm.bias"),
        kv_heads=kv_heads_of(raw, "num_key_value_heads", keys["heads"]),
        window=None if window is None else number("sliding_window", window, int),
    )


def _write_hf(config: ModelConfig) -> dict[str, Any]:
    base = whole_number(config.rotary_base)
    names = ACTIVATIONS.get(config.activation, ((config.activation,),))[0]
    return {
        **head_config(_CLASS, config),
        **hf_settings(_KEYS, config),
        "model_type": _NAME,
        "num_key_value_heads": config.key_value_heads,
        "hidden_act": _TANH if _TANH in names else names[0],
        "use_bias": config.attention_bias,
        "sliding_window": config.window,
        "embedding_dropout": config.hidden_dropout,
        "initializer_range": config.initializer_range,
        # both spellings, because transformers 4 knows only the first and 5 writes only the second
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }


def _read_neox(raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence) -> ModelConfig:
    config = GPT_NEOX.read_neox(raw, dims, presence)
    return replace(config, kv_heads=kv_heads_of(raw, "num_kv_heads", config.heads))


def _refuse_hf_source(raw: Mapping[str, Any]) -> list[Refusal]:
    names = [name for hf, _, _ in ACTIVATIONS.values() for name in hf]
    reasons = refuse_hf_common(raw, rope_base(raw), "rope_theta", [_TANH, *names])
    return reasons + refuse_heads(raw, _NAME, None)


def _refuse_neox_source(raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse what GPT-NeoX computes and Starcoder2ForCausalLM does not (megatron/model/)."""
    share = number("rotary_pct", raw.get("rotary_pct", 1.0), float)
    checks = (
        (
            "rotary_pct",
            share != 1.0,
            f"{_NAME} rotates whole heads, but this model rotates only {share:g} of each",
        ),
        (
            "gpt_j_residual",
            bool(raw.get("gpt_j_residual")),
            f"the blocks of {_NAME} are sequential, with the attention first",
        ),
        (
            "use_bias_in_attn_linear",
            raw.get("use_bias_in_attn_linear") is False,
            f"{_NAME} has biases of both attention and MLP, or none",
        ),
    )
    return refuse_plain(raw, _NAME, window=True) + refusals(checks, neox_only=True)


def _findings_hf_source(raw: Mapping[str, Any], config: ModelConfig) -> list[Finding]:
    return stored_biases(raw, {"use_bias": (True, config.attention_bias or config.mlp_bias)})


def _findings_to_neox(raw: Mapping[str, Any], config: ModelConfig) -> list[Finding]:
    """GPT-NeoX uses hidden_dropout for embeddings too (megatron/model/word_embeddings.py)."""
    dropout = number("embedding_dropout", raw.get("embedding_dropout") or 0.0, float)
    if dropout == config.hidden_dropout:
        return []
    return [
        Finding(
            "embedding-dropout",
            "warning",
            f"config.json sets embedding_dropout: {dropout:g} and residual_dropout: "
            f"{config.hidden_dropout:g}, but GPT-NeoX uses hidden_dropout for both. The yml sets "
            f"hidden_dropout: {config.hidden_dropout:g}",
            "if you train the model further with another dropout, change hidden_dropout",
        )
    ]


ARCHITECTURE = replace(
    GPT_NEOX,
    name=_NAME,
    about=About(
        "StarCoder 2",
        "fixture, random, GPT-NeoX",
        "sliding_window: N is sliding_window_width: N-1; a rope_theta that is no whole number "
        "(StarCoder 2 3B) is refused",
    ),
    hf_class=_CLASS,
    prefix="model.",
    weights=_WEIGHTS,
    dropped={
        f"{LAYER}self_attn.rotary_emb.inv_freq": "not learned: computed from rope_theta",
        "model.rotary_emb.inv_freq": "not learned: computed from rope_theta",
        "model.rotary_emb.original_inv_freq": "not learned: computed from rope_theta",
    },
    aliases={},
    read_hf=_read_hf,
    write_hf=_write_hf,
    read_neox=_read_neox,
    refuse_hf_source=_refuse_hf_source,
    refuse_neox_source=_refuse_neox_source,
    complete=_complete,
    findings_hf_source=_findings_hf_source,
    findings_to_neox=_findings_to_neox,
)
