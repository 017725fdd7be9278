"""Plans a checkpoint for another number of ranks, with everything needed to resume."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from neox_bridge.architectures.base import INV_FREQ, shared_reason
from neox_bridge.architectures.pipeline_stages import holds
from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.setting_defaults import COLUMN, OUTPUT_LAYER
from neox_bridge.layouts.carried_names import FOLDER as CARRIED
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint, refuse_all
from neox_bridge.layouts.file_names import rank_file
from neox_bridge.layouts.head import decide_head
from neox_bridge.layouts.origin import origin_settings
from neox_bridge.layouts.text_files import dump_json
from neox_bridge.layouts.tokenizer import describe_tokenizer
from neox_bridge.layouts.universal_folder import INFO, LATEST, MASTER, Parameter
from neox_bridge.layouts.unknown_keys import ignored_findings, ignoring, listed, refusals
from neox_bridge.optimizer.current_form import in_current_form, is_current, writer_version
from neox_bridge.optimizer.mp_rank import Sources, buffer_names, mp_rank, parameter_name
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.reshard_target import Target, choose_target
from neox_bridge.optimizer.states import Optimizer, States, states
from neox_bridge.optimizer.target_parameters import with_target_names
from neox_bridge.optimizer.v1_form import (
    check_v1_run,
    in_v1_form,
    is_v1,
    old_random_states,
    step_lost,
    v1_files,
)
from neox_bridge.optimizer.write_stage0 import Stage0, stage0
from neox_bridge.optimizer.write_universal import universal, universal_files
from neox_bridge.optimizer.write_zero import RankGroup, param_shapes, zero_files
from neox_bridge.optimizer.write_zero3 import sub_groups, zero3_model_files, zero3_state_files
from neox_bridge.optimizer.zero_stage import at_stage
from neox_bridge.planning.common import (
    carried_outputs,
    text_file,
    tokenizer_outputs,
    with_drifted_biases,
    with_vocabulary_rows,
)
from neox_bridge.planning.default_settings import computed_findings, with_default_settings
from neox_bridge.planning.model_identity import identity_of
from neox_bridge.planning.neox_files import (
    Metadata,
    NeoxModel,
    mp_rank_file,
    rank_parameters,
    weight_files,
)
from neox_bridge.planning.neox_yml import in_yml, resume_yml, unnameable, unnameable_finding
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.record import neox_record, source_summary
from neox_bridge.planning.to_neox import checkpoint_args, keeps_owners
from neox_bridge.planning.weight_dtypes import dtype_refusals
from neox_bridge.tensors.fragments import put
from neox_bridge.tensors.pieces import OutputFile, OutputTensor
from neox_bridge.wording import plural

_ELASTIC = "elastic_checkpoint"


def plan_reshard(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    resharding: Resharding,
    path: str,
    given: States | None = None,
) -> Plan:
    """Plan every file of the target. path: its absolute path, which the yml contains.

    given: states that replace those of the source, by state and Hugging Face name. Raises Refused
    if the model or the batch cannot be split over these ranks.
    """
    checkpoint = decide_head(checkpoint, None)
    state = checkpoint.neox_state
    checkpoint = ignoring(checkpoint, resharding.ignore_keys)
    refuse_all(refusals(checkpoint, resharding.ignore_keys), checkpoint.path)
    refuse_all(dtype_refusals(checkpoint), checkpoint.path)
    read, derived = optimizer.findings, optimizer.derived_findings
    was_v1 = is_v1(optimizer)
    checkpoint, default_findings = with_default_settings(
        checkpoint, writer_version(optimizer) or "", resharding.era
    )
    optimizer, given, target = _with_target(checkpoint, optimizer, resharding, given)
    weights = with_vocabulary_rows(checkpoint.architecture, target.config, checkpoint.tensors)
    moved = {
        key: with_vocabulary_rows(checkpoint.architecture, target.config, wholes)
        for key, wholes in (given or states(checkpoint, optimizer)).items()
    }
    optimizer = with_target_names(checkpoint, optimizer, target.layout)
    model = NeoxModel(checkpoint.architecture, target.config, weights, target.layout)
    groups = _groups(optimizer, target, model, moved)
    sources = Sources(optimizer.metas, state.tp, optimizer.generators)
    architecture, step = checkpoint.architecture, target.step
    changed = _changed(target)
    whole = None
    if target.universal:
        whole = universal(model, moved, {p: _named(target, p) for p in optimizer.members})
    inside = {
        number: stage0(optimizer, rank_groups)
        for number, rank_groups in groups.items()
        if optimizer.wrapper in ("plain", "fp16")
    }
    info = whole.info() if whole is not None else None
    metadata: Metadata = partial(_metadata, checkpoint, sources, target, groups, inside, info)
    parts = {
        f"{step}/{rank_file(number)}": tensor_parts
        for number, (_, _, tensor_parts) in inside.items()
    }
    if target.zero == 3:
        files = _stage_3_files(optimizer, target, model, groups, metadata)
    elif whole is not None:
        count = target.layout.stages * target.layout.tp
        files = [mp_rank_file(step, number, metadata) for number in range(count)]
        files += universal_files(step, whole, optimizer, target.dp, target.zero)
    else:
        planned = weight_files(step, model, metadata)
        files = [put(file, parts.get(file.path, {})) for file in planned]
        if not inside:
            files += _optimizer_files(optimizer, target, groups)
    files += _small_files(checkpoint, target, changed, path)
    summary: dict[str, object] = {
        "kind": "neox",
        "architecture": architecture.name,
        "layout": target.layout.name,
        "tensor_parallel": target.layout.tp,
        "pipeline_stages": target.layout.pipe_parallel_size,
        "data_parallel": target.dp,
        "zero_stage": target.zero,
        "dtype": target.config.dtype,
        "step": step,
        "vocab_rows": target.vocabulary.padded,
        "parameters": sum(prod(whole.shape) for whole in weights.values()),
        "optimizer": list(optimizer.keys),
        **({"universal": True} if target.universal else {}),
    }
    start = "resume_universal.yml" if target.universal else "resume.yml"
    unnamed = [unnameable_finding(start, ("load", "save"))] if unnameable(path) else []
    step_findings = derived
    if target.layout.predates_deepspeed_06:
        step_findings = () if was_v1 else (step_lost(),)
    findings = (
        *unnamed,
        *listed(checkpoint.unknown_keys),
        *ignored_findings(resharding.ignore_keys, carried=True),
        *read,
        *default_findings,
        *step_findings,
        *_findings(checkpoint, target, sources),
    )
    rows = min(checkpoint.vocab_rows, target.config.dims["vocab"])
    plan = Plan(
        source_summary(checkpoint),
        summary,
        tuple(files),
        target.settings.dropped,
        findings,
        model=identity_of(architecture.name, target.config, rows),
        fixed=(*changed, *sorted(architecture.model_keys), "precision"),
        carried=checkpoint.carried.names,
        left=checkpoint.carried.left,
    )
    return with_drifted_biases(plan, checkpoint)


def _groups(
    optimizer: Optimizer, target: Target, model: NeoxModel, moved: States
) -> dict[int, list[RankGroup]]:
    """The part of each parameter group that each model-parallel rank holds."""
    rank_groups = {}
    plain = replace(model, config=replace(model.config, dtype="float32"))
    # if ranks sum a bias, its moments are equal on every rank
    alike = replace(model.layout, row_bias="replicated")
    models = {
        key: replace(plain, wholes=wholes, layout=model.layout if key == MASTER else alike)
        for key, wholes in moved.items()
    }
    for rank in range(model.layout.tp):
        by_state = {key: rank_parameters(one, rank) for key, one in models.items()}
        for stage, layers in enumerate(target.bounds):
            number = stage * model.layout.tp + rank
            rank_groups[number] = list(_rank_groups(optimizer, target, layers, by_state))
    return rank_groups


def _rank_groups(
    optimizer: Optimizer,
    target: Target,
    layers: range,
    by_state: Mapping[str, Mapping[Parameter, OutputTensor]],
) -> Iterator[RankGroup]:
    """The groups that have parameters in these layers; a stage may have none."""
    order = _of_layers(optimizer, target, layers)
    for index, group in enumerate(optimizer.groups):
        members = [p for p in order if optimizer.members[p] == index]
        if members:
            yield RankGroup(
                group,
                {
                    key: {_named(target, p): tensors[p] for p in members}
                    for key, tensors in by_state.items()
                },
            )


def _of_layers(optimizer: Optimizer, target: Target, layers: range) -> list[Parameter]:
    """The parameters of a stage with these layers, in order."""
    return [p for p in optimizer.members if holds(target.config, layers, p[0])]


def _named(target: Target, parameter: Parameter) -> str:
    layout, tied = target.layout.name, target.config.tied_embeddings
    return parameter_name(parameter, layout=layout, tied=tied)


def _changed(target: Target) -> dict[str, Any]:
    """The keys of the yml that change."""
    raw = target.settings.raw
    zero = {**_zero(raw), "stage": target.zero}
    checkpoint_settings = raw.get("checkpoint") or {}
    loading = {"checkpoint": {**checkpoint_settings, "load_universal": target.universal}}
    return {
        **(loading if target.universal or checkpoint_settings else {}),
        "pipe_parallel_size": target.layout.pipe_parallel_size,
        "model_parallel_size": target.layout.tp,
        "make_vocab_size_divisible_by": target.vocabulary.multiple,
        "train_micro_batch_size_per_gpu": target.batch.micro,
        "gradient_accumulation_steps": target.batch.accumulation,
        "zero_optimization": zero,
        **_output_layer(target),
        **target.settings.changed,
        **(target.rescaling.yml(raw) if target.rescaling is not None else {}),
    }


def _output_layer(target: Target) -> dict[str, Any]:
    """How the output layer is split over ranks, if GPT-NeoX would assume another split."""
    division = target.settings.raw.get(OUTPUT_LAYER)
    stays = division == COLUMN or (division is None and not target.layout.predates_deepspeed_06)
    return {} if stays else {OUTPUT_LAYER: COLUMN}


def _zero(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ZeRO settings without elastic_checkpoint, because the states have its default format."""
    zero = dict(settings.get("zero_optimization") or {})
    zero.pop(_ELASTIC, None)
    return zero


