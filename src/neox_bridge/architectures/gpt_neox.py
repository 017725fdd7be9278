"""Pythia, GPT-NeoX-20B and their relatives: ``GPTNeoXForCausalLM`` in transformers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from neox_bridge.architectures.base import (
    INV_FREQ,
    About,
    Architecture,
    ModelConfig,
    Presence,
    Refusal,
    Weight,
    refusals,
)
from neox_bridge.architectures.heads import REWARD, head_config, refuse_tied
from neox_bridge.architectures.hf_config import (
    hf_fields,
    hf_settings,
    refuse_hf_common,
    stored_biases,
    whole_number,
)
from neox_bridge.architectures.neox_config import (
    SIZE_KEYS,
    Keys,
    attention_kinds,
    neox_fields,
    number,
    read_keys,
    refuse_common,
)
from neox_bridge.findings import Finding
from neox_bridge.frameworks.detectors import GATED
from neox_bridge.tensors.geometry import Split

_LAYER = "gpt_neox.layers.{i}."
_block = partial(Weight, "block")


def _pair(
    neox: str, split: Split, shape: tuple[str, ...], flag: str, old: str = ""
) -> tuple[Weight, Weight]:
    """The weight and the bias of a block's module. Only the bias depends on the flag.

    old: the name in trees before neox-mlp-names, which Hugging Face uses, if it is another.
    """
    hf, bias = old or neox, f"{old}.bias" if old else ""
    bias_split: Split = "row_bias" if split == "row" else split
    weight = f"{old}.weight" if old else ""
    return (
        _block(f"{neox}.weight", f"{_LAYER}{hf}.weight", split, shape, old=weight),
        _block(f"{neox}.bias", f"{_LAYER}{hf}.bias", bias_split, shape[:1], flag, old=bias),
    )


_INV_FREQ = f"{_LAYER}{INV_FREQ}"
_H, _VOCAB = ("hidden",), ("vocab", "hidden")
_WEIGHTS = (
    Weight("embed", "word_embeddings.weight", "gpt_neox.embed_in.weight", "vocab", _VOCAB),
    *_pair("input_layernorm", "replicated", _H, "norm_bias"),
    *_pair("attention.query_key_value", "column", ("qkv", "hidden"), "attention_bias"),
    _block(INV_FREQ, _INV_FREQ, "derived", ("rotary",)),
    *_pair("attention.dense", "row", ("hidden", "hidden"), "attention_bias"),
    *_pair("post_attention_layernorm", "replicated", _H, "norm_bias"),
    *_pair("mlp.linear1", "column", ("ffn", "hidden"), "mlp_bias", "mlp.dense_h_to_4h"),
    *_pair("mlp.linear2", "row", ("hidden", "ffn"), "mlp_bias", "mlp.dense_4h_to_h"),
    Weight("norm", "norm.weight", "gpt_neox.final_layer_norm.weight", "replicated", _H),
    Weight("norm", "norm.bias", "gpt_neox.final_layer_norm.bias", "replicated", _H, "norm_bias"),
    Weight("head", "final_linear.weight", "embed_out.weight", "vocab", _VOCAB, "untied"),
    REWARD,
)

# by our name: names in Hugging Face (the first is written), names in GPT-NeoX, bias_gelu_fusion.
# The fused gelu is the tanh form with a rounded constant, which gelu_fast has too
# (GPT-NeoX megatron/model/activations.py; transformers activations.py).
ACTIVATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "gelu": (("gelu", "gelu_python"), ("gelu",), False),
    "gelu_tanh": (
        ("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
        ("gelu",),
        True,
    ),
    "relu": (("relu",), ("relu",), False),
    "silu": (("silu", "swish"), ("silu", "swish"), False),
    "mish": (("mish",), ("mish",), False),
}

_KEYS: Keys = (
    *SIZE_KEYS,
    ("norm_eps", float, "layer_norm_eps", 1e-5, "layernorm_epsilon", 1e-5),
    ("parallel_residual", bool, "use_parallel_residual", True, "gpt_j_residual", False),
    ("hidden_dropout", float, "hidden_dropout", 0.0, "hidden_dropout", 0.0),
    ("attention_dropout", float, "attention_dropout", 0.0, "attention_dropout", 0.0),
)
_MODEL_KEYS = frozenset(
    """hidden_size intermediate_size norm pos_emb rotary_pct rotary_emb_base no_weight_tying
    activation bias_gelu_fusion gpt_j_tied use_bias_in_attn_linear use_bias_in_mlp mlp_type
    expansion_factor mlp_multiple_of num_kv_heads use_bias_in_norms
    sliding_window_width""".split()
) | {key for *_, key, _ in _KEYS}
_WRITTEN_ALWAYS = {"num_layers", "num_attention_heads", "max_position_embeddings", "gpt_j_residual"}


def rope_of(raw: Mapping[str, Any]) -> tuple[float, float]:
    """The rotary fraction and base of a config.json in either spelling.

    ``rope_parameters`` has priority, as in transformers 5
    (GPTNeoXConfig.convert_rope_params_to_dict). The defaults are those of that class.
    """
    rope = raw.get("rope_parameters") or {}
    pct = rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25))
    base = rope.get("rope_theta", raw.get("rotary_emb_base", 10000))
    return number("rotary_pct", pct, float), number("rotary_emb_base", base, float)


def activation_named(name: object) -> str:
    """Our name of an activation of transformers."""
    return next((ours for ours, (hf, _, _) in ACTIVATIONS.items() if name in hf), str(name))


def _read_hf(raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence) -> ModelConfig:
    pct, base = rope_of(raw)
    first = _LAYER.format(i=0)
    return ModelConfig(
        **read_keys(_KEYS, raw, hf=True),
        **hf_fields(raw, dims, presence, ids=(0, 2)),
        rotary_pct=pct,
        rotary_base=base,
        activation=activation_named(raw.get("hidden_act") or "gelu"),
        tied_norms=False,
        attention_bias=presence.has(f"{first}attention.query_key_value.bias"),
        mlp_bias=presence.has(f"{first}mlp.dense_h_to_4h.bias"),
        norm_bias=presence.has(f"{first}input_layernorm.bias"),
    )


def _write_hf(config: ModelConfig) -> dict[str, Any]:
    base = whole_number(config.rotary_base)
    names = ACTIVATIONS.get(config.activation, ((config.activation,),))[0]
    return {
        **head_config("GPTNeoXForCausalLM", config),
        **hf_settings(_KEYS, config),
        "model_type": "gpt_neox",
        "hidden_act": names[0],
        "attention_bias": config.attention_bias,
        "initializer_range": config.initializer_range,
        # both spellings: transformers 4 knows only the first, 5 writes only the second
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": base,
            "partial_rotary_factor": config.rotary_pct,
        },
    }


def _read_neox(raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence) -> ModelConfig:
    kind, fused = raw.get("activation") or "gelu", bool(raw.get("bias_gelu_fusion"))
    fused = fused and kind == "gelu"
    activation = next(
        (k for k, (_, neox, f) in ACTIVATIONS.items() if kind in neox and f == fused), str(kind)
    )
    keys = read_keys(_KEYS, raw, hf=False)
    return ModelConfig(
        **keys,
        **neox_fields(raw, dims, presence),
        activation=activation,
        tied_norms=bool(raw.get("gpt_j_tied")) and bool(keys["parallel_residual"]),
        attention_bias=presence.has("attention.query_key_value.bias"),
        mlp_bias=presence.has("mlp.linear1.bias"),
        norm_bias=presence.has("input_layernorm.bias"),
    )


def _write_neox(config: ModelConfig, _old: bool) -> dict[str, Any]:
    base = int(config.rotary_base)
    # other layouts of GPT-NeoX support activations that transformers does not have
    _, neox, fused = ACTIVATIONS.get(config.activation, ((), (config.activation,), False))
    written: dict[str, Any] = {"hidden_size": config.hidden}
    for name, _, _, _, key, default in _KEYS:
        value = getattr(config, name)
        if key in _WRITTEN_ALWAYS or value != default:
            written[key] = value
    if config.dims["ffn"] != 4 * config.hidden:
        written["intermediate_size"] = config.dims["ffn"]
    written |= {
        "norm": "layernorm",
        "pos_emb": "rotary",
        "rotary_pct": config.rotary_pct,
        "no_weight_tying": not config.tied_embeddings,
        "activation": neox[0],
        "bias_gelu_fusion": fused,
    }
    if base != 10000:
        written["rotary_emb_base"] = base
    if config.window is not None:
        written["sliding_window_width"] = config.window - 1
    if config.grouped_query:
        written["num_kv_heads"] = config.key_value_heads
    if config.tied_norms:
        written["gpt_j_tied"] = True
    if not config.attention_bias:
        written["use_bias_in_attn_linear"] = False
    if not config.mlp_bias:
        written["use_bias_in_mlp"] = False
    return written


def _refuse_hf_source(raw: Mapping[str, Any]) -> list[Refusal]:
    names = [name for hf, _, _ in ACTIVATIONS.values() for name in hf]
    return refuse_hf_common(raw, rope_of(raw)[1], "rotary_emb_base", names)


def _refuse_neox_source(raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse what GPT-NeoX computes and GPTNeoXForCausalLM does not (megatron/model/)."""
    grouped = raw.get("num_kv_heads") not in (None, raw.get("num_attention_heads"))
    reason = "gpt_neox in transformers does not support grouped-query attention"
    checks = [("num_kv_heads", grouped, reason)]
    return refuse_plain(raw, "gpt_neox") + refusals(checks, neox_only=True)


