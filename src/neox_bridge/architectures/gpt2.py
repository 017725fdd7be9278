"""GPT-2 and models of its class: ``GPT2LMHeadModel`` in transformers.

Its matrices are those of Conv1D (pytorch_utils.py of transformers), which are transposed.
``c_attn`` has all rows of q, then those of k, then those of v.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from neox_bridge.architectures.base import About, ModelConfig, Refusal, Weight, refusals
from neox_bridge.architectures.heads import REWARD
from neox_bridge.architectures.learned_positions import Family, architecture, positions
from neox_bridge.architectures.neox_config import Keys, number
from neox_bridge.findings import Finding
from neox_bridge.tensors.fused import Part
from neox_bridge.tensors.geometry import Split

_LAYER = "transformer.h.{i}."
_H, _VOCAB = ("hidden",), ("vocab", "hidden")
_PARTS: tuple[tuple[Part, str], ...] = (("q", "q"), ("k", "kv"), ("v", "kv"))
_block = partial(Weight, "block")


def _norm(place: Any, neox: str, hf: str) -> tuple[Weight, Weight]:
    bias = Weight(place, f"{neox}.bias", f"{hf}.bias", "replicated", _H, "norm_bias")
    return Weight(place, f"{neox}.weight", f"{hf}.weight", "replicated", _H), bias


def _qkv(leaf: str, flag: str = "") -> tuple[Weight, ...]:
    return tuple(
        _block(
            f"attention.query_key_value.{leaf}",
            f"{_LAYER}attn.c_attn.{leaf} ({part})",
            "fused",
            (rows, "hidden") if leaf == "weight" else (rows,),
            flag,
            part,
            transposed=leaf == "weight",
        )
        for part, rows in _PARTS
    )


def _conv(
    neox: str, hf: str, split: Split, shape: tuple[str, str], flag: str, old: str = ""
) -> tuple[Weight, Weight]:
    """The weight and the bias of a Conv1D. old: GPT-NeoX's name before neox-mlp-names."""
    weight, bias = (f"{old}.weight", f"{old}.bias") if old else ("", "")
    bias_split: Split = "row_bias" if split == "row" else split
    return (
        _block(f"{neox}.weight", f"{_LAYER}{hf}.weight", split, shape, old=weight, transposed=True),
        _block(f"{neox}.bias", f"{_LAYER}{hf}.bias", bias_split, shape[:1], flag, old=bias),
    )


_WEIGHTS = (
    Weight("embed", "word_embeddings.weight", "transformer.wte.weight", "vocab", _VOCAB),
    positions("transformer.wpe.weight"),
    *_norm("block", "input_layernorm", f"{_LAYER}ln_1"),
    *_qkv("weight"),
    *_qkv("bias", "attention_bias"),
    *_conv("attention.dense", "attn.c_proj", "row", ("hidden", "q"), "attention_bias"),
    *_norm("block", "post_attention_layernorm", f"{_LAYER}ln_2"),
    *_conv("mlp.linear1", "mlp.c_fc", "column", ("ffn", "hidden"), "mlp_bias", "mlp.dense_h_to_4h"),
    *_conv("mlp.linear2", "mlp.c_proj", "row", ("hidden", "ffn"), "mlp_bias", "mlp.dense_4h_to_h"),
    *_norm("norm", "norm", "transformer.ln_f"),
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
                f"{_LAYER}attn.c_attn.{leaf} ({part})" for part, _ in _PARTS
            )
            for leaf in ("weight", "bias")
        },
        hf_heads=lambda raw: (int(raw.get("n_head") or 12),) * 2,
        write=write,
        refuse=refuse,
        find=find,
    )
)
