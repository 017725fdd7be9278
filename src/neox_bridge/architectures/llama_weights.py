"""The table of weights that Llama and its relatives share."""

from functools import partial
from typing import Literal

from neox_bridge.architectures.base import INV_FREQ, Weight
from neox_bridge.architectures.heads import REWARD
from neox_bridge.tensors.fused import Part
from neox_bridge.tensors.geometry import Split

# of attention and MLP: a choice of config.json; those of the attention are; those of q, k and v
# are; always those of q, k and v; never any
Biases = Literal["optional", "attention", "optional qkv", "qkv", "none"]
Norm = Literal["rmsnorm", "layernorm", "non_parametric_layernorm"]
LAYER = "model.layers.{i}."
QKV, UP = "attention.query_key_value", "mlp.linear1"
_H, _VOCAB = ("hidden",), ("vocab", "hidden")
# part, name in Hugging Face, its rows, tensor in GPT-NeoX, how it is fused, name before 2024-09
_PARTS: tuple[tuple[Part, str, str, str, Split, str], ...] = (
    ("q", "self_attn.q_proj", "q", QKV, "fused", ""),
    ("k", "self_attn.k_proj", "kv", QKV, "fused", ""),
    ("v", "self_attn.v_proj", "kv", QKV, "fused", ""),
    ("up", "mlp.up_proj", "ffn", UP, "gated", "mlp.w3.weight"),
    ("gate", "mlp.gate_proj", "ffn", UP, "gated", "mlp.w1.weight"),
)
_block = partial(Weight, "block")
# one matrix for gate and up (`Architecture.joined`)
GATE_UP = {
    f"{LAYER}mlp.gate_up_proj.weight": tuple(f"{LAYER}mlp.{p}_proj.weight" for p in ("gate", "up"))
}


def weights(norm: Norm, biases: Biases) -> tuple[Weight, ...]:
    """All weights of the family. The parts of one GPT-NeoX tensor are rows with the same name."""
    down = f"{LAYER}mlp.down_proj.weight"
    return (
        Weight("embed", "word_embeddings.weight", "model.embed_tokens.weight", "vocab", _VOCAB),
        *_norm(norm, "block", "input_layernorm", f"{LAYER}input_layernorm"),
        *_parts("fused"),
        _block(INV_FREQ, f"{LAYER}self_attn.rotary_emb.inv_freq", "derived", ("rotary",)),
        _block("attention.dense.weight", f"{LAYER}self_attn.o_proj.weight", "row", ("hidden", "q")),
        *_norm(norm, "block", "post_attention_layernorm", f"{LAYER}post_attention_layernorm"),
        *_parts("gated"),
        _block("mlp.linear2.weight", down, "row", ("hidden", "ffn"), old="mlp.w2.weight"),
        *_biases(biases),
        *_norm(norm, "norm", "norm", "model.norm"),
        Weight("head", "final_linear.weight", "lm_head.weight", "vocab", _VOCAB, "untied"),
        REWARD,
    )


def _norm(norm: Norm, place: Literal["block", "norm"], neox: str, hf: str) -> tuple[Weight, ...]:
    """GPT-NeoX's own RMSNorm says scale, the fused one of apex weight (megatron/model/norms.py)."""
    if norm == "non_parametric_layernorm":
        return ()
    if norm == "layernorm":
        return tuple(
            Weight(place, f"{neox}.{leaf}", f"{hf}.{leaf}", "replicated", _H)
            for leaf in ("weight", "bias")
        )
    also = f"{neox}.weight"
    return (Weight(place, f"{neox}.scale", f"{hf}.weight", "replicated", _H, also=also),)


def _parts(split: Split) -> tuple[Weight, ...]:
    return tuple(
        _block(f"{neox}.weight", f"{LAYER}{hf}.weight", kind, (rows, "hidden"), part=part, old=old)
        for part, hf, rows, neox, kind, old in _PARTS
        if kind == split
    )


def _biases(biases: Biases) -> tuple[Weight, ...]:
    """GPT-NeoX has biases of both query_key_value and dense, or none (use_bias_in_attn_linear)."""
    if biases == "none":
        return ()
    bias_rows = [
        _block(
            f"{neox}.bias",
            f"{LAYER}{hf}.bias",
            kind,
            (rows,),
            "attention_bias" if kind == "fused" else "mlp_bias",
            part,
        )
        for part, hf, rows, neox, kind, _ in _PARTS
        if kind == "fused" or biases == "optional"
    ]
    dense, name = "attention.dense.bias", f"{LAYER}self_attn.o_proj.bias"
    split: Split = "zero" if biases in ("qkv", "optional qkv") else "row_bias"
    bias_rows.append(_block(dense, name, split, _H, "attention_bias"))
    if biases == "optional":
        down = f"{LAYER}mlp.down_proj.bias"
        bias_rows.append(_block("mlp.linear2.bias", down, "row_bias", _H, "mlp_bias"))
    return tuple(bias_rows)
