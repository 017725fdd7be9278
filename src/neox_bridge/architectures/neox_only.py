"""Any other model that GPT-NeoX trains: the rules by which it splits its layers over ranks.

The rules are enough to write a run in another layout. transformers has no class for such a model.
Sources: megatron/mpu/layers.py (column, row and vocabulary parallel layers) and megatron/model/
(transformer.py, word_embeddings.py, norms.py, positional_embeddings.py, gmlp.py, mamba/mamba.py,
rwkv/v6/rwkv.py, moe.py, moe_mlp.py) from v1.0 to 2026-05.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from neox_bridge.architectures.base import (
    INV_FREQ,
    About,
    Architecture,
    LayerKind,
    ModelConfig,
    Presence,
    Refusal,
    Weight,
    refusals,
)
from neox_bridge.architectures.gpt2 import ARCHITECTURE as GPT2
from neox_bridge.architectures.gpt_neox import ARCHITECTURE as GPT_NEOX
from neox_bridge.architectures.heads import REWARD, RM_LINEAR
from neox_bridge.architectures.llama import ARCHITECTURE as LLAMA
from neox_bridge.architectures.llama_like import ACTIVATIONS, ERA_KEYS, OLD_MLP, gated_setting
from neox_bridge.architectures.mamba import ARCHITECTURE as MAMBA
from neox_bridge.architectures.neox_config import (
    SIZE_KEYS,
    attention_kinds,
    neox_fields,
    number,
    read_keys,
    refuse_era,
)
from neox_bridge.architectures.starcoder2 import ARCHITECTURE as STARCODER2
from neox_bridge.errors import Refused
from neox_bridge.frameworks.detectors import GATED, has_gated_mlp
from neox_bridge.tensors.fused import Part
from neox_bridge.tensors.geometry import Split
from neox_bridge.wording import plural

NAME = "neox_only"


@dataclass(frozen=True, slots=True)
class _Rule:
    """How ranks share the tensors whose names match.

    Attributes:
        pattern: A regular expression for GPT-NeoX's name in its layer.
        split: See ``Weight``.
        fixed: Why the tensor depends on the number of ranks; "" if it does not.
        trained: False for buffers, which have no optimizer states.
    """

    pattern: str
    split: Split
    fixed: str = ""
    trained: bool = True


# GPT2ModelPipe.init_specs creates one ParallelRelativePositionBias for all layers of a stage
_SHARED = "attention.rpe.weight"
# a module that only one kind of block has, and the name of that kind in attention_config
_KINDS = {"mixer": "mamba", "att": "rwkv", "sgu": "gmlp"}
_SAME_BLOCK = {"mamba": "mamba", "rwkv": "rwkv", "gmlp": "gmlp", "amlp": "gmlp"}
_NORM = r"(weight|bias|scale|offset|g)"
_MAMBA = "Mamba in GPT-NeoX does not sum x_proj over the ranks"
_GMLP = "the gating unit of gMLP normalizes the channels of one rank"
_RULES: Mapping[LayerKind, tuple[_Rule, ...]] = {
    "embed": (
        _Rule(r"word_embeddings\.weight", "vocab"),
        _Rule(r"(position|tokentype)_embeddings\.weight", "replicated"),
        _Rule(r"position_embeddings\.inv_freq", "replicated", trained=False),
    ),
    "block": (
        _Rule(rf"(input_layernorm|post_attention_layernorm|norm|ln1|ln2)\.{_NORM}", "replicated"),
        # ParallelSelfAttention: the norm has the shape [heads of a rank, head_dim]
        _Rule(r"attention\.qk_layernorm\.(weight|bias|scale)", "column"),
        _Rule(
            r"attention\.qk_layernorm\.g",
            "column",
            "each rank trains a scale of its own for q and k (norm: scalenorm)",
        ),
        _Rule(r"attention\.query_key_value\.(weight|bias)", "column"),
        _Rule(r"attention\.rpe\.weight", "row"),
        _Rule(r"attention\.alibi_embed\.slopes", "column", trained=False),
        _Rule(r"attention\.dense\.weight", "row"),
        _Rule(r"attention\.dense\.bias", "row_bias"),
        _Rule(r"mlp\.(linear1|dense_h_to_4h)\.(weight|bias)", "column"),
        _Rule(r"mlp\.(w1|w3)\.weight", "column"),
        _Rule(r"mlp\.(linear2|dense_4h_to_h|w2)\.weight", "row"),
        _Rule(r"mlp\.(linear2|dense_4h_to_h)\.bias", "row_bias"),
        # ParallelDroplessMoE: each rank has consecutive experts, concatenated along the rows
        _Rule(r"mlp\.router\.layer\.weight", "replicated"),
        _Rule(r"mlp\.experts\.mlp\.(w1|w2|w3)", "column"),
        # RWKV is not split: every rank computes all of it
        _Rule(r"(att|ffn)\.time_\w+", "replicated"),
        _Rule(r"(att|ffn)\.(receptance|key|value|output|gate)\.weight", "replicated"),
        _Rule(r"att\.ln_x\.(weight|bias)", "replicated"),
        _Rule(r"mixer\.(A_log|D|(in_proj|conv1d|dt_proj|x_proj|out_proj)\.\w+)", "column", _MAMBA),
        _Rule(r"(input_linear|output_linear|sgu\.proj|sgu\.attn\.\w+)\.\w+", "column", _GMLP),
        _Rule(rf"sgu\.norm\.{_NORM}", "column", _GMLP),
    ),
    "norm": (_Rule(rf"norm\.{_NORM}", "replicated"),),
    "head": (_Rule(r"final_linear\.weight", "vocab"), _Rule(r"rm_linear\.weight", "row")),
}
# the tensor that every model with this pos_emb has; that of rotary is optional
POSITIONS: Mapping[str, str] = {
    "learned": "position_embeddings.weight",
    "sinusoidal": "position_embeddings.inv_freq",
    "rpe": _SHARED,
    "alibi": "attention.alibi_embed.slopes",
}
_TODAYS_MLP = {old: new for new, old in OLD_MLP.items()}
# the gated activations of `mlp_type: llama` before neox-mlp-names, and their names today
_GATED_WORDS = {old: new for new, olds in ACTIVATIONS.values() for old in olds}
_OLD_WORDS = {new: olds[0] for new, olds in ACTIVATIONS.values() if olds}
# the parts of fused tensors: their names here, and the rows of q, k and v
_QKV_PARTS: tuple[tuple[Part, str, str], ...] = (
    ("q", "query", "q"),
    ("k", "key", "kv"),
    ("v", "value", "kv"),
)
# and the matrices of LLaMAParallelMLP
_MLP_PARTS: tuple[tuple[Part, str], ...] = (("up", "w3"), ("gate", "w1"))
_SIZES: Mapping[str, tuple[str, ...]] = {
    "word_embeddings.weight": ("vocab", "hidden"),
    "final_linear.weight": ("vocab", "hidden"),
    "rm_linear.weight": ("labels", "hidden"),
    "attention.query_key_value.weight": ("qkv", "hidden"),
    "attention.query_key_value.bias": ("qkv",),
    "attention.dense.weight": ("hidden", "hidden"),
    "mlp.linear1.weight": ("ffn", "hidden"),
    "mlp.linear1.bias": ("ffn",),
    "mlp.linear2.weight": ("hidden", "ffn"),
}
_NORM_EPSILON = {"rmsnorm": ("rms_norm_epsilon", 1e-8), "scalenorm": ("scalenorm_epsilon", 1e-8)}
MODEL_KEYS = (
    GPT_NEOX.model_keys
    | LLAMA.model_keys
    | MAMBA.model_keys
    | frozenset(
        """use_qk_layernorm rpe_num_buckets rpe_max_distance opt_pos_emb_offset attention_config
        scalenorm_epsilon layernorm_epsilon rms_norm_epsilon gmlp_attn_dim num_unique_layers
        param_sharing_style use_mup mup_attn_temp mup_output_temp mup_embedding_mult
        mup_rp_embedding_mult mup_width_scale moe_num_experts moe_top_k moe_expert_interval
        moe_router_type""".split()
    )
)


@dataclass(frozen=True)
class _Model:
    """The facts about such a model in its files.

    Attributes:
        raw: The merged yml.
        tensors: The names and numbers of dimensions of a rank's tensors, by GPT-NeoX layer.
        tp: The tensor-parallel ranks.
        old: Whether the MLPs have the names before neox-mlp-names.
    """

    raw: Mapping[str, Any]
    tensors: Mapping[int, Mapping[str, int]]
    layers: int
    tp: int
    old: bool

    @property
    def gated(self) -> bool:
        return has_gated_mlp(self.raw)

    @property
    def grouped_query(self) -> bool:
        heads = self.raw.get("num_attention_heads")
        return bool(self.raw.get("num_kv_heads")) and self.raw.get("num_kv_heads") != heads

    @cached_property
    def names(self) -> set[str]:
        """The names of all tensors, without their layers."""
        return {name for tensors in self.tensors.values() for name in tensors}


def neox_only(
    raw: Mapping[str, Any],
    tensors: Mapping[int, Mapping[str, int]],
    layers: int,
    tp: int,
) -> Architecture | None:
    """Build the table of weights for one model.

    None if no rule names one of its tensors, or if its blocks differ from attention_config.

    Args:
        raw: The merged yml.
        tensors: The number of dimensions of each tensor of one rank, by GPT-NeoX layer and name.
        layers: The number of blocks.
        tp: The tensor-parallel ranks of the checkpoint.
    """
    old = any(name.startswith(("mlp.dense_", "mlp.w")) for t in tensors.values() for name in t)
    model = _Model(raw, tensors, layers, tp, old)
    weights = _weights(model)
    if weights is None or not _has_configured_blocks(model):
        return None
    fixed = _fixed(model)
    shares = any(weight.neox == _SHARED for weight in weights)
    return Architecture(
        name=NAME,
        about=About("any other model of GPT-NeoX", "", "between layouts of GPT-NeoX only"),
        hf_class="",
        prefix="",
        weights=weights,
        dropped={},
        aliases={},
        read_hf=_no_hf,
        write_hf=_no_hf,
        read_neox=partial(_read_neox, model),
        write_neox=partial(_write_neox, model),
        refuse_hf_source=lambda _raw: [],
        refuse_neox_source=partial(_refuse_neox_source, model, fixed),
        matches_neox=lambda _raw: True,
        model_keys=MODEL_KEYS,
        era_keys=ERA_KEYS,
        gated=model.gated,
        norm=raw.get("norm") or "layernorm",
        refuse_shape=partial(_refuse_shape, model, fixed),
        neox_only=True,
        shared=_SHARED if shares else "",
        one_matrix=not _is_llama_mlp(model),
    )


def _no_hf(*_args: Any) -> Any:
    raise AssertionError("a checkpoint with refusals is not converted to Hugging Face")


def _rule(place: LayerKind, name: str) -> _Rule | None:
    return next((rule for rule in _RULES[place] if re.fullmatch(rule.pattern, name)), None)


def _place(model: _Model, layer: int) -> LayerKind | None:
    """The kind of a layer (megatron/model/gpt2_model.py, GPT2ModelPipe.init_specs)."""
    places: dict[int, LayerKind] = {0: "embed", model.layers + 3: "norm", model.layers + 4: "head"}
    block: LayerKind | None = "block" if 2 <= layer < model.layers + 2 else None
    return places.get(layer, block)


def _weights(model: _Model) -> tuple[Weight, ...] | None:
    blocks: dict[tuple[LayerKind, str, int], set[int]] = {}
    for layer in sorted(model.tensors):
        place = _place(model, layer)
        for name, dimensions in model.tensors[layer].items():
            if place is None:
                return None
            blocks.setdefault((place, name, dimensions), set()).add(layer - 2)
    rows: list[Weight] = []
    for (place, name, dimensions), numbers in blocks.items():
        if name == INV_FREQ:
            rows.append(Weight(place, name, f"layers.{{i}}.{name}", "derived", ("rotary",)))
            continue
        rule = _rule(place, name)
        if rule is None:
            return None
        some = frozenset(numbers) if place == "block" and len(numbers) < model.layers else None
        rows += [
            replace(weight, trained=rule.trained, blocks=some)
            for weight in _rows(model, place, name, dimensions, rule)
        ]
    # the table always has a head, even if the model has none
    heads = {row.neox for row in rows if row.place == "head"}
    spare = Weight(
        "head", "final_linear.weight", "final_linear.weight", "vocab", ("vocab", "hidden")
    )
    rows = [replace(r, flag=_head_flag(r)) if r.place == "head" else r for r in rows]
    if spare.neox not in heads:
        rows.append(replace(spare, flag="untied"))
    return tuple(rows)


def _has_configured_blocks(model: _Model) -> bool:
    """Whether the kinds of blocks are those of attention_config."""
    modules = {
        layer: {name.partition(".")[0] for name in tensors}
        for layer, tensors in model.tensors.items()
        if _place(model, layer) == "block"
    }
    blocks = {
        next((kind for module, kind in _KINDS.items() if module in names), "")
        for names in modules.values()
    }
    named = {_SAME_BLOCK.get(kind, "") for kind in attention_kinds(model.raw)} or {""}
    return blocks == named


def _head_flag(weight: Weight) -> str:
    return REWARD.flag if weight.neox == RM_LINEAR else "untied"


def _rows(
    model: _Model, place: LayerKind, name: str, dimensions: int, rule: _Rule
) -> Iterable[Weight]:
    """The rows of one tensor: one, or one for each of its parts."""
    module, _, leaf = name.rpartition(".")
    today = f"{_TODAYS_MLP[module]}.{leaf}" if module in _TODAYS_MLP else name
    old_module = OLD_MLP.get(today.rpartition(".")[0], "")
    old = f"{old_module}.{leaf}" if old_module and not _is_llama_mlp(model) else ""
    prefix = {"embed": "", "block": "layers.{i}.", "norm": "final_", "head": ""}[place]
    if module == "attention.query_key_value" and model.grouped_query:
        for part, long, rows in _QKV_PARTS:
            hf = f"{prefix}attention.{long}.{leaf}"
            yield Weight(place, name, hf, "fused", (rows, "hidden")[:dimensions], "", part)
        return
    if today.startswith("mlp.linear1.") and model.gated:
        split: Split = "gated" if _is_llama_mlp(model) else "fused"
        for part, matrix in _MLP_PARTS:
            hf = f"{prefix}mlp.{part}.{leaf}"
            spelled = f"mlp.{matrix}.{leaf}" if _is_llama_mlp(model) else old
            shape = ("ffn", "hidden")[:dimensions]
            yield Weight(place, today, hf, split, shape, "", part, spelled)
        return
    for part, matrix in _MLP_PARTS:
        if name == f"mlp.{matrix}.weight":
            hf = f"{prefix}mlp.{part}.weight"
            shape = ("ffn", "hidden")
            yield Weight(place, "mlp.linear1.weight", hf, "gated", shape, "", part, name)
            return
    if name == "mlp.w2.weight":
        today, old = "mlp.linear2.weight", name
    elif today == "mlp.linear2.weight" and _is_llama_mlp(model):
        old = "mlp.w2.weight"
    shape = _SIZES.get(today, tuple(f"{today}.{axis}" for axis in range(dimensions)))
    yield Weight(
        place, today, f"{prefix}{today}", rule.split, shape, old=old if old != today else ""
    )


def _is_llama_mlp(model: _Model) -> bool:
    """Whether its gated MLP had separate matrices before neox-mlp-names (LLaMAParallelMLP).

    The other gated MLP of that time was geglu with biases, as one matrix (ParallelMLP).
    """
    if model.raw.get("mlp_type") == "llama":
        return True
    return model.gated and not model.old and "mlp.linear1.bias" not in model.names


def _read_neox(
    model: _Model, raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence
) -> ModelConfig:
    names = model.names
    norm = raw.get("norm") or "layernorm"
    key, default = _NORM_EPSILON.get(norm, ("layernorm_epsilon", 1e-5))
    keys = read_keys(SIZE_KEYS, raw, hf=False)
    heads = keys["heads"]
    kv_heads = number("num_kv_heads", raw.get("num_kv_heads") or heads, int)
    dims = {"ffn": 4 * dims["hidden"], **dims}
    parallel = bool(raw.get("gpt_j_residual", False))
    fields = neox_fields(raw, dims, presence)
    return ModelConfig(
        **keys,
        **{**fields, "reward": RM_LINEAR in names},
        norm_eps=number(key, default if raw.get(key) is None else raw[key], float),
        activation=str(raw.get("activation") or "gelu"),
        parallel_residual=parallel,
        tied_norms=bool(raw.get("gpt_j_tied")) and parallel,
        attention_bias="attention.query_key_value.bias" in names,
        mlp_bias=any(re.fullmatch(r"mlp\.(linear1|dense_h_to_4h)\.bias", n) for n in names),
        norm_bias="input_layernorm.bias" in names,
        hidden_dropout=number("hidden_dropout", raw.get("hidden_dropout") or 0.0, float),
        attention_dropout=number("attention_dropout", raw.get("attention_dropout") or 0.0, float),
        kv_heads=None if kv_heads == heads else kv_heads,
    )


def _write_neox(model: _Model, config: ModelConfig, old: bool) -> dict[str, Any]:
    """The keys of the MLP in trees of an era; the other keys are those of the run.

    Raises Refused for a gated MLP that such trees do not have.
    """
    raw, activation = model.raw, str(model.raw.get("activation") or "gelu")
    norm = {"norm": raw.get("norm") or "layernorm"}
    own = {key: raw[key] for key in ERA_KEYS if key in raw} | norm | {"activation": activation}
    if old == model.old:
        return own
    ffn, hidden = config.dims["ffn"], config.hidden
    if not model.gated:
        written: dict[str, Any] = {
            key: own[key] for key in ("norm", "activation", "bias_gelu_fusion") if key in own
        }
        if ffn != 4 * hidden:
            written["intermediate_size"] = ffn
        return written
    if not old:
        word = _GATED_WORDS.get(activation, "") if _is_llama_mlp(model) else activation
        if word not in GATED:
            raise Refused(
                f"activation: a gated MLP with {activation} exists only in GPT-NeoX before "
                "2024-09. Use `era=neox@2024-03`."
            )
        return norm | {
            "activation": word,
            "intermediate_size": gated_setting(ffn),
            "use_bias_in_mlp": config.mlp_bias,
        }
    if config.mlp_bias and activation == "geglu" and ffn == 2 * hidden:
        return norm | {"activation": "geglu"}
    if config.mlp_bias or activation not in _OLD_WORDS:
        raise Refused(
            f"activation: GPT-NeoX before 2024-09 has no gated MLP with {activation}"
            f"{' and biases' if config.mlp_bias else ''}. Use `era=today`."
        )
    return norm | {
        "mlp_type": "llama",
        "activation": _OLD_WORDS[activation],
        "intermediate_size": ffn,
    }


def _fixed(model: _Model) -> dict[str, str]:
    """What depends on the number of ranks, by tensor or key, and why."""
    norm = model.raw.get("norm") or "layernorm"
    # apex's norms and torch's LayerNorm normalize over every dimension of their weight
    together = norm in ("layernorm", "non_parametric_layernorm") or (
        norm == "rmsnorm" and model.raw.get("rmsnorm_fusion")
    )
    has_scale = any(name.startswith("attention.qk_layernorm.") for name in model.names)
    if together and (has_scale or model.raw.get("use_qk_layernorm")):
        return {"use_qk_layernorm": f"with norm: {norm} it normalizes all heads of a rank together"}
    reasons: dict[str, str] = {}
    named = {(_place(model, n), name): None for n, names in model.tensors.items() for name in names}
    for place, name in named:
        rule = _rule(place, name) if place is not None else None
        if rule is not None and rule.fixed:
            reasons[name] = rule.fixed
    return reasons


def _missing(model: _Model, era: str) -> list[tuple[str, bool, str]]:
    """What trees before 2024-11 do not support, although they know its keys."""
    old, names = era in ("v1.0", "2024-03", "2024-09", "2024-10"), model.names
    return [
        (
            "moe_num_experts",
            old and any(name.startswith("mlp.experts.") for name in names),
            f"the mixture of experts of GPT-NeoX of {era} has other weights (#1210)",
        ),
    ]


def _refuse_shape(model: _Model, fixed: Mapping[str, str], tp: int, era: str) -> list[Refusal]:
    raw = model.raw
    words = {key: {str(raw.get(key))} for key in ("norm", "activation")}
    words["attention_config"] = attention_kinds(raw)
    reasons = refuse_era(words, era) + refusals(_missing(model, era), way_out="use `era=today`")
    experts = number("moe_num_experts", raw.get("moe_num_experts") or 1, int)
    if experts % tp and any(name.startswith("mlp.experts.") for name in model.names):
        whole = f"{experts} experts cannot be spread evenly over {tp} tensor-parallel ranks"
        reasons += refusals([("moe_num_experts", True, whole)])
    kv_heads = number("num_kv_heads", raw.get("num_kv_heads") or 0, int)
    if kv_heads % tp and tp == model.tp:  # contradictory files; targets are checked elsewhere
        reason = (
            f"GPT-NeoX cannot spread {plural(kv_heads, 'head')} over the {tp} ranks of these files"
        )
        reasons += refusals([("num_kv_heads", True, reason)], way_out="correct the yml")
    if tp != model.tp and fixed:
        name, why = next(iter(fixed.items()))
        reason = f"{why}, so on {tp} tensor-parallel ranks this is another model"
        keep = f"keep its number of ranks (`tp={model.tp}`)"
        reasons += refusals([(name, True, reason)], way_out=keep)
    return reasons


def _refuse_neox_source(
    model: _Model, fixed: Mapping[str, str], raw: Mapping[str, Any]
) -> list[Refusal]:
    """Why no class of transformers computes this model."""
    if fixed and model.tp > 1:
        name, why = next(iter(fixed.items()))
        reason = f"{why}, so this model exists on {model.tp} tensor-parallel ranks only"
        return refusals([(name, True, reason)], neox_only=True)
    learned = (raw.get("pos_emb") or "learned") == "learned"
    plain = GPT2 if learned else STARCODER2 if model.grouped_query else GPT_NEOX
    near = MAMBA if "mamba" in attention_kinds(raw) else LLAMA if model.gated else plain
    reasons = near.refuse_neox_source(raw)
    what = {
        "norm": raw.get("norm") or "layernorm",
        "activation": raw.get("activation") or "gelu",
        "pos_emb": raw.get("pos_emb") or "learned",
    }
    listed = ", ".join(f"{key}: {value}" for key, value in what.items())
    return reasons or refusals(
        [(listed, True, "no class of transformers has this combination")], neox_only=True
    )


# the parameters of the final norm (megatron/model/norms.py, fused_layer_norm.py)
_NORM_TENSORS: Mapping[str, frozenset[str]] = {
    "layernorm": frozenset({"norm.weight", "norm.bias"}),
    "te_layernorm": frozenset({"norm.weight", "norm.bias"}),
    "rmsnorm": frozenset({"norm.scale", "norm.weight"}),  # weight with rmsnorm_fusion
    "te_rmsnorm": frozenset({"norm.weight"}),
    "scalenorm": frozenset({"norm.g"}),
    "non_parametric_layernorm": frozenset(),
}
_ALL_NORM_TENSORS = frozenset({"norm.weight", "norm.bias", "norm.scale", "norm.g"})


def contradiction(raw: Mapping[str, Any], names: Collection[str]) -> tuple[str, str]:
    """The first key of the yml with which GPT-NeoX builds other tensors, and one such tensor.

    Both are "" if there is none. names: the names of the tensors in their layers.
    """
    norm = str(raw.get("norm") or "layernorm")
    norms = _NORM_TENSORS.get(norm, frozenset(names))
    if strange := sorted(_ALL_NORM_TENSORS & set(names) - norms):
        return "norm", strange[0]
    if norms and not norms & set(names):
        return "norm", min(norms)
    attention = "attention.dense.weight" in names
    parametric = norm != "non_parametric_layernorm"
    experts = number("moe_num_experts", raw.get("moe_num_experts") or 1, int) > 1
    positions = raw.get("pos_emb") or "learned"
    biased = raw.get("use_bias_in_attn_linear", True) is not False
    qk_norms = [name for name in names if name.startswith("attention.qk_layernorm.")]
    wanted = [
        *(("pos_emb", name, key == positions) for key, name in POSITIONS.items()),
        ("moe_num_experts", "mlp.router.layer.weight", experts),
    ]
    if attention:
        wanted.append(("use_bias_in_attn_linear", "attention.dense.bias", biased))
        if bool(qk_norms) != (bool(raw.get("use_qk_layernorm")) and parametric):
            return "use_qk_layernorm", "attention.qk_layernorm"
    return next(((key, name) for key, name, want in wanted if want != (name in names)), ("", ""))


def shapes_of(rank: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, int]]:
    """The number of dimensions of a rank's tensors, by layer and name."""
    return {layer: {n: len(ref.shape) for n, ref in t.items()} for layer, t in rank.items()}


def unknown_tensors(
    raw: Mapping[str, Any], tensors: Mapping[int, Mapping[str, int]], layers: int
) -> list[str]:
    """The tensors that no rule names, as "layer 3: attention.q_norm.weight"."""
    model = _Model(raw, tensors, layers, 1, False)
    lines = []
    for layer in sorted(tensors):
        place = _place(model, layer)
        for name in tensors[layer]:
            known = name == INV_FREQ or (place is not None and _rule(place, name) is not None)
            if not known:
                lines.append(f"layer {layer}: {name}")
    return lines
