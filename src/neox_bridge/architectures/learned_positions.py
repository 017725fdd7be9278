"""The common parts of families with learned positions, LayerNorm and a plain MLP with biases.

Sources: megatron/model/word_embeddings.py (Embedding), transformer.py (ParallelSelfAttention,
ParallelMLP) and activations.py of GPT-NeoX; models/{gpt2,opt}/ of transformers. GPT-NeoX stores the
positions in the layer of the embeddings, whole on every rank and without padding, in all layouts
and eras.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from neox_bridge.architectures.base import (
    About,
    Architecture,
    LayerKind,
    ModelConfig,
    Presence,
    Refusal,
    Weight,
    refusals,
)
from neox_bridge.architectures.gpt_neox import ACTIVATIONS, activation_named, refuse_plain
from neox_bridge.architectures.gpt_neox import ARCHITECTURE as GPT_NEOX
from neox_bridge.architectures.heads import head_config
from neox_bridge.architectures.hf_config import hf_fields, hf_settings, refuse_hf_common
from neox_bridge.architectures.llama_like import kv_heads_of
from neox_bridge.architectures.neox_config import Keys, read_keys
from neox_bridge.findings import Finding
from neox_bridge.tensors.fused import Part
from neox_bridge.tensors.geometry import Split

POSITION_EMBEDDINGS = "position_embeddings.weight"
_H = ("hidden",)
_PARTS: tuple[tuple[Part, str], ...] = (("q", "q"), ("k", "kv"), ("v", "kv"))
_NO_ROTATION = ("rotary_pct", "rotary_emb_base")
_IDLE = frozenset({"rotary_pct", "rotary_base"})


def positions(hf: str, first_row: int = 0) -> Weight:
    """The row of the learned positions. hf: their name in Hugging Face files."""
    shape = ("positions", "hidden")
    return Weight("embed", POSITION_EMBEDDINGS, hf, "replicated", shape, first_row=first_row)


def norm(place: LayerKind, neox: str, hf: str) -> tuple[Weight, Weight]:
    """The rows of a LayerNorm."""
    return (
        Weight(place, f"{neox}.weight", f"{hf}.weight", "replicated", _H),
        Weight(place, f"{neox}.bias", f"{hf}.bias", "replicated", _H, "norm_bias"),
    )


def block(
    norms: tuple[str, str], qkv: str, dense: str, mlp: tuple[str, str], *, transposed: bool = False
) -> tuple[Weight, ...]:
    """The rows of a block, from the names of its modules in Hugging Face files.

    qkv: with ``{part}`` and ``{leaf}``. transposed: whether its matrices are.
    """
    weights = [*norm("block", "input_layernorm", norms[0])]
    for leaf, shape, flag in (("weight", ("hidden",), ""), ("bias", (), "attention_bias")):
        weights += [
            Weight(
                "block",
                f"attention.query_key_value.{leaf}",
                qkv.replace("{part}", part).replace("{leaf}", leaf),
                "fused",
                (rows, *shape),
                flag,
                part,
                transposed=transposed and leaf == "weight",
            )
            for part, rows in _PARTS
        ]
    up, down = mlp
    modules: tuple[tuple[str, str, Split, tuple[str, str], str, str], ...] = (
        ("attention.dense", dense, "row", ("hidden", "q"), "attention_bias", ""),
        ("mlp.linear1", up, "column", ("ffn", "hidden"), "mlp_bias", "mlp.dense_h_to_4h"),
        ("mlp.linear2", down, "row", ("hidden", "ffn"), "mlp_bias", "mlp.dense_4h_to_h"),
    )
    for neox, hf, split, sizes, flag, old in modules:
        weight, bias = (f"{old}.weight", f"{old}.bias") if old else ("", "")
        of_bias: Split = "row_bias" if split == "row" else split
        weights += [
            Weight(
                "block",
                f"{neox}.weight",
                f"{hf}.weight",
                split,
                sizes,
                old=weight,
                transposed=transposed,
            ),
            Weight("block", f"{neox}.bias", f"{hf}.bias", of_bias, sizes[:1], flag, old=bias),
        ]
        if neox == "attention.dense":
            weights += norm("block", "post_attention_layernorm", norms[1])
    return tuple(weights)


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from the others.

    Attributes:
        weights: The table of weights.
        keys: See ``neox_config.Keys``, with the defaults of the class of transformers.
        hf_keys: See ``Architecture``.
        ids: The defaults of bos_token_id and eos_token_id.
        activation: The default of the activation.
        dropped: See ``Architecture``.
        joined: See ``Architecture``.
        hf_heads: See ``Architecture``.
        first_row: See ``Weight``, of the positions.
        write: Returns more keys of config.json.
        refuse: Returns more of what GPT-NeoX does not support.
        refuse_neox: Returns more of what transformers does not support.
        find: Returns where GPT-NeoX trains another model than config.json says.
    """

    name: str
    hf_class: str
    about: About
    prefix: str
    weights: tuple[Weight, ...]
    keys: Keys
    hf_keys: Mapping[str, str]
    ids: tuple[int | None, int | None]
    activation: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hf_heads: Callable[[Mapping[str, Any]], tuple[int, int]] = GPT_NEOX.hf_heads
    first_row: int = 0
    write: Callable[[ModelConfig], dict[str, Any]] = lambda _config: {}
    refuse: Callable[[Mapping[str, Any]], list[Refusal]] = lambda _raw: []
    refuse_neox: Callable[[Mapping[str, Any]], list[Refusal]] = lambda _raw: []
    find: Callable[[Mapping[str, Any]], list[Finding]] = lambda _raw: []

    @property
    def act_key(self) -> str:
        return self.hf_keys.get("hidden_act", "hidden_act")


