"""Checks whether the GPT-NeoX trees of an era support a model, and adapts the settings of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig, Refusal, refusals
from neox_bridge.errors import Refused
from neox_bridge.findings import Dropped, Finding
from neox_bridge.frameworks.eras import FLAG, Era, known_keys, mlp_biases
from neox_bridge.frameworks.keys import neox_keys
from neox_bridge.frameworks.setting_defaults import COMPUTED_KEYS
from neox_bridge.frameworks.unknown_keys import effect_of
from neox_bridge.layouts.checkpoint import Checkpoint, refuse_all
from neox_bridge.layouts.transformer_engine import KEYS as TE_KEYS
from neox_bridge.planning.neox_files import RankLayout
from neox_bridge.planning.neox_yml import LAYOUT, is_elsewhere
from neox_bridge.planning.options import Options

# keys that are true by default, so that false changes the model
_TRUE_BY_DEFAULT = ("use_bias_in_attn_linear",)


def check_era(
    checkpoint: Checkpoint, layout: RankLayout, era: Era, options: Options
) -> list[Finding]:
    """The findings about a model in trees of an era. Raises Refused if they do not support it."""
    architecture, config = checkpoint.architecture, checkpoint.config
    mismatches = []
    ffn = config.dims["ffn"]
    if architecture.has_mlp:
        _check_mlp_biases(architecture, config, layout, era)
    if architecture.gated or config.grouped_query:
        config.fusion(layout.gqa_order)
    if architecture.gated or not architecture.has_mlp:
        pass
    elif ffn != 4 * config.hidden and ffn % 2:
        raise Refused(
            f"intermediate_size: {ffn} is odd. GPT-NeoX rounds it up to an even number "
            "(megatron/model/transformer.py), so no version can load the model."
        )
    elif era.plain_mlp_4h and ffn != 4 * config.hidden:
        raise Refused(
            f"intermediate_size: {ffn} is not four times the hidden size {config.hidden}, the "
            f"only size of plain MLPs in GPT-NeoX {era.until}. Use `era=today`."
        )
    if config.reward and "train_impl" not in known_keys(era):
        raise Refused(
            f"train_impl: this is a reward model, which GPT-NeoX {era.until} does not support. "
            "Use `era=today`."
        )
    refuse_all(fails_in_era(checkpoint, era), checkpoint.path)
    known, written = known_keys(era), architecture.write_neox(config, layout.old_names)
    unknown = [_without(key, value, era) for key, value in written.items() if key not in known]
    refuse_all(unknown, checkpoint.path)
    if options.era is None:
        if options.inv_freq != "store" or not era.inv_freq_key:
            return []
        return [
            Finding(
                "inv-freq-by-flag",
                "warning",
                "the yml sets rotary_save_freqs_buffer: true, so that GPT-NeoX from 2024-03-04 "
                "or later loads a stored inv_freq. Older versions reject that key",
                "for an older version, use `era=neox@2024-03` instead of `inv_freq=store`",
            )
        ]
    if layout.mlp_names != era.mlp_names:
        mismatches.append(f"`mlp_names={layout.mlp_names}`, but it expects {era.mlp_names}")
    positions = checkpoint.raw.get("pos_emb") if checkpoint.kind == "neox" else "rotary"
    rotary = architecture.has_rotary_buffer and positions == "rotary"
    if rotary and layout.inv_freq != era.inv_freq and not (era.inv_freq_key or era.inv_freq_either):
        mismatches.append(
            f"`inv_freq={layout.inv_freq}`, but it can only {era.inv_freq} the buffer"
        )
    if config.grouped_query and layout.gqa_order != era.gqa_order:
        mismatches.append(f"`gqa_order={layout.gqa_order}`, but it reads them as {era.gqa_order}")
    return [
        Finding(
            "era-mismatch",
            "warning",
            f"{era.name} will not load the result as this model: {what}",
            "leave out that option",
        )
        for what in mismatches
    ]


def _without(key: str, value: object, era: Era) -> Refusal:
    """The refusal of a model with a setting that trees of the era do not have."""
    return Refusal(
        key,
        f"GPT-NeoX {era.until} does not support it, and without it this is another model ({key}: "
        f"{value!r})",
        "name a GPT-NeoX that supports it with `era=`",
    )


def _check_mlp_biases(
    architecture: Architecture, config: ModelConfig, layout: RankLayout, era: Era
) -> None:
    """Raise Refused if trees of the era cannot run an MLP with or without these biases."""
    if layout.te:
        return  # such modules always have biases, and missing ones are written as zeros
    activation = str(architecture.write_neox(config, False)["activation"])
    rule = "none" if layout.old_names else era.gated_biases
    gated = architecture.has_llama_mlp(old=layout.old_names)
    wanted = mlp_biases(rule, activation, gated=gated, parallel=config.parallel_residual)
    if not gated and not config.mlp_bias:
        raise Refused(
            "use_bias_in_mlp: the MLP of the model has no biases, but the plain MLP of every "
            "GPT-NeoX adds them unconditionally and fails with a TypeError "
            "(megatron/model/transformer.py, ParallelMLP.forward). No version can run this "
            "model."
        )
    if wanted == "required" and not config.mlp_bias:
        raise Refused(
            f"use_bias_in_mlp: the MLP of the model has no biases, but GPT-NeoX {era.until} "
            f"requires them for {activation} (megatron/model/transformer.py, "
            "ParallelTransformerLayer.forward). Use `era=today`."
        )
    if wanted == "none" and config.mlp_bias:
        raise Refused(
            f"mlp_bias: the MLP of the model has biases, but GPT-NeoX {era.until} does not "
            f"support them for {activation} (megatron/model/transformer.py). Use `era=today`."
        )


def fails_in_era(checkpoint: Checkpoint, era: Era) -> list[Refusal]:
    """Why the forward pass of trees of an era fails on a model although they know its keys.

    Until neox-gpt-j-no-mlp-bias the parallel blocks expand both biases, which may be None. Until
    neox-rms-epsilon RMSNorm computes the root of its dimension, which is a list for q and k.
    """
    architecture, config = checkpoint.architecture, checkpoint.config
    names = {weight.neox for weight in architecture.weights}
    parallel = era.gated_biases == "none" and config.parallel_residual
    attention = "attention.dense.weight" in names and not config.attention_bias
    mlp = architecture.has_mlp and "mlp.linear2.weight" in names and not config.mlp_bias
    blocks = (
        f"the parallel blocks of GPT-NeoX {era.until} require biases (gpt_j_residual; "
        "megatron/model/transformer.py, ParallelTransformerLayer.forward)"
    )
    checks = [
        ("use_bias_in_attn_linear", parallel and attention, blocks),
        ("use_bias_in_mlp", parallel and mlp, blocks),
        (
            "use_qk_layernorm",
            era.rms_eps == "outside" and "attention.qk_layernorm.scale" in names,
            f"RMSNorm of GPT-NeoX {era.until} fails with it (megatron/model/norms.py)",
        ),
    ]
    return refusals(checks, way_out="use `era=today`")


def lost_in_era(checkpoint: Checkpoint, era: Era) -> list[Refusal]:
    """Settings of another GPT-NeoX that change the model and that trees of the era do not have."""
    if checkpoint.kind != "neox":
        return []
    raw, known = checkpoint.raw, known_keys(era)
    architecture = checkpoint.architecture
    rewritten = architecture.era_keys if architecture.neox_only else architecture.model_keys
    described_keys = {*rewritten, *LAYOUT, *TE_KEYS, "rope_fusion"}
    dense = int(raw.get("moe_num_experts") or 1) <= 1
    grouped = checkpoint.config.grouped_query
    return [
        _without(key, value, era)
        for key, value in raw.items()
        if key in neox_keys() - known - described_keys
        and not (dense and key.startswith("moe_"))
        and not (key == "num_kv_heads" and not grouped)
        and (effect_of(key, value) == "model" or (value is False and key in _TRUE_BY_DEFAULT))
    ]


@dataclass(frozen=True)
class EraSettings:
    """The keys of a run's yml for the GPT-NeoX of an era. None of the changes affects the model.

    Attributes:
        changed: New values of keys that express the same setting differently there.
        dropped: Keys that it refuses.
    """

    raw: Mapping[str, Any]
    changed: Mapping[str, Any]
    dropped: tuple[Dropped, ...]


def era_settings(checkpoint: Checkpoint, layout: RankLayout, era: Era | None) -> EraSettings:
    """Adapt the yml of a GPT-NeoX source to trees of an era; None keeps every key."""
    raw = checkpoint.raw
    if era is None:
        return EraSettings(raw, {}, ())
    known = known_keys(era)
    kept = dict(raw)
    written = checkpoint.architecture.write_neox(checkpoint.config, layout.old_names)
    changed = {
        key: value
        for key, value in written.items()
        if key in checkpoint.architecture.era_keys and key in known
    }
    if layout.inv_freq == "store" and era.inv_freq_key:
        changed[FLAG] = True
    else:
        kept.pop(FLAG, None)
    return EraSettings(
        {key: value for key, value in kept.items() if key in known and key not in changed},
        changed,
        tuple(
            Dropped(f"yml: {key}", reason_dropped(key, era.name), "setting")
            for key in sorted(kept)
            if key not in known and not is_elsewhere(key)
        ),
    )


def reason_dropped(key: str, era: str) -> str:
    """Why the yml for trees of an era does not contain a key."""
    if source := COMPUTED_KEYS.get(key):
        return f"it had no effect: GPT-NeoX computes it from {source}"
    return f"GPT-NeoX of {era} refuses it"
