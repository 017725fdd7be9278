"""OPT: ``OPTForCausalLM`` in transformers.

Its positions start at the third row of their table; the first two are for padding. GPT-NeoX's
opt_pos_emb_offset: 2 does the same, but only in the first forward pass: Embedding.forward of
megatron/model/word_embeddings.py then continues behind the last position of the batch before.
Therefore the two rows become the last ones, beyond the end of the text.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import About, ModelConfig, Refusal, Weight, refusals
from neox_bridge.architectures.heads import REWARD
from neox_bridge.architectures.hf_config import embedding_dropout
from neox_bridge.architectures.learned_positions import (
    Family,
    architecture,
    block,
    norm,
    positions,
)
from neox_bridge.architectures.neox_config import Keys, number
from neox_bridge.findings import Finding

_PADDING_ROWS = 2
_DECODER = "model.decoder."
_LAYER = f"{_DECODER}layers.{{i}}."
_VOCAB = ("vocab", "hidden")
_WEIGHTS = (
    Weight("embed", "word_embeddings.weight", f"{_DECODER}embed_tokens.weight", "vocab", _VOCAB),
    positions(f"{_DECODER}embed_positions.weight", _PADDING_ROWS),
    *block(
        norms=(f"{_LAYER}self_attn_layer_norm", f"{_LAYER}final_layer_norm"),
        qkv=f"{_LAYER}self_attn.{{part}}_proj.{{leaf}}",
        dense=f"{_LAYER}self_attn.out_proj",
        mlp=(f"{_LAYER}fc1", f"{_LAYER}fc2"),
    ),
    *norm("norm", "norm", f"{_DECODER}final_layer_norm"),
    Weight("head", "final_linear.weight", "lm_head.weight", "vocab", _VOCAB, "untied"),
    REWARD,
)
_KEYS: Keys = (
    ("layers", int, "num_hidden_layers", 12, "num_layers", None),
    ("heads", int, "num_attention_heads", 12, "num_attention_heads", None),
    ("max_positions", int, "max_position_embeddings", 2048, "max_position_embeddings", None),
    # OPTDecoderLayer has the epsilon of torch.nn.LayerNorm
    ("norm_eps", float, "", 1e-5, "layernorm_epsilon", 1e-5),
    ("hidden_dropout", float, "dropout", 0.1, "hidden_dropout", 0.0),
    ("attention_dropout", float, "attention_dropout", 0.0, "attention_dropout", 0.0),
)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "word_embed_proj_dim": config.hidden,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "layerdrop": 0.0,
        "init_std": config.initializer_range,
    }


def _refuse(raw: Mapping[str, Any]) -> list[Refusal]:
    hidden = raw.get("hidden_size")
    projected = raw.get("word_embed_proj_dim") or hidden
    checks = (
        (
            "word_embed_proj_dim",
            projected != hidden,
            f"in GPT-NeoX embeddings have the hidden size {hidden}, but here they have {projected} "
            "and are projected",
        ),
        (
            "do_layer_norm_before",
            raw.get("do_layer_norm_before") is False,
            "the norms of GPT-NeoX precede attention and MLP, but those of this model follow them",
        ),
        (
            "_remove_final_layer_norm",
            bool(raw.get("_remove_final_layer_norm")),
            "GPT-NeoX has a norm before the output layer, but this model does not",
        ),
        (
            "enable_bias",
            raw.get("enable_bias") is False,
            "the plain MLP of GPT-NeoX needs biases (megatron/model/transformer.py, "
            "ParallelMLP.forward)",
        ),
        (
            "layer_norm_elementwise_affine",
            raw.get("layer_norm_elementwise_affine") is False,
            "the norms of a plain MLP with norm: layernorm have weights in GPT-NeoX",
        ),
    )
    return refusals(checks)


def _find(raw: Mapping[str, Any]) -> list[Finding]:
    """Where GPT-NeoX trains with another dropout."""
    findings = embedding_dropout(raw, "opt", "dropout", 0.1)
    if raw.get("layerdrop"):
        findings.append(
            Finding(
                "layerdrop-lost",
                "warning",
                f"config.json sets layerdrop: {raw['layerdrop']}. transformers skips layers at "
                "random in training, but GPT-NeoX does not",
            )
        )
    return findings


def _refuse_neox(raw: Mapping[str, Any]) -> list[Refusal]:
    epsilon = number("layernorm_epsilon", raw.get("layernorm_epsilon", 1e-5), float)
    rows = number("max_position_embeddings", raw.get("max_position_embeddings") or 0, int)
    length = number("seq_length", raw.get("seq_length") or 0, int)
    checks = (
        (
            "layernorm_epsilon",
            epsilon != 1e-5,
            f"the norms of opt in transformers always add 1e-05, but these add {epsilon}",
        ),
        (
            "seq_length",
            length > rows - _PADDING_ROWS,
            f"opt uses the last {_PADDING_ROWS} of {rows} positions for padding only, but this "
            f"model has texts of {length} tokens",
        ),
    )
    return refusals(checks, neox_only=True)


ARCHITECTURE = architecture(
    Family(
        name="opt",
        hf_class="OPTForCausalLM",
        about=About(
            "OPT, except 350m",
            "random, GPT-NeoX",
            "the two positions for padding are the last ones in GPT-NeoX; post-norm and projected "
            "embeddings (OPT 350m) are refused",
        ),
        prefix="model.",
        weights=_WEIGHTS,
        keys=_KEYS,
        hf_keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        ids=(2, 2),
        activation="relu",
        first_row=_PADDING_ROWS,
        write=_write,
        refuse=_refuse,
        refuse_neox=_refuse_neox,
        find=_find,
    )
)