def _metadata(
    checkpoint: Checkpoint,
    sources: Sources,
    target: Target,
    groups: Mapping[int, list[RankGroup]],
    inside: Mapping[int, Stage0],
    info: Mapping[str, Any] | None,
    number: int,
    module: Any,
) -> tuple[dict[str, Any], list[OutputTensor]]:
    stage, rank = divmod(number, target.layout.tp)
    sizes = {
        "dp_world_size": target.dp,
        "mp_world_size": target.layout.stages * target.layout.tp,
    }
    args = _args(checkpoint, target)
    if target.layout.predates_deepspeed_06:
        value, tensors = mp_rank(sources, stage, rank, {"module": module, **sizes, "args": args})
        return value, old_random_states(tensors)
    new = {
        "module": module,
        "buffer_names": _buffer_names(checkpoint, sources, target, stage),
        "param_shapes": None if inside else param_shapes(_saved_groups(target, groups[number])),
        **sizes,
        "ds_config": _ds_config(sources.metas[0].get("ds_config"), target),
        "args": args,
        INFO: info,
    }
    frozen: dict[str, Any] | None = {} if target.zero >= 2 else None  # engine.py, save_frozen_param
    shared = None if inside else _shared_params(checkpoint, target, number)
    more: dict[str, Any] = {"frozen_param_shapes": frozen, "frozen_param_fragments": frozen}
    more["shared_params"] = shared
    if (target.zero == 0) != (sources.metas[0].get("param_shapes") is None) or target.zero == 3:
        more["optimizer"] = None
    # zero_to_fp32.py of DeepSpeed expects these keys
    always = target.zero == 3
    new |= {key: value for key, value in more.items() if always or key in sources.metas[0]}
    if not inside:
        return mp_rank(sources, stage, rank, new)
    new["optimizer"], states, _ = inside[number]
    value, tensors = mp_rank(sources, stage, rank, new)
    return value, [*states, *tensors]


