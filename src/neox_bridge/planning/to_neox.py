"""Plans a GPT-NeoX root: latest, global_stepN, configs, and a yml to start fine-tuning with."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from neox_bridge.architectures.base import ModelConfig, shared_reason
from neox_bridge.architectures.pipeline_stages import owners_of, with_owners
from neox_bridge.errors import Refused
from neox_bridge.findings import Dropped, Finding
from neox_bridge.frameworks.eras import TODAY, Era, fitting, known_keys, span_of
from neox_bridge.frameworks.keys import neox_keys
from neox_bridge.frameworks.setting_defaults import (
    DROPOUT,
    predates_changes,
    trained_before_changes,
)
from neox_bridge.layouts.carried_names import FOLDER as CARRIED
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint, LayoutName, refuse_all
from neox_bridge.layouts.gqa import rms_epsilon
from neox_bridge.layouts.origin import origin_settings
from neox_bridge.layouts.same_values import relation
from neox_bridge.layouts.text_files import dump_json
from neox_bridge.layouts.tokenizer import Tokenizer
from neox_bridge.layouts.transformer_engine import BOTH
from neox_bridge.layouts.unknown_keys import lost_on_the_way
from neox_bridge.layouts.untrusted import mapping
from neox_bridge.layouts.window import check_window
from neox_bridge.planning.common import (
    carried_outputs,
    cast,
    cut_rows,
    text_file,
    tokenizer_outputs,
    with_vocabulary_rows,
)
from neox_bridge.planning.default_settings import with_default_settings
from neox_bridge.planning.era_checks import check_era, lost_in_era
from neox_bridge.planning.model_identity import identity_of
from neox_bridge.planning.neox_files import (
    MakeOptimizer,
    NeoxModel,
    RankLayout,
    stage_layers,
    start_of_run,
    weight_files,
)
from neox_bridge.planning.neox_yml import (
    Settings,
    settings,
    start_yml,
    step_yml,
    unnameable,
    unnameable_finding,
)
from neox_bridge.planning.option_checks import check_layout
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.record import neox_record
from neox_bridge.planning.transformer_engine import check_target
from neox_bridge.planning.vocabulary import Vocabulary, fit, keep, padding_multiple
from neox_bridge.tensors.geometry import shard_shape, whole_shape
from neox_bridge.wording import plural


def plan_neox(
    checkpoint: Checkpoint,
    options: Options,
    tokenizer: Tokenizer,
    target: str,
    make_optimizer: MakeOptimizer | None,
) -> Plan:
    """Plan all files of a GPT-NeoX root with this model.

    target: its absolute path, which the yml contains. make_optimizer: see ``make_plan``. Raises
    Refused for a layout that the model does not fit.
    """
    architecture, config = checkpoint.architecture, checkpoint.config
    layout, era = target_layout(checkpoint, options)
    checkpoint, findings = _with_default_settings(checkpoint, era, options)
    findings += check_era(checkpoint, layout, era, options)
    if layout.te:
        findings += check_target(checkpoint, layout.tp, era, options)
    vocabulary, dropped = _vocabulary(checkpoint, options, tokenizer, layout.tp)
    if architecture.norm == "rmsnorm" and checkpoint.kind == "hf" and era.rms_eps == "outside":
        findings.append(rms_epsilon())
    findings += lost_on_the_way(checkpoint)
    refuse_all(lost_in_era(checkpoint, era), checkpoint.path)
    if vocabulary.size is not None and vocabulary.size > vocabulary.rows:
        findings.append(_larger_tokenizer(vocabulary))
    elif vocabulary.padded > vocabulary.rows and options.vocab_multiple is None:
        findings.append(_padded(vocabulary, layout.tp))
    config = replace(config, dims={**config.dims, "vocab": vocabulary.padded})
    if options.dtype != "keep":
        config = replace(config, dtype=options.dtype)
    if checkpoint.kind == "hf":
        findings += architecture.findings_to_neox(checkpoint.raw, config)
    kept = with_vocabulary_rows(architecture, config, checkpoint.tensors, vocabulary.rows)
    unrounded = with_vocabulary_rows(architecture, config, kept)
    wholes = {name: cast(whole, options.dtype) for name, whole in unrounded.items()}
    iteration = _iteration(checkpoint) if options.iteration is None else options.iteration
    step = f"global_step{iteration}"
    args = checkpoint_args(config, vocabulary, layout.tp)
    yml_settings = _settings(checkpoint, config, layout, era, vocabulary, options)
    yml_settings = replace(yml_settings, origin=_origin(checkpoint, options, vocabulary))
    optimizer = None
    if options.optimizer == "fresh":
        if layout.predates_deepspeed_06:
            raise Refused(
                "`optimizer=fresh`: new optimizer states cannot be written for GPT-NeoX v1.0. "
                "Leave it out. v1.0 then starts a new optimizer itself."
            )
        training, dp = yml_settings.training, options.dp
        assert make_optimizer is not None
        unrounded_model = NeoxModel(architecture, config, unrounded, layout)
        optimizer = make_optimizer(unrounded_model, training, iteration, dp)
        yml_settings.training["zero_optimization"] = {
            **(training.get("zero_optimization") or {}),
            "stage": optimizer.stage,
        }
        findings.append(_schedule())
        findings += _finished(training.get("train_iters"), iteration)
    else:
        zero = mapping(yml_settings.training, "zero_optimization", "the yml")
        if reason := _no_such_stage(zero.get("stage"), layout):
            yml_settings.training["zero_optimization"] = {**zero, "stage": 1}
            findings.append(_other_stage(zero["stage"], reason))
    metadata = partial(start_of_run, layout, args, iteration, optimizer)
    model = NeoxModel(architecture, config, wholes, layout)
    files = list(weight_files(step, model, metadata, alike=optimizer is None))
    if optimizer is not None:
        files += optimizer.files
    if checkpoint.kind == "neox":
        why = f"GPT-NeoX of {era.name} refuses it"
        dropped += [Dropped(f"yml: {key}", why, "setting") for key in yml_settings.unknown]
    main = f"tokenizer/{tokenizer.main}" if tokenizer.main else None
    start, yml, blanks = start_yml(yml_settings, target, main, fresh=optimizer is not None)
    if unnameable(target):
        findings.append(unnameable_finding(start, blanks[1:]))
    record = neox_record(checkpoint, vocabulary.rows, tokenizer.size)
    if config.grouped_query and not layout.te:
        record["gqa_order"] = layout.gqa_order
    files += [
        text_file(f"{step}/{RECORD}", dump_json(record), seals=True),
        text_file(f"{step}/configs/neox_bridge.yml", step_yml(yml_settings)),
        *tokenizer_outputs(tokenizer, "tokenizer/"),
        *carried_outputs(checkpoint, f"{CARRIED}/"),
        text_file(start, yml),
        text_file("latest", step.encode()),
    ]
    summary: dict[str, object] = {
        "kind": "neox",
        "architecture": architecture.name,
        "layout": layout.name,
        "tensor_parallel": layout.tp,
        "pipeline_stages": layout.pipe_parallel_size,
        "mlp_names": layout.mlp_names,
        "inv_freq": layout.inv_freq,
        **({"transformer_engine": True} if layout.te else {}),
        "era": era.name,
        **({"gqa_order": layout.gqa_order} if config.grouped_query and not layout.te else {}),
        "dtype": config.dtype,
        "vocab_rows": vocabulary.padded,
        "vocab_multiple": vocabulary.multiple,
        "step": step,
        "parameters": sum(prod(wholes[name].shape) for name in wholes),
    }
    return Plan(
        {},
        summary,
        tuple(files),
        tuple(dropped),
        tuple(findings),
        tuple((start, key) for key in blanks),
        model=identity_of(architecture.name, config, vocabulary.rows),
        fixed=(*yml_settings.layout, *yml_settings.model, "precision"),
    )


def target_layout(checkpoint: Checkpoint, options: Options) -> tuple[RankLayout, Era]:
    """The layout of the target, and the era that it is for. Raises BridgeError and Refused."""
    state, era = checkpoint.neox, options.era
    name = options.layout or ("ranks" if options.pp == 0 else None)
    if name is None and options.pp:
        name = "layers"
    # GPT-NeoX trains reward models without pipeline stages only (training.py, get_batch_pipe)
    usual: LayoutName = "ranks" if checkpoint.config.reward else "layers"
    name = name or (state.layout if state else usual)
    check_layout(options.layout, options.pp)
    stages = options.pp or (state.pp if state else 0) or 1
    tp = options.tp or (state.tp if state else 1)
    source_era = state or TODAY
    mlp_names = options.mlp_names or (era or source_era).mlp_names
    inv_freq = options.inv_freq or (era or source_era).inv_freq
    positions = checkpoint.raw.get("pos_emb") if checkpoint.kind == "neox" else "rotary"
    if positions != "rotary" or not checkpoint.architecture.has_rotary_buffer:
        inv_freq = "omit"
    raw = checkpoint.raw if state else {}
    fits = era or fitting(mlp_names, inv_freq, raw)
    refuse_all(checkpoint.architecture.refuse_shape(tp, span_of(fits)), checkpoint.path)
    check_window(checkpoint, name, _run_yml(checkpoint))
    _check_parallel(checkpoint.config, tp, stages)
    _check_divisible(checkpoint, tp)
    sums = checkpoint.config.parallel_residual
    row_bias = options.row_bias if sums else "replicated"
    stages = stages if name == "layers" else 1
    gqa_order = fits.gqa_order
    if state is not None and era is None:
        gqa_order = state.gqa_order
    elif state is None and options.gqa_order is not None:
        gqa_order = options.gqa_order
    te = options.te
    if te is None:
        te = state is not None and state.te == BOTH and era in (None, TODAY)
    layout = RankLayout(name, tp, stages, mlp_names, inv_freq, row_bias, gqa_order, te, fits.states)
    _check_shared(checkpoint, layout)
    return layout, fits


def _check_shared(checkpoint: Checkpoint, layout: RankLayout) -> None:
    """Raise Refused if blocks would share a parameter that has several values in the source.

    Each pipeline stage trains a separate parameter; see ``Architecture.shared``.
    """
    shared, state = checkpoint.architecture.shared, checkpoint.neox
    if not shared or state is None or keeps_owners(checkpoint, layout):
        return
    first, *others = (
        checkpoint.tensors[row.hf] for row in checkpoint.rows if row.weight.neox == shared
    )
    if any(relation(first, other) == "differs" for other in others):
        raise Refused(
            f"{checkpoint.path}: the {shared} of its pipeline stages differ, and "
            f"{shared_reason(shared)}. Keep its number of stages (`pp={state.pp}`)."
        )


def keeps_owners(checkpoint: Checkpoint, layout: RankLayout) -> bool:
    """Whether the same blocks of the target train what blocks share (``Architecture.shared``)."""
    architecture, config = checkpoint.architecture, checkpoint.config
    model = NeoxModel(architecture, config, checkpoint.tensors, layout)
    stages = stage_layers(model, checkpoint.raw)
    target = with_owners(architecture, config.layers, stages)
    return owners_of(target) == owners_of(architecture)


def _run_yml(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The yml of the run that the model comes from; empty if there was none."""
    if checkpoint.kind == "neox":
        return checkpoint.raw
    recorded = checkpoint.record.get("neox")
    yml = recorded.get("yml") if isinstance(recorded, dict) else None
    return yml if isinstance(yml, dict) else {}


