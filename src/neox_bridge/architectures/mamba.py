"""Mamba: ``MambaForCausalLM``, which GPT-NeoX runs as ``attention_config: [[["mamba"], L]]``.

Sources: megatron/model/mamba/mamba.py of GPT-NeoX, models/mamba/{configuration,modeling}_mamba.py
of transformers. In GPT-NeoX, 16 states per channel, a convolution of 4 and a rank of hidden/16 are
fixed. The inner width is intermediate_size on both sides and ``ffn`` here; its default is twice the
hidden size. Both compute in_proj as [x | z], so no row is moved.
"""

from collections.abc import Mapping
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
from neox_bridge.architectures.hf_config import hf_settings, refuse_hf_common
from neox_bridge.architectures.mamba_ssm import CONV, MAMBA_SSM, STATES, dt_rank
from neox_bridge.architectures.neox_config import (
    Keys,
    attention_kinds,
    number,
    read_keys,
    refuse_common,
)
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.tensors.geometry import Split

_LAYER = "backbone.layers.{i}."
_CONV_BIAS = "mixer.conv1d.bias"


def _mixer(name: str, split: Split, *shape: str, flag: str = "") -> Weight:
    """A weight of a block with the same name on both sides."""
    return Weight("block", f"mixer.{name}", f"{_LAYER}mixer.{name}", split, shape, flag)


_WEIGHTS = (
    Weight(
        "embed",
        "word_embeddings.weight",
        "backbone.embeddings.weight",
        "vocab",
        ("vocab", "hidden"),
    ),
    Weight("block", "norm.scale", f"{_LAYER}norm.weight", "replicated", ("hidden",)),
    _mixer("A_log", "column", "ffn", "states"),
    _mixer("D", "column", "ffn"),
    _mixer("in_proj.weight", "column", "x_and_z", "hidden"),
    _mixer("conv1d.weight", "column", "ffn", "one", "conv"),
    _mixer("conv1d.bias", "column", "ffn", flag="conv_bias"),
    _mixer("x_proj.weight", "row", "dt_b_c", "ffn"),
    _mixer("dt_proj.weight", "column", "ffn", "dt"),
    _mixer("dt_proj.bias", "column", "ffn"),
    _mixer("out_proj.weight", "row", "hidden", "ffn"),
    Weight("norm", "norm.scale", "backbone.norm_f.weight", "replicated", ("hidden",)),
    Weight("head", "final_linear.weight", "lm_head.weight", "vocab", ("vocab", "hidden"), "untied"),
)
_KEYS: Keys = (
    ("layers", int, "num_hidden_layers", None, "num_layers", None),
    # Mamba has no heads, but GPT-NeoX requires a number
    ("heads", int, "num_attention_heads", 1, "num_attention_heads", None),
    # Mamba has no maximum length; the published models were trained with 2048
    ("max_positions", int, "max_position_embeddings", 2048, "max_position_embeddings", None),
    ("norm_eps", float, "layer_norm_epsilon", 1e-5, "rms_norm_epsilon", 1e-8),
)
_MODEL_KEYS = frozenset(
    """hidden_size intermediate_size expansion_factor norm pos_emb no_weight_tying attention_config
    mamba_use_bias_in_conv mamba_use_bias_in_linears""".split()
) | {key for *_, key, _ in _KEYS}


def _config(
    keys: Mapping[str, Any],
    dims: Mapping[str, int],
    dtype: str,
    *,
    tied: bool,
    conv_bias: bool,
    ids: tuple[Any, Any] = (0, 0),
) -> ModelConfig:
    """The config. Raises BridgeError if the matrices of a block contradict each other."""
    wants = {"x_and_z": 2 * dims["ffn"], "dt_b_c": dims["dt"] + 2 * dims["states"], "one": 1}
    names = {"x_and_z": "in_proj", "dt_b_c": "x_proj", "one": "conv1d"}
    for dim, want in wants.items():
        if dims[dim] != want:
            raise BridgeError(
                f"mixer.{names[dim]}.weight: a size of {want} follows from the other tensors, "
                f"but this one has {dims[dim]}. The files are damaged or belong to another model."
            )
    return ModelConfig(
        **keys,
        dims=dict(dims),
        rotary_pct=0.0,
        rotary_base=10000.0,
        activation="silu",
        parallel_residual=False,
        tied_norms=False,
        tied_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
        norm_bias=False,
        conv_bias=conv_bias,
        idle=frozenset({"heads", "max_positions"}),
        dtype=dtype,
        bos_token_id=ids[0],
        eos_token_id=ids[1],
    )