def _complete(family: Family, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tie the embeddings by default, and give the usual keys the names that the family has.

    transformers accepts both names (attribute_map). If they contradict each other, both are kept.
    """
    if raw.get("model_type") != family.name:
        return raw
    named = dict(raw)
    for usual, key in family.hf_keys.items():
        if usual in raw and raw.get(key, raw[usual]) == raw[usual]:
            named[key] = named.pop(usual)
    return {"tie_word_embeddings": True, **named}


def _read_hf(
    family: Family, raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence
) -> ModelConfig:
    fields = read_keys(family.keys, raw, hf=True)
    return ModelConfig(
        **{**fields, "max_positions": dims["positions"] - family.first_row},
        **hf_fields(raw, dims, presence, family.ids),
        rotary_pct=0.0,
        rotary_base=10000.0,
        activation=activation_named(raw.get(family.act_key) or family.activation),
        parallel_residual=False,
        tied_norms=False,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        idle=_IDLE,
    )


def _write_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    names = ACTIVATIONS.get(config.activation, ((config.activation,), (), False))[0]
    written = {
        **head_config(family.hf_class, config),
        **hf_settings(family.keys, config, family.hf_keys),
        "model_type": family.name,
        family.act_key: family.activation if family.activation in names else names[0],
        "initializer_range": config.initializer_range,
    }
    return {**written, **family.write(config)}


def _read_neox(
    family: Family, raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence
) -> ModelConfig:
    config = GPT_NEOX.read_neox(raw, dims, presence)
    bos, eos = (n if n is not None and n < dims["vocab"] else None for n in family.ids)
    return replace(
        config,
        max_positions=dims["positions"] - family.first_row,
        rotary_pct=0.0,
        rotary_base=10000.0,
        bos_token_id=bos,
        eos_token_id=eos,
        kv_heads=kv_heads_of(raw, "num_kv_heads", config.heads),
        idle=_IDLE,
    )


def _write_neox(config: ModelConfig, old: bool) -> dict[str, Any]:
    written = GPT_NEOX.write_neox(config, old)
    written |= {"pos_emb": "learned", "max_position_embeddings": config.dims["positions"]}
    return {key: value for key, value in written.items() if key not in _NO_ROTATION}


def _refuse_hf_source(family: Family, raw: Mapping[str, Any]) -> list[Refusal]:
    names = [name for hf, _, _ in ACTIVATIONS.values() for name in hf]
    names = [family.activation, *(name for name in names if name != family.activation)]
    return refuse_hf_common(raw, 1.0, "", names, family.act_key) + family.refuse(raw)


def _refuse_neox_source(family: Family, raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse what GPT-NeoX computes and the class of transformers does not."""
    offset = raw.get("opt_pos_emb_offset") or 0
    checks = (
        (
            "num_kv_heads",
            raw.get("num_kv_heads") not in (None, raw.get("num_attention_heads")),
            f"{family.name} in transformers does not support grouped-query attention",
        ),
        (
            "gpt_j_residual",
            bool(raw.get("gpt_j_residual")),
            f"{family.name} in transformers has learned positions (pos_emb: learned) only with "
            "sequential blocks, with the attention first",
        ),
        (
            "opt_pos_emb_offset",
            offset != 0,
            f"{family.name} in transformers uses the positions from the first row on, but this "
            f"model starts at row {offset}",
        ),
    )
    reasons = refuse_plain(raw, family.name, positions="learned")
    return reasons + refusals(checks, neox_only=True) + family.refuse_neox(raw)


def _matches_neox(raw: Mapping[str, Any]) -> bool:
    """Whether a yml describes learned positions, LayerNorm and a plain MLP, one after the other."""
    learned = (raw.get("pos_emb") or "learned") == "learned"
    sequential = not raw.get("gpt_j_residual")
    return learned and sequential and GPT_NEOX.matches_neox(raw)


def architecture(family: Family) -> Architecture:
    """The architecture of a family: its table of weights, and its config in both directions."""
    return Architecture(
        name=family.name,
        about=family.about,
        hf_class=family.hf_class,
        prefix=family.prefix,
        weights=family.weights,
        dropped=family.dropped,
        aliases={},
        read_hf=partial(_read_hf, family),
        write_hf=partial(_write_hf, family),
        read_neox=partial(_read_neox, family),
        write_neox=_write_neox,
        refuse_hf_source=partial(_refuse_hf_source, family),
        refuse_neox_source=partial(_refuse_neox_source, family),
        matches_neox=_matches_neox,
        findings_to_neox=lambda raw, _config: family.find(raw),
        complete=partial(_complete, family),
        model_keys=GPT_NEOX.model_keys | {"opt_pos_emb_offset"},
        always=("attention_bias", "mlp_bias", "norm_bias"),
        hf_keys=family.hf_keys,
        hf_heads=family.hf_heads,
        joined=family.joined,
    )