def _check_parallel(config: ModelConfig, tp: int, stages: int) -> None:
    parts = {"attention heads": config.heads, "rows of the MLP": config.dims["ffn"]}
    if config.grouped_query:
        parts["key-value heads (num_kv_heads)"] = config.key_value_heads
    for what, size in parts.items():
        if size % tp:
            fits = [n for n in range(1, 65) if not any(s % n for s in parts.values())]
            raise Refused(
                f"`tp={tp}`: this model cannot be split evenly over {tp} ranks, it has "
                f"{size} {what}. Valid values: {', '.join(map(str, fits))}."
            )
    if stages > config.layers:
        raise Refused(
            f"`pp={stages}`: the model has only {plural(config.layers, 'layer')}, and each stage "
            "needs at least one."
        )


def _check_divisible(checkpoint: Checkpoint, tp: int) -> None:
    """Raise Refused for a tensor that cannot be split evenly over the ranks."""
    for row in checkpoint.rows:
        shape, split = checkpoint.tensors[row.hf].shape, row.weight.split
        if split != "vocab" and whole_shape(split, shard_shape(split, shape, tp), tp) != shape:
            raise Refused(
                f"`tp={tp}`: layer {row.layer}: {row.weight.neox} has the shape {list(shape)}, "
                f"which {tp} ranks cannot share evenly."
            )


