"""The common parts of Llama and its relatives: rotary positions, separate q, k, v, a gated MLP.

Sources: megatron/model/transformer.py of GPT-NeoX (ParallelMLP and Gated_Activation since the
change neox-mlp-names, LLaMAParallelMLP before), norms.py, neox_arguments/neox_args.py;
models/{llama,mistral,qwen2,olmo,stablelm,phi3,glm}/ of transformers. Both frameworks rotate halves,
so the rows of q and k keep their order within a head, except for GLM (``Architecture.paired``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from neox_bridge.architectures.base import (
    About,
    Architecture,
    ModelConfig,
    Presence,
    Refusal,
    Weight,
    refusals,
)
from neox_bridge.architectures.heads import head_config, refuse_tied
from neox_bridge.architectures.hf_config import (
    hf_fields,
    hf_settings,
    refuse_hf_common,
    stored_biases,
    whole_number,
)
from neox_bridge.architectures.llama_weights import LAYER, QKV, UP, Biases, Norm, weights
from neox_bridge.architectures.neox_config import (
    SIZE_KEYS,
    Keys,
    attention_kinds,
    neox_fields,
    number,
    read_keys,
    refuse_common,
    refuse_era,
)
from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.frameworks.detectors import has_gated_mlp
from neox_bridge.tensors.geometry import Split

# by the name in Hugging Face: the gated activation of GPT-NeoX, and those of `mlp_type: llama`
# (activations.py of both; Gated_Activation of megatron/model/transformer.py multiplies as LlamaMLP)
ACTIVATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "silu": ("swiglu", ("silu", "swish")),
    "gelu": ("geglu", ("gelu",)),
    "relu": ("reglu", ("relu",)),
    "sigmoid": ("glu", ()),
    "linear": ("bilinear", ()),
}

# the names of a plain MLP before neox-mlp-names
OLD_MLP = {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}

_DROPOUT: Keys = (("attention_dropout", float, "attention_dropout", 0.0, "attention_dropout", 0.0),)
_EPSILON: Mapping[Norm, Keys] = {
    "rmsnorm": (("norm_eps", float, "rms_norm_eps", 1e-6, "rms_norm_epsilon", 1e-8),),
    "layernorm": (("norm_eps", float, "layer_norm_eps", 1e-5, "layernorm_epsilon", 1e-5),),
    # OlmoLayerNorm has no setting: it always adds 1e-5
    "non_parametric_layernorm": (("norm_eps", float, "", 1e-5, "layernorm_epsilon", 1e-5),),
}
# keys that have another meaning, or are refused, in trees of another era
ERA_KEYS = frozenset(
    """activation mlp_type intermediate_size mlp_multiple_of expansion_factor use_bias_in_mlp
    rmsnorm_fusion bias_gelu_fusion""".split()
)
MODEL_KEYS = ERA_KEYS | frozenset(
    """hidden_size norm pos_emb rotary_pct rotary_emb_base no_weight_tying gpt_j_residual
    gpt_j_tied num_kv_heads use_bias_in_attn_linear use_bias_in_norms hidden_dropout
    sliding_window_width layernorm_epsilon""".split()
)
MODEL_KEYS |= {key for *_, key, _ in (*SIZE_KEYS, *_DROPOUT, *_EPSILON["rmsnorm"])}


@dataclass(frozen=True, slots=True)
class Family:
    """How a relative differs from Llama.

    Attributes:
        norm: The name of its norms in GPT-NeoX.
        ids: The defaults of bos_token_id and eos_token_id.
        head_dim: Whether config.json has the size of a head.
        rotary_pct: The default of partial_rotary_factor; None if whole heads are rotated.
        biases: Which biases of attention and MLP the class of transformers can have.
        window: Whether it can have a sliding window.
        max_positions: The default of max_position_embeddings.
        defaults: Other defaults of config.json that differ from those of Llama.
        dropout: The key of config.json for GPT-NeoX's hidden_dropout; "" if there is none.
        joined: See ``Architecture``.
        paired: Whether neighboring pairs of a head's dimensions are rotated; see ``Architecture``.
        bias_key: The key of config.json for the biases of the attention, and its default.
        write: Returns more keys of config.json.
        refuse: Returns more of what GPT-NeoX does not support.
        refuse_neox: Returns more of what transformers does not support.
    """

    name: str
    hf_class: str
    about: About
    norm: Norm = "rmsnorm"
    ids: tuple[int | None, int | None] = (1, 2)
    head_dim: bool = True
    rotary_pct: float | None = None
    biases: Biases = "none"
    window: bool = False
    max_positions: int = 2048
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dropout: str = ""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    paired: bool = False
    bias_key: tuple[str, bool] = ("attention_bias", False)
    write: Callable[[ModelConfig], dict[str, Any]] = lambda _config: {}
    refuse: Callable[[Mapping[str, Any]], list[Refusal]] = lambda _raw: []
    refuse_neox: Callable[[Mapping[str, Any]], list[Refusal]] = lambda _raw: []

    @property
    def keys(self) -> Keys:
        keys = (*SIZE_KEYS, *_EPSILON[self.norm], *_DROPOUT)
        if not self.dropout:
            return keys
        return (*keys, ("hidden_dropout", float, self.dropout, 0.0, "hidden_dropout", 0.0))


def kv_heads_of(raw: Mapping[str, Any], key: str, heads: int) -> int | None:
    count = number(key, raw.get(key) or heads, int)
    return None if count == heads else count


def rope_base(raw: Mapping[str, Any]) -> float:
    """The base of RoPE. ``rope_parameters`` has priority over the other spelling."""
    rope = raw.get("rope_parameters") or {}
    return number("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0)), float)


def rotary_share(raw: Mapping[str, Any], default: float) -> float:
    """The share of a head that is rotated. ``rope_parameters`` has priority here too."""
    rope, key = raw.get("rope_parameters") or {}, "partial_rotary_factor"
    return number(key, rope.get(key, raw.get(key, default)), float)


def _read_hf(
    family: Family, raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence
) -> ModelConfig:
    keys = read_keys(family.keys, {"max_position_embeddings": family.max_positions, **raw}, hf=True)
    window = raw.get("sliding_window") if family.window else None
    first = LAYER.format(i=0)
    act = str(raw.get("hidden_act") or "silu")
    return ModelConfig(
        **keys,
        **hf_fields(raw, dims, presence, family.ids),
        rotary_pct=1.0 if family.rotary_pct is None else rotary_share(raw, family.rotary_pct),
        rotary_base=rope_base(raw),
        activation="silu" if act == "swish" else act,
        parallel_residual=False,
        tied_norms=False,
        attention_bias=presence.has(f"{first}self_attn.q_proj.bias"),
        mlp_bias=presence.has(f"{first}mlp.up_proj.bias"),
        norm_bias=family.norm == "layernorm",
        kv_heads=kv_heads_of(raw, "num_key_value_heads", keys["heads"]),
        window=None if window is None else number("sliding_window", window, int),
    )


def _write_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    base = whole_number(config.rotary_base)
    share = {} if family.rotary_pct is None else {"partial_rotary_factor": config.rotary_pct}
    return {
        **head_config(family.hf_class, config),
        **hf_settings(family.keys, config),
        "model_type": family.name,
        "num_key_value_heads": config.key_value_heads,
        **({"head_dim": config.hidden // config.heads} if family.head_dim else {}),
        "hidden_act": config.activation,
        "initializer_range": config.initializer_range,
        # both spellings, because transformers 4 knows only the first and 5 writes only the second
        "rope_theta": base,
        **share,
        "rope_parameters": {"rope_type": "default", "rope_theta": base, **share},
        **family.write(config),
    }


def _read_neox(
    family: Family, raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence
) -> ModelConfig:
    keys = read_keys(family.keys, raw, hf=False)
    kind = str(raw.get("activation") or "gelu")
    activation = next((k for k, (new, old) in ACTIVATIONS.items() if kind in (new, *old)), kind)
    dropout = number("hidden_dropout", raw.get("hidden_dropout") or 0.0, float)
    return ModelConfig(
        **{**keys, "hidden_dropout": dropout},
        **neox_fields(raw, dims, presence),
        activation=activation,
        parallel_residual=bool(raw.get("gpt_j_residual", False)),
        tied_norms=False,
        attention_bias=presence.has(f"{QKV}.bias"),
        mlp_bias=presence.has(f"{UP}.bias"),
        norm_bias=family.norm == "layernorm",
        bos_token_id=family.ids[0],
        eos_token_id=family.ids[1],
        kv_heads=kv_heads_of(raw, "num_kv_heads", keys["heads"]),
    )


def gated_setting(width: int) -> int:
    """The intermediate_size that gives a width with ``mlp_multiple_of: 1``.

    Source: megatron/model/transformer.py, ParallelMLP.
    """
    return 3 * width


def _write_neox(family: Family, config: ModelConfig, old: bool) -> dict[str, Any]:
    new_word, old_words = ACTIVATIONS.get(
        config.activation, (config.activation, (config.activation,))
    )
    written: dict[str, Any] = {
        "hidden_size": config.hidden,
        **{key: getattr(config, name) for name, _, _, _, key, _ in family.keys},
        "norm": family.norm,
        "pos_emb": "rotary",
        "rotary_pct": 1 if family.rotary_pct is None else config.rotary_pct,
        "rotary_emb_base": int(config.rotary_base),
        "gpt_j_residual": config.parallel_residual,
        "no_weight_tying": not config.tied_embeddings,
        "use_bias_in_attn_linear": config.attention_bias,
        "bias_gelu_fusion": False,
    }
    if config.window is not None:
        written["sliding_window_width"] = config.window - 1
    if config.grouped_query:
        written["num_kv_heads"] = config.key_value_heads
    if old and not old_words:
        raise Refused(
            f"activation: GPT-NeoX before 2024-09 has no gated MLP with {config.activation}. Use "
            "`era=today`."
        )
    if old:
        return written | {
            "mlp_type": "llama",
            "activation": old_words[0],
            "intermediate_size": config.dims["ffn"],
        }
    return written | {
        "activation": new_word,
        "intermediate_size": gated_setting(config.dims["ffn"]),
        "use_bias_in_mlp": config.mlp_bias,
    }


def refuse_heads(raw: Mapping[str, Any], name: str, rotary_pct: float | None) -> list[Refusal]:
    """Refuse heads of another size, and partly rotated ones of a family that has none.

    name: the family. rotary_pct: see ``Family``.
    """
    reasons: list[Refusal] = []
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if raw.get("head_dim") and hidden and heads and raw["head_dim"] * heads != hidden:
        reasons.append(
            Refusal(
                "head_dim",
                f"in GPT-NeoX a head has hidden_size / num_attention_heads = {hidden / heads:g} "
                f"dimensions, but here it has {raw['head_dim']}",
            )
        )
    share = rotary_share(raw, 1.0)
    if rotary_pct is None and share != 1.0:
        reasons.append(
            Refusal(
                "partial_rotary_factor",
                f"{name} in transformers rotates whole heads, but this config says {share}",
                "if the model rotates whole heads, set it to 1.0",
            )
        )
    return reasons


def _refuse_hf_source(family: Family, raw: Mapping[str, Any]) -> list[Refusal]:
    reasons = refuse_hf_common(
        raw, rope_base(raw), "rope_theta", ("silu", "swish", *list(ACTIVATIONS)[1:])
    )
    return reasons + refuse_heads(raw, family.name, family.rotary_pct) + family.refuse(raw)


def _refuse_neox_source(family: Family, raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse what GPT-NeoX computes and no Llama of transformers does (megatron/model/)."""
    kind = raw.get("activation") or "gelu"
    llama = raw.get("mlp_type") == "llama"
    words = {w for new, old in ACTIVATIONS.values() for w in (old if llama else (new,))}
    kinds = attention_kinds(raw) - {"global", "flash"}
    name = family.name
    checks: tuple[tuple[str, bool, str], ...] = (
        ("pos_emb", raw.get("pos_emb") != "rotary", f"{name} supports only rotary positions"),
        (
            "rotary_pct",
            family.rotary_pct is None
            and number("rotary_pct", raw.get("rotary_pct", 1.0), float) != 1.0,
            f"{name} rotates whole heads, but this model rotates only {raw.get('rotary_pct')} of "
            "each",
        ),
        ("activation", kind not in words, f"{name} does not support gated {kind!r}"),
        (
            "bias_gelu_fusion",
            bool(raw.get("bias_gelu_fusion")) and llama and kind == "gelu",
            "the fused gelu needs a bias that this MLP does not have",
        ),
        (
            "gpt_j_residual",
            bool(raw.get("gpt_j_residual")),
            f"the blocks of {name} are sequential, with the attention first",
        ),
        (
            "attention_config",
            bool(kinds),
            f"{name} supports only global attention, but this model uses {sorted(kinds)}",
        ),
    )
    reasons = refuse_common(raw, family.window) + refuse_tied(raw)
    return reasons + refusals(checks, neox_only=True) + family.refuse_neox(raw)