def refuse_plain(
    raw: Mapping[str, Any], name: str, window: bool = False, positions: str = "rotary"
) -> list[Refusal]:
    """Refuse what no family with LayerNorm and a plain MLP has in transformers.

    name: the family. window: whether it has a sliding window. positions: its pos_emb.
    """
    pos, norm = raw.get("pos_emb") or "learned", raw.get("norm") or "layernorm"
    kind = raw.get("activation") or "gelu"
    activations = [name for _, neox, _ in ACTIVATIONS.values() for name in neox]
    kinds = attention_kinds(raw) - {"global", "flash"}
    checks: tuple[tuple[str, bool, str], ...] = (
        (
            "pos_emb",
            pos != positions,
            f"{name} in transformers supports only {positions} positions, but this model uses "
            f"{pos!r}",
        ),
        (
            "norm",
            norm != "layernorm",
            f"{name} in transformers supports only layernorm, but this model uses {norm!r}",
        ),
        (
            "activation",
            kind not in activations,
            f"{name} in transformers does not support {kind!r}",
        ),
        (
            "use_bias_in_mlp",
            bool(raw.get("gpt_j_residual")) and raw.get("use_bias_in_mlp") is False,
            "with gpt_j_residual: true and use_bias_in_mlp: false, GPT-NeoX leaves the "
            "attention out of its blocks, which no model in transformers does",
        ),
        (
            "attention_config",
            bool(kinds),
            f"{name} in transformers supports only global attention, but this model uses "
            f"{sorted(kinds)}",
        ),
    )
    return refuse_common(raw, window) + refuse_tied(raw) + refusals(checks, neox_only=True)