def _vocabulary(
    checkpoint: Checkpoint, options: Options, tokenizer: Tokenizer, tp: int
) -> tuple[Vocabulary, list[Dropped]]:
    everything = options.vocab_rows == "all"
    have = checkpoint.config.dims["vocab"] if everything else checkpoint.vocab_rows
    rows, dropped = cut_rows(have, have, options, tokenizer)
    size = tokenizer.size
    state = checkpoint.neox
    unknown = size is None and not checkpoint.record.get("vocab_size")
    if unknown and options.vocab_multiple is None and state is not None:
        multiple = padding_multiple(state.args, checkpoint.raw)
        return keep(rows, multiple, state.tp, tp), dropped
    known = size is not None
    return fit(rows, size or rows, tp, options.vocab_multiple, known=known), dropped


def _origin(checkpoint: Checkpoint, options: Options, vocabulary: Vocabulary) -> dict[str, Any]:
    """The record in the yml of how many rows the model has without padding, for later steps."""
    rows = vocabulary.rows
    if options.vocab_rows == "keep":
        rows = min(rows, checkpoint.unpadded_rows)
    return origin_settings(rows) if rows < vocabulary.padded else {}


def _padded(vocabulary: Vocabulary, tp: int) -> Finding:
    added = vocabulary.padded - vocabulary.rows
    return Finding(
        "padding-rows",
        "info",
        f"no value of make_vocab_size_divisible_by keeps the {vocabulary.rows} vocabulary rows "
        f"of the model at TP {tp}. The files get {plural(added, 'row')} of zeros, which GPT-NeoX "
        "trains and includes in its loss",
        "a conversion back to Hugging Face removes them",
    )