def _matches_neox(family: Family, raw: Mapping[str, Any]) -> bool:
    """Whether a yml fits the family by its norm, gated MLP, window and biases."""
    if raw.get("sliding_window_width") is not None and not family.window:
        return False
    biases = raw.get("use_bias_in_attn_linear", True) is not False
    if family.biases in ("qkv", "none") and biases != (family.biases == "qkv"):
        return False
    is_gated = has_gated_mlp(raw)
    return is_gated and raw.get("norm") == family.norm


def _findings_hf_source(
    family: Family, raw: Mapping[str, Any], config: ModelConfig
) -> list[Finding]:
    if family.biases in ("qkv", "none"):
        return []
    key, default = family.bias_key
    biases = {key: (default, config.attention_bias)}
    if family.biases == "optional":
        biases["mlp_bias"] = (False, config.mlp_bias)
    return stored_biases(raw, biases)


def _complete(family: Family, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**family.defaults, **raw} if raw.get("model_type") == family.name else raw


def architecture(family: Family) -> Architecture:
    """The architecture of a family: its table of weights, and its config in both directions."""
    table = weights(family.norm, family.biases)
    return Architecture(
        name=family.name,
        about=family.about,
        hf_class=family.hf_class,
        prefix="model.",
        weights=table,
        dropped={
            f"{LAYER}self_attn.rotary_emb.inv_freq": "not learned: computed from rope_theta",
            "model.rotary_emb.inv_freq": "not learned: computed from rope_theta",
            "model.rotary_emb.original_inv_freq": "not learned: computed from rope_theta",
        },
        aliases={},
        read_hf=partial(_read_hf, family),
        write_hf=partial(_write_hf, family),
        read_neox=partial(_read_neox, family),
        write_neox=partial(_write_neox, family),
        refuse_hf_source=partial(_refuse_hf_source, family),
        refuse_neox_source=partial(_refuse_neox_source, family),
        matches_neox=partial(_matches_neox, family),
        findings_hf_source=partial(_findings_hf_source, family),
        model_keys=MODEL_KEYS,
        era_keys=ERA_KEYS,
        refuse_shape=lambda _tp, era: refuse_era({"norm": {family.norm}}, era),
        gated=True,
        norm=family.norm,
        complete=partial(_complete, family),
        joined=family.joined,
        paired=frozenset(w.hf for w in table if family.paired and w.part in ("q", "k")),
    )


def with_one_matrix(family: Architecture) -> Architecture:
    """A relative of Llama whose gated MLP has the names and biases of ParallelMLP before 2024-09.

    In such trees it is geglu without mlp_type: llama, twice as wide as the model.
    """

    def weight(row: Weight) -> Weight:
        module, _, leaf = row.neox.rpartition(".")
        if module not in OLD_MLP:
            return row
        split: Split = "fused" if row.split == "gated" else row.split
        return replace(row, split=split, old=f"{OLD_MLP[module]}.{leaf}")

    def write_neox(config: ModelConfig, old: bool) -> dict[str, Any]:
        written = family.write_neox(config, old)
        if not old:
            return written
        kept = {k: v for k, v in written.items() if k not in ("mlp_type", "intermediate_size")}
        return kept | {"activation": "geglu"}

    weights = tuple(map(weight, family.weights))
    return replace(family, weights=weights, write_neox=write_neox, one_matrix=True)