def _complete(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tie the embeddings by default, as transformers does."""
    tied = {"tie_word_embeddings": True} if raw.get("model_type") == "mamba" else {}
    return {**tied, **raw}


def _read_hf(raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence) -> ModelConfig:
    hidden = dims["hidden"]
    fixed = {"state_size": ("states", STATES), "conv_kernel": ("conv", CONV)}
    fixed["time_step_rank"] = ("dt", dt_rank(hidden))
    for key, (dim, default) in fixed.items():
        value = raw.get(key, default)
        value = default if value == "auto" else value
        if number(key, value, int) != dims[dim]:
            raise BridgeError(
                f"config.json says {key}: {value}, but the tensors say {dims[dim]}. Correct "
                "config.json."
            )
    return _config(
        read_keys(_KEYS, raw, hf=True),
        dims,
        presence.dtype,
        tied=bool(raw.get("tie_word_embeddings")),
        conv_bias=presence.has(_LAYER.format(i=0) + _CONV_BIAS),
        ids=(raw.get("bos_token_id", 0), raw.get("eos_token_id", 0)),
    )


def _write_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_settings(_KEYS, config),
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "expand": config.dims["ffn"] // config.hidden,
        "state_size": config.dims["states"],
        "conv_kernel": config.dims["conv"],
        "time_step_rank": config.dims["dt"],
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": config.conv_bias,
        # GPT-NeoX adds in the dtype of the parameters (ParallelMambaResidualLayer.forward)
        "residual_in_fp32": False,
    }


def _read_neox(raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence) -> ModelConfig:
    return _config(
        read_keys(_KEYS, raw, hf=False),
        dims,
        presence.dtype,
        tied=not raw.get("no_weight_tying", False),
        conv_bias=presence.has(_CONV_BIAS),
    )


def _write_neox(config: ModelConfig, _old: bool) -> dict[str, Any]:
    written: dict[str, Any] = {
        "hidden_size": config.hidden,
        **{key: getattr(config, name) for name, _, _, _, key, _ in _KEYS},
        "attention_config": [[["mamba"], config.layers]],
        "norm": "rmsnorm",
        "pos_emb": "none",
        "no_weight_tying": not config.tied_embeddings,
        "mamba_use_bias_in_conv": config.conv_bias,
    }
    if config.dims["ffn"] != 2 * config.hidden:
        written["intermediate_size"] = config.dims["ffn"]
    return written


def _refuse_hf_source(raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse other values of what is fixed in ParallelMambaBlock of GPT-NeoX."""
    common = refuse_hf_common(raw, 10000.0, "", ("silu", "swish"))
    fixed: dict[str, Any] = {"state_size": STATES, "conv_kernel": CONV, "use_bias": False}
    if raw.get("hidden_size") and raw.get("time_step_rank", "auto") != "auto":
        fixed["time_step_rank"] = dt_rank(number("hidden_size", raw["hidden_size"], int))
    checks = [
        (
            key,
            raw.get(key, want) != want,
            f"Mamba in GPT-NeoX supports only {want}, but this model has {raw.get(key)}",
        )
        for key, want in fixed.items()
    ]
    layernorm = "this Mamba uses layernorm, but transformers supports only rmsnorm"
    return common + refusals([("rms_norm", raw.get("rms_norm") is False, layernorm), *checks])


def _refuse_neox_source(raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse what GPT-NeoX computes in or around Mamba blocks and transformers does not."""
    hidden = number("hidden_size", raw.get("hidden_size") or 1, int)
    inner = number("intermediate_size", raw.get("intermediate_size") or 2 * hidden, int)
    positions, norm = raw.get("pos_emb") or "learned", raw.get("norm") or "layernorm"
    checks: tuple[tuple[str, bool, str], ...] = (
        (
            "pos_emb",
            positions in ("learned", "sinusoidal"),
            "mamba in transformers does not support position embeddings, but this model uses "
            f"{positions!r}",
        ),
        (
            "norm",
            norm != "rmsnorm",
            f"mamba in transformers supports only rmsnorm, but this model uses {norm!r}",
        ),
        (
            "mamba_use_bias_in_linears",
            bool(raw.get("mamba_use_bias_in_linears")),
            "it gives x_proj a bias, which mamba in transformers does not support",
        ),
        (
            "intermediate_size",
            inner % hidden != 0,
            f"mamba in transformers supports only multiples of the hidden size {hidden}, but "
            f"this is {inner}",
        ),
        (
            "train_impl",
            raw.get("train_impl") == "rm",
            "mamba in transformers has no class with a reward head",
        ),
    )
    return refuse_common(raw) + refusals(checks, neox_only=True)


def _refuse_shape(tp: int, era: str) -> list[Refusal]:
    """Refuse several ranks, because x_proj is a RowParallelLinear with parallel_output=True.

    Its partial sums are never added, so each rank continues with its own dt, B and C.
    """
    summed = (
        f"on {tp} tensor-parallel ranks, Mamba in GPT-NeoX does not sum x_proj over the ranks, "
        "so it computes a model that does not exist on one rank"
    )
    unseen = f"this Mamba was tested only with today's GPT-NeoX, not with {era}"
    one_rank = "use one tensor-parallel rank (`tp=1`)"
    return [
        *refusals([("model_parallel_size", tp > 1, summed)], way_out=one_rank),
        *refusals([("attention_config", era != "today", unseen)], way_out="use `era=today`"),
    ]


def _findings(raw: Mapping[str, Any], config: ModelConfig) -> list[Finding]:
    if config.dtype not in ("float16", "bfloat16") or not raw.get("residual_in_fp32", True):
        return []
    return [
        Finding(
            "residual-dtype",
            "warning",
            "config.json sets residual_in_fp32: true, but GPT-NeoX adds residuals in "
            f"{config.dtype}",
            "if that matters, convert with `dtype=fp32`",
        )
    ]


ARCHITECTURE = Architecture(
    name="mamba",
    about=About(
        "Mamba (not Mamba 2)",
        "fixture, random, GPT-NeoX",
        "one tensor-parallel rank and today's GPT-NeoX only; 16 states, a convolution of 4; "
        "the form of mamba_ssm is written too",
    ),
    hf_class="MambaForCausalLM",
    prefix="backbone.",
    weights=_WEIGHTS,
    dropped={},
    aliases={its_name: name for name, its_name in MAMBA_SSM.names.items()},
    read_hf=_read_hf,
    write_hf=_write_hf,
    read_neox=_read_neox,
    write_neox=_write_neox,
    refuse_hf_source=_refuse_hf_source,
    refuse_neox_source=_refuse_neox_source,
    matches_neox=lambda raw: attention_kinds(raw) == {"mamba"},
    model_keys=_MODEL_KEYS,
    findings_to_neox=_findings,
    complete=_complete,
    refuse_shape=_refuse_shape,
    norm="rmsnorm",
    forms=(MAMBA_SSM,),
)