def _larger_tokenizer(vocabulary: Vocabulary) -> Finding:
    return Finding(
        "tokenizer-larger",
        "warning",
        f"the tokenizer has {vocabulary.size} entries, but the model has only {vocabulary.rows} "
        "rows. The missing rows are written as zeros",
        "check that the tokenizer belongs to this model",
    )


def _no_such_stage(stage: object, layout: RankLayout) -> str:
    """Why GPT-NeoX cannot start with the written weights at a ZeRO stage; "" if it can.

    Sources: deepspeed runtime/pipe/engine.py (PipelineEngine.__init__), runtime/zero/stage3.py;
    GPT-NeoX megatron/training.py (get_model, since #1275 of 2024-09-09).
    """
    if stage == 3:
        return "DeepSpeed loads at stage 3 only what it saved at stage 3"
    if stage == 2 and layout.name == "layers":
        return "DeepSpeed has no pipeline stages at stage 2"
    if stage == 2 and layout.tp > 1 and not layout.old_names:
        return "GPT-NeoX since 2024-09 has one tensor-parallel rank at stage 2"
    return ""


def _other_stage(stage: int, reason: str) -> Finding:
    return Finding(
        "zero-stage",
        "info",
        f"zero_optimization.stage is 1 in the yml, and was {stage}, because {reason}",
    )


def _schedule() -> Finding:
    """AnnealingLR asserts that both are equal (megatron/learning_rates.py, _check_and_set)."""
    return Finding(
        "schedule",
        "info",
        "the checkpoint contains the learning-rate schedule made of these settings. GPT-NeoX "
        "stops with an AssertionError if the yml has another schedule",
        "to use the schedule of the yml, set override_lr_scheduler: true",
    )