def _shared_params(checkpoint: Checkpoint, target: Target, number: int) -> dict[str, str]:
    """The other names of parameters that blocks share, which DeepSpeed's first rank records."""
    names, owner = {}, ""
    for row in checkpoint.rows if number == 0 else ():
        if row.layer in target.bounds[0] and row.weight.neox == checkpoint.architecture.shared:
            name = _named(target, (row.layer, row.weight.neox))
            owner = name if row.weight.trained else owner
            if name != owner:
                names[name] = owner
    return names


def _args(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """The arguments that GPT-NeoX compares when it loads."""
    args = {
        **checkpoint.neox_state.args,
        **checkpoint_args(target.config, target.vocabulary, target.layout.tp),
    }
    if "tokenizer_type" in checkpoint.neox_state.args:
        args["tokenizer_type"] = checkpoint.neox_state.args["tokenizer_type"]
    return args


def _buffer_names(
    checkpoint: Checkpoint, sources: Sources, target: Target, stage: int
) -> list[str]:
    """The buffers in the weights of a stage: those of the source, and inv_freq if stored there."""
    state, layers = checkpoint.neox_state, target.bounds[stage]
    names = buffer_names(sources.metas, layers, target.prefix)
    if target.layout.inv_freq == state.inv_freq:
        return names
    names = [name for name in names if not name.endswith(INV_FREQ)]
    if target.layout.inv_freq == "omit":
        return names
    blocks = [layer for layer in layers if 2 <= layer < checkpoint.config.layers + 2]
    return sorted(
        [*names, *(f"{target.prefix}{layer}.{INV_FREQ}" for layer in blocks)],
        key=lambda name: int(name.removeprefix(target.prefix).partition(".")[0]),
    )


def _ds_config(original: Any, target: Target) -> dict[str, Any]:
    config = dict(original) if isinstance(original, dict) else {}
    config["train_batch_size"] = target.batch.total
    config["train_micro_batch_size_per_gpu"] = target.batch.micro
    if target.batch.accumulation > 1 or "gradient_accumulation_steps" in config:
        config["gradient_accumulation_steps"] = target.batch.accumulation
    if "zero_optimization" in config:
        config["zero_optimization"] = {**_zero(config), "stage": target.zero}
    return target.rescaling.ds_config(config) if target.rescaling is not None else config


def _optimizer_files(
    optimizer: Optimizer, target: Target, groups: Mapping[int, list[RankGroup]]
) -> Iterator[OutputFile]:
    """The files that contain only optimizer states."""
    if target.layout.predates_deepspeed_06:
        raw = target_yml(target)
        for number, rank_groups in groups.items():
            layers = target.bounds[number // target.layout.tp]
            order = [_named(target, p) for p in _of_layers(optimizer, target, layers)]
            yield from v1_files(target.step, optimizer, number, target.dp, rank_groups, raw, order)
        return
    outer = dict(optimizer.head.get("outer") or {})
    if "ds_config" in outer:
        outer["ds_config"] = _ds_config(outer["ds_config"], target)
    bf16 = target.config.dtype == "bfloat16"
    if target.zero == 3:
        saved = {number: _saved_groups(target, of_rank) for number, of_rank in groups.items()}
        yield from zero3_state_files(target.step, optimizer, saved, target.dp, outer, bf16=bf16)
        return
    yield from zero_files(target.step, optimizer, groups, target.dp, target.zero, outer, bf16=bf16)


def _saved_groups(target: Target, groups: Sequence[RankGroup]) -> Sequence[RankGroup]:
    """The groups as their states are saved; stage 3 splits them into sub-groups."""
    if target.zero != 3:
        return groups
    return sub_groups(groups, target.dp, target.settings.raw)


def _stage_3_files(
    optimizer: Optimizer,
    target: Target,
    model: NeoxModel,
    groups: Mapping[int, list[RankGroup]],
    metadata: Metadata,
) -> list[OutputFile]:
    """The model files and the optimizer state files."""
    return [
        *zero3_model_files(target.step, model, target.dp, metadata),
        *_optimizer_files(optimizer, target, groups),
    ]


def target_yml(target: Target) -> dict[str, Any]:
    """The settings of the target, as in its configs."""
    return {**target.settings.raw, **_changed(target)}


def _small_files(
    checkpoint: Checkpoint, target: Target, changed: Mapping[str, Any], path: str
) -> list[OutputFile]:
    tokenizer = describe_tokenizer(checkpoint.tokenizer)
    settings = dict(changed)
    if checkpoint.unpadded_rows < target.vocabulary.padded:
        settings |= origin_settings(checkpoint.unpadded_rows)
    if tokenizer.main:
        settings["vocab_file"] = in_yml(f"{path}/tokenizer/{tokenizer.main}")
    record = neox_record(checkpoint, checkpoint.vocab_rows, checkpoint.tokenizer_size)
    if checkpoint.config.grouped_query:
        record["gqa_order"] = target.layout.gqa_order
    yml, configs = resume_yml(target.settings.raw, settings, path)
    return [
        text_file(f"{target.step}/{RECORD}", dump_json(record), seals=True),
        text_file(f"{target.step}/configs/neox_bridge.yml", configs),
        *tokenizer_outputs(tokenizer, "tokenizer/"),
        *carried_outputs(checkpoint, f"{CARRIED}/"),
        # a separate name, because the run may contain the other file
        text_file("resume_universal.yml" if target.universal else "resume.yml", yml),
        text_file(LATEST if target.universal else "latest", target.step.encode()),
    ]


def target_states(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    resharding: Resharding,
    given: States | None = None,
) -> tuple[Optimizer, States | None]:
    """The expected content of the target: the optimizer, and states that differ from the source."""
    checkpoint, _ = with_default_settings(
        checkpoint, writer_version(optimizer) or "", resharding.era
    )
    optimizer, given, _ = _with_target(checkpoint, optimizer, resharding, given)
    return optimizer, given


def _with_target(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    resharding: Resharding,
    given: States | None,
) -> tuple[Optimizer, States | None, Target]:
    """The optimizer of the target, its states if they differ from the source, and the target.

    Raises Refused if this is impossible.
    """
    version = writer_version(optimizer)
    if resharding.era is None and is_v1(optimizer):
        resharding = replace(resharding, era=era_named("v1.0"))
    if resharding.era is not None:
        optimizer = in_current_form(optimizer, checkpoint.raw, resharding.era.deepspeed)
    elif not is_current(optimizer):
        raise Refused(
            f"{checkpoint.path}: DeepSpeed {version or 'before 0.6'} wrote its optimizer states, "
            "and neox-bridge can read but not write this format. Choose the GPT-NeoX that will "
            "resume the run: `era=today`."
        )
    if resharding.zero is not None:
        optimizer, given = at_stage(checkpoint, optimizer, resharding.zero, given)
    target = choose_target(checkpoint, optimizer, resharding, version)
    shared, stages = checkpoint.architecture.shared, checkpoint.neox_state.pp
    if shared and not keeps_owners(checkpoint, target.layout):
        keep = f"`pp={stages}`" if stages > 1 else "`pp=1` or `pp=0`"
        raise Refused(
            f"{checkpoint.path}: {shared_reason(shared)}, so its optimizer states belong to the "
            f"stages of the run. Use {keep}."
        )
    if target.rescaling is not None:
        given = target.rescaling.states(given or states(checkpoint, optimizer))
        optimizer = target.rescaling.optimizer(optimizer)
    if target.layout.predates_deepspeed_06:
        check_v1_run(optimizer, target.zero, target.config.dtype, target.universal)
        optimizer = in_v1_form(checkpoint, optimizer, target_yml(target))
    return optimizer, given, target


def _findings(checkpoint: Checkpoint, target: Target, sources: Sources) -> Iterator[Finding]:
    state, batch = checkpoint.neox_state, target.batch
    yield Finding(
        "batch",
        "info",
        f"the global batch stays {batch.total}: {plural(target.dp, 'data-parallel rank')}, "
        f"train_micro_batch_size_per_gpu {batch.micro}, gradient_accumulation_steps "
        f"{batch.accumulation}",
    )
    effective = {"gradient_accumulation_steps": target.source.accumulation}
    if (clipping := checkpoint.raw.get("gradient_clipping")) is not None:
        effective["gradient_clipping"] = clipping
    yield from computed_findings(checkpoint.raw, effective)
    yield from target.findings
    elastic = (checkpoint.raw.get("zero_optimization") or {}).get(_ELASTIC)
    if elastic is not None and bool(elastic) != target.layout.predates_deepspeed_06:
        yield Finding(
            "elastic-checkpoint",
            "info",
            f"zero_optimization.elastic_checkpoint: {str(bool(elastic)).lower()} was removed from "
            "the yml, because the states are written in the format that DeepSpeed uses without it",
        )
    if target.universal:
        yield Finding(
            "load-universal",
            "info",
            "resume_universal.yml has load_universal: true, so GPT-NeoX always starts from this "
            "folder",
            "set it to false after the run has saved its own checkpoint",
        )
    if ranks := sources.derived(target.layout.tp):
        several = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        yield Finding(
            "random-states",
            "info",
            f"the run had no tensor-parallel rank {several}; its random state for dropout is "
            "derived from that of rank 0",
        )
    rows = checkpoint.config.dims["vocab"]
    if state.universal and target.vocabulary.padded != rows:
        yield Finding(
            "padding-lost",
            "warning",
            "the universal checkpoint does not contain "
            f"{plural(target.vocabulary.padded - rows, 'row')} of padding. GPT-NeoX trains them "
            "and counts them in the loss; they are now zero",
            "to keep them, write it with original_vocab_size as large as padded_vocab_size",
        )
    elif target.vocabulary.padded != rows:
        yield Finding(
            "padding-rows",
            "warning",
            f"TP {target.layout.tp} needs {target.vocabulary.padded} vocabulary rows, but the run "
            f"had {rows}. The added rows are zero, and they change the loss, because GPT-NeoX "
            "includes them in the softmax",
            "choose a TP that divides the run's rows",
        )
    if target.layout.tp != state.tp and checkpoint.config.parallel_residual:
        yield Finding(
            "row-bias",
            "info",
            "with gpt_j_residual, each rank trains its own bias after attention and MLP. Their "
            f"sum moved {state.tp} x and will move {target.layout.tp} x what it does at TP 1, so "
            "from the second step on, the run is not bit for bit the same",
        )
