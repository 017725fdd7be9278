"""GPT-2 and models of its class: ``GPT2LMHeadModel`` in transformers.

Its matrices are those of Conv1D (pytorch_utils.py of transformers), which are transposed.
``c_attn`` has all rows of q, then those of k, then those of v.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import About, ModelConfig, Refusal, Weight, refusals
from neox_bridge.architectures.heads import REWARD
from neox_bridge.architectures.learned_positions import (
    Family,
    architecture,
    block,
    norm,
    positions,
)
from neox_bridge.architectures.neox_config import Keys, number
from neox_bridge.findings import Finding

_LAYER = "transformer.h.{i}."
_C_ATTN = f"{_LAYER}attn.c_attn"
_VOCAB = ("vocab", "hidden")
_WEIGHTS = (
    Weight("embed", "word_embeddings.weight", "transformer.wte.weight", "vocab", _VOCAB),
    positions("transformer.wpe.weight"),
    *block(
        norms=(f"{_LAYER}ln_1", f"{_LAYER}ln_2"),
        qkv=f"{_C_ATTN}.{{leaf}} ({{part}})",
        dense=f"{_LAYER}attn.c_proj",
        mlp=(f"{_LAYER}mlp.c_fc", f"{_LAYER}mlp.c_proj"),
        transposed=True,
    ),
    *norm("norm", "norm", "transformer.ln_f"),
    Weight("head", "final_linear.weight", "lm_head.weight", "vocab", _VOCAB, "untied"),
    REWARD,
)
HF_KEYS: Mapping[str, str] = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
}
KEYS: Keys = (
    ("layers", int, "n_layer", 12, "num_layers", None),
    ("heads", int, "n_head", 12, "num_attention_heads", None),
    ("max_positions", int, "n_positions", 1024, "max_position_embeddings", None),
    ("norm_eps", float, "layer_norm_epsilon", 1e-5, "layernorm_epsilon", 1e-5),
    ("hidden_dropout", float, "resid_pdrop", 0.1, "hidden_dropout", 0.0),
    ("attention_dropout", float, "attn_pdrop", 0.1, "attention_dropout", 0.0),
)


def write(config: ModelConfig) -> dict[str, Any]:
    """The other keys of config.json."""
    ffn = config.dims["ffn"]
    return {
        "n_inner": None if ffn == 4 * config.hidden else ffn,
        "embd_pdrop": config.hidden_dropout,
        "scale_attn_weights": True,
    }


def refuse(raw: Mapping[str, Any]) -> list[Refusal]:
    """What GPT-NeoX does not support."""
    checks = (
        (
            "scale_attn_weights",
            raw.get("scale_attn_weights") is False,
            "GPT-NeoX divides the attention scores by the root of the size of a head, but this "
            "model does not",
        ),
        (
            "scale_attn_by_inverse_layer_idx",
            bool(raw.get("scale_attn_by_inverse_layer_idx")),
            "GPT-NeoX scales the attention scores alike in all layers, but this model divides "
            "those of layer N by N",
        ),
        (
            "add_cross_attention",
            bool(raw.get("add_cross_attention")),
            "GPT-NeoX has no attention to an encoder",
        ),
    )
    upcast = (
        "reorder_and_upcast_attn",
        bool(raw.get("reorder_and_upcast_attn")),
        "GPT-NeoX computes the attention scores in the dtype of the model, but this model in fp32",
    )
    alike = "set it to false: in fp32 that is the same model, in 16 bits it rounds otherwise"
    return refusals(checks) + refusals([upcast], way_out=alike)


def find(raw: Mapping[str, Any]) -> list[Finding]:
    """Where GPT-NeoX trains with another dropout of the embeddings."""
    embedded, others = (
        number(key, 0.1 if raw.get(key) is None else raw[key], float)
        for key in ("embd_pdrop", "resid_pdrop")
    )
    if embedded == others:
        return []
    return [
        Finding(
            "embedding-dropout",
            "warning",
            f"config.json sets embd_pdrop: {embedded} and resid_pdrop: {others}. GPT-NeoX has one "
            f"hidden_dropout for both, which is set to {others}",
            "if you train on, set hidden_dropout in the yml",
        )
    ]


ARCHITECTURE = architecture(
    Family(
        name="gpt2",
        hf_class="GPT2LMHeadModel",
        about=About(
            "GPT-2, Cerebras-GPT",
            "random, GPT-NeoX",
            "the tanh form of gelu is bias_gelu_fusion; matrices are transposed; "
            "scale_attn_by_inverse_layer_idx is refused",
        ),
        prefix="transformer.",
        weights=_WEIGHTS,
        keys=KEYS,
        hf_keys=HF_KEYS,
        ids=(50256, 50256),
        activation="gelu_new",
        dropped={
            f"{_LAYER}attn.bias": "not learned: the causal mask",
            f"{_LAYER}attn.masked_bias": "not learned: a constant of the causal mask",
        },
        joined={
            f"{_LAYER}attn.c_attn.{leaf}": tuple(
                f"{_LAYER}attn.c_attn.{leaf} ({part})" for part in "qkv"
            )
            for leaf in ("weight", "bias")
        },
        hf_heads=lambda raw: (int(raw.get("n_head") or 12),) * 2,
        write=write,
        refuse=refuse,
        find=find,
    )
)