def _matches_neox(raw: Mapping[str, Any]) -> bool:
    """Whether a yml describes this family: a plain MLP and layernorm."""
    plain_mlp = raw.get("activation") not in GATED and raw.get("mlp_type") in (None, "regular")
    return plain_mlp and (raw.get("norm") or "layernorm") == "layernorm"


def _findings_hf_source(raw: Mapping[str, Any], config: ModelConfig) -> list[Finding]:
    """Where config.json contradicts itself or known facts."""
    findings = stored_biases(raw, {"attention_bias": (True, config.attention_bias)})
    rope = raw.get("rope_parameters") or {}
    for old, new in (("rotary_pct", "partial_rotary_factor"), ("rotary_emb_base", "rope_theta")):
        both = raw.get(old) is not None and rope.get(new) is not None
        if both and float(raw[old]) != float(rope[new]):
            findings.append(
                Finding(
                    "rope-spellings-differ",
                    "warning",
                    f"config.json says {old}: {raw[old]} and rope_parameters.{new}: {rope[new]}. "
                    "transformers 4 reads the first and transformers 5 the second. The second "
                    "is used",
                    "if the first is right, correct config.json",
                    subject="rotary settings",
                )
            )
    if config.activation == "gelu" and _looks_like_pythia(config):
        findings.append(
            Finding(
                "pythia-gelu",
                "warning",
                'config.json sets hidden_act: "gelu", the exact GELU, as in all published Pythia '
                "models. A converted checkpoint computes the same as this Hugging Face model. "
                'Pythia was trained with another form of GELU, the tanh approximation "gelu_fast", '
                "and the logits of the two forms differ by about 1e-3",
                'only if you want the form of the training: set hidden_act: "gelu_fast" in '
                "config.json before you convert",
            )
        )
    return findings


def _looks_like_pythia(config: ModelConfig) -> bool:
    from neox_bridge.architectures.shapes import PYTHIA

    shape = (config.layers, config.hidden, config.heads, config.dims["vocab"])
    return any(shape == (s.layers, s.hidden, s.heads, s.rows) for s in PYTHIA.values())


ARCHITECTURE = Architecture(
    name="gpt_neox",
    about=About(
        "Pythia, GPT-NeoX-20B, StableLM-alpha, RedPajama-INCITE, Dolly",
        "fixture, random, GPT-NeoX",
        "MLPs that are not four times the hidden size wide: only since 2024-10",
    ),
    hf_class="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    weights=_WEIGHTS,
    dropped={
        _INV_FREQ: "not learned: computed from rotary_emb_base",
        f"{_LAYER}attention.bias": "not learned: the causal mask",
        f"{_LAYER}attention.masked_bias": "not learned: a constant of the causal mask",
        "gpt_neox.rotary_emb.inv_freq": "not learned: computed from rotary_emb_base",
        "gpt_neox.rotary_emb.original_inv_freq": "not learned: computed from rotary_emb_base",
    },
    aliases={"lm_head.weight": "embed_out.weight"},
    read_hf=_read_hf,
    write_hf=_write_hf,
    read_neox=_read_neox,
    write_neox=_write_neox,
    refuse_hf_source=_refuse_hf_source,
    refuse_neox_source=_refuse_neox_source,
    matches_neox=_matches_neox,
    model_keys=_MODEL_KEYS,
    findings_hf_source=_findings_hf_source,
    always=("mlp_bias", "norm_bias"),
)