def _finished(last: object, iteration: int) -> list[Finding]:
    """GPT-NeoX trains until train_iters (megatron/training.py, train)."""
    if not isinstance(last, int) or iteration < last:
        return []
    return [
        Finding(
            "nothing-to-train",
            "warning",
            f"resume.yml sets train_iters: {last}, and the checkpoint is at iteration {iteration}, "
            "so GPT-NeoX trains no step",
            f"set train_iters and lr_decay_iters above {iteration} in resume.yml, and "
            "override_lr_scheduler: true",
        )
    ]


def _iteration(checkpoint: Checkpoint) -> int:
    """The step: from GPT-NeoX, the record, or a revision such as step143000."""
    if checkpoint.neox is not None:
        return checkpoint.neox.iteration
    recorded = checkpoint.record.get("neox")
    if isinstance(recorded, dict) and isinstance(recorded.get("iteration"), int):
        return int(recorded["iteration"])
    match = re.search(r"@step(\d+)$", checkpoint.revision)
    return int(match[1]) if match else 0


def checkpoint_args(config: ModelConfig, vocabulary: Vocabulary, tp: int) -> dict[str, Any]:
    """What GPT-NeoX compares at load (megatron/checkpointing.py, check_checkpoint_args)."""
    return {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.dims.get("positions", config.max_positions),
        "make_vocab_size_divisible_by": vocabulary.multiple,
        "padded_vocab_size": vocabulary.padded,
        "tokenizer_type": "HFTokenizer",
        "model_parallel_size": tp,
    }


def _with_default_settings(
    checkpoint: Checkpoint, era: Era, options: Options
) -> tuple[Checkpoint, list[Finding]]:
    """Add the defaults that the run trained with to its yml, if the target has others."""
    state = checkpoint.neox
    if state is None:
        return checkpoint, []
    old = trained_before_changes(state.ds_version, state.mlp_names)
    # without --for, a run from an unknown GPT-NeoX is assumed to continue with the same one
    target = era if options.era or old is not None else None
    checkpoint, findings = with_default_settings(checkpoint, state.ds_version, target)
    return checkpoint, list(findings)


def _carried(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """The keys of a fork, which a new layout keeps; a GPT-NeoX of --for would refuse them."""
    if checkpoint.kind != "neox" or options.era is not None:
        return {}
    names = (key.name for key in checkpoint.unknown_keys)
    return {
        name: checkpoint.raw[name]
        for name in names
        if name not in neox_keys() and name in checkpoint.raw
    }


def _settings(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layout: RankLayout,
    era: Era,
    vocabulary: Vocabulary,
    options: Options,
) -> Settings:
    parallel = {
        "pipe_parallel_size": layout.pipe_parallel_size,
        "model_parallel_size": layout.tp,
        "make_vocab_size_divisible_by": vocabulary.multiple,
    }
    written = settings(
        checkpoint.architecture,
        config,
        era,
        layout.inv_freq,
        parallel,
        _run_yml(checkpoint),
        same_model=checkpoint.kind == "neox",
        same_dtype=options.dtype in ("keep", checkpoint.config.dtype),
        old_names=layout.old_names,
        carried=_carried(checkpoint, options),
    )
    if written.training.get("train_impl") == "rm":
        del written.training["train_impl"]
    if config.reward:
        written.model["train_impl"] = "rm"
    if checkpoint.kind == "hf" and predates_changes(era) is not False:
        # a default of 0.1 would turn on the dropout that the model does not have
        for key in DROPOUT:
            if key in known_keys(era):
                written.model.setdefault(key, getattr(config, key))
    if layout.te:
        if checkpoint.architecture.gated:
            # TELayerNormMLP uses the width as it is, GPT-NeoX's MLP two thirds of it
            written.model["intermediate_size"] = config.dims["ffn"]
        written.model.update(te_mha=True, te_layernorm_mlp=True)
    return written
