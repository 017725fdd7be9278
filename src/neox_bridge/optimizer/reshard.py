"""Plans a run's checkpoint on other ranks, with all that it takes to go on training there."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from neox_bridge.architectures.base import INV_FREQ
from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.setting_defaults import COLUMN, OUTPUT_LAYER
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint, refuse_all
from neox_bridge.layouts.head import decide_head
from neox_bridge.layouts.origin import origin_settings
from neox_bridge.layouts.text_files import dump_json
from neox_bridge.layouts.tokenizer import describe_tokenizer
from neox_bridge.layouts.universal_folder import INFO, LATEST, MASTER, Parameter
from neox_bridge.layouts.unknown_keys import ignored_findings, ignoring, listed, refusals
from neox_bridge.optimizer.current_form import in_current_form, is_current, writer_version
from neox_bridge.optimizer.default_settings import computed_findings, with_own_defaults
from neox_bridge.optimizer.gradient_scale import gradient_findings
from neox_bridge.optimizer.mp_rank import Sources, buffer_names, mp_rank, parameter_name
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.reshard_target import Target, settle
from neox_bridge.optimizer.states import Optimizer, states
from neox_bridge.optimizer.target_parameters import target_parameters
from neox_bridge.optimizer.v1_form import (
    check_v1_run,
    in_v1_form,
    is_v1,
    old_random_states,
    step_lost,
    v1_files,
)
from neox_bridge.optimizer.write_stage0 import Stage0, stage0
from neox_bridge.optimizer.write_universal import Universal, universal, universal_files
from neox_bridge.optimizer.write_zero import RankGroup, param_shapes, zero_files
from neox_bridge.optimizer.zero_stage import at_stage
from neox_bridge.planning.common import text_file, tokenizer_outputs, with_vocabulary_rows
from neox_bridge.planning.drifted import with_drifted_biases
from neox_bridge.planning.model_identity import identity_of
from neox_bridge.planning.neox_files import Metadata, mp_rank_file, rank_parameters, weight_files
from neox_bridge.planning.neox_yml import in_yml, resume_yml, unnameable, unnameable_finding
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.record import neox_record, source_summary
from neox_bridge.planning.to_neox import checkpoint_args
from neox_bridge.planning.weight_dtypes import refuse_run_dtypes
from neox_bridge.tensors.fragments import put
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Whole

_ELASTIC = "elastic_checkpoint"


def plan_reshard(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    asked: Resharding,
    target: str,
    given: Mapping[str, Mapping[str, Whole]] | None = None,
) -> Plan:
    """Every file of the target. target: its absolute path, which the yml names.

    given: states to take in place of the source's, by state and Hugging Face name.
    Raises Refused for ranks that the model or the batch doesn't fit.
    """
    checkpoint = decide_head(checkpoint, None)
    state = checkpoint.neox
    assert state is not None
    checkpoint = ignoring(checkpoint, asked.ignore_keys)
    refuse_all(refusals(checkpoint, asked.ignore_keys), checkpoint.path)
    refuse_run_dtypes(checkpoint)
    read, derived = optimizer.findings, optimizer.derived_findings
    was_v1 = is_v1(optimizer)
    checkpoint, said = with_own_defaults(checkpoint, optimizer, asked.era)
    optimizer, given, made = _settled(checkpoint, optimizer, asked, given)
    weights = with_vocabulary_rows(checkpoint.architecture, made.config, checkpoint.tensors)
    moved = {
        key: with_vocabulary_rows(checkpoint.architecture, made.config, wholes)
        for key, wholes in (given or states(checkpoint, optimizer)).items()
    }
    optimizer = with_target_names(checkpoint, optimizer, made)
    groups = _groups(checkpoint, optimizer, made, moved)
    sources = Sources(optimizer.metas, state.tp, optimizer.generators)
    architecture, step = checkpoint.architecture, made.step
    changed = _changed(made)
    whole = _universal(checkpoint, optimizer, made, moved) if made.universal else None
    inside = {
        stage * made.shape.tp + rank: stage0(optimizer, mine)
        for (stage, rank), mine in groups.items()
        if optimizer.wrapper in ("plain", "fp16")
    }
    info = whole.info() if whole is not None else None
    metadata: Metadata = partial(_metadata, checkpoint, sources, made, groups, inside, info)
    if made.shape.predates_deepspeed_06:
        metadata = partial(_v1_metadata, checkpoint, sources, made)
    parts = {
        f"{step}/mp_rank_{number:02d}_model_states.pt": found
        for number, (_, _, found) in inside.items()
    }
    if whole is not None:
        count = made.shape.stages * made.shape.tp
        files = [mp_rank_file(step, number, metadata) for number in range(count)]
        files += universal_files(step, whole, optimizer, made.dp, made.zero)
    else:
        found = weight_files(step, architecture, made.config, weights, made.shape, metadata)
        files = [put(file, parts.get(file.path, {})) for file in found]
        if made.shape.predates_deepspeed_06:
            files += _v1_files(step, optimizer, made, groups)
        elif not inside:
            files += _optimizer_files(step, checkpoint, optimizer, made, groups)
    files += _small_files(checkpoint, made, changed, target)
    summary: dict[str, object] = {
        "kind": "neox",
        "architecture": architecture.name,
        "layout": made.shape.layout,
        "tensor_parallel": made.shape.tp,
        "pipeline_stages": made.shape.stages if made.shape.layout == "layers" else 0,
        "data_parallel": made.dp,
        "zero_stage": made.zero,
        "dtype": made.config.dtype,
        "step": step,
        "vocab_rows": made.vocabulary.padded,
        "parameters": sum(prod(whole.shape) for whole in weights.values()),
        "optimizer": list(optimizer.keys),
        **({"universal": True} if made.universal else {}),
    }
    start = "resume_universal.yml" if made.universal else "resume.yml"
    unnamed = [unnameable_finding(start, ("load", "save"))] if unnameable(target) else []
    findings = (
        *unnamed,
        *listed(checkpoint.unknown_keys),
        *ignored_findings(asked.ignore_keys, carried=True),
        *read,
        *said,
        *_step_findings(made, derived, was_v1),
        *_findings(checkpoint, made, sources, changed),
    )
    rows = min(checkpoint.vocab_rows, made.config.dims["vocab"])
    plan = Plan(
        source_summary(checkpoint),
        summary,
        tuple(files),
        made.settings.dropped,
        findings,
        model=identity_of(architecture.name, made.config, rows),
        fixed=(*changed, *sorted(architecture.model_keys), "precision"),
    )
    return with_drifted_biases(plan, checkpoint)


def _groups(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    made: Target,
    moved: Mapping[str, Mapping[str, Whole]],
) -> dict[tuple[int, int], list[RankGroup]]:
    """What each stage and tensor-parallel rank has of each parameter group."""
    found = {}
    config = replace(made.config, dtype="float32")
    for rank in range(made.shape.tp):
        by_state = {
            key: rank_parameters(
                checkpoint.architecture,
                config,
                wholes,
                # the moments of a bias that ranks add up are the same on every rank
                made.shape if key == MASTER else replace(made.shape, row_bias="replicated"),
                rank,
            )
            for key, wholes in moved.items()
        }
        for stage, layers in enumerate(made.bounds):
            found[stage, rank] = list(_rank_groups(optimizer, made, layers, by_state))
    return found


def _rank_groups(
    optimizer: Optimizer,
    made: Target,
    layers: range,
    by_state: Mapping[str, Mapping[Parameter, OutputTensor]],
) -> Iterator[RankGroup]:
    """The groups that have parameters in these layers, which may be none in a stage."""
    order = _of_layers(optimizer, made, layers)
    for index, group in enumerate(optimizer.groups):
        mine = [p for p in order if optimizer.members[p] == index]
        if mine:
            yield RankGroup(
                group,
                {
                    key: {_named(made, p): tensors[p] for p in mine}
                    for key, tensors in by_state.items()
                },
            )


def _of_layers(optimizer: Optimizer, made: Target, layers: range) -> list[Parameter]:
    """The parameters of a stage with these layers, in order."""
    return [p for p in optimizer.members if p[0] in layers or _tied_head(made, layers, p)]


def with_target_names(checkpoint: Checkpoint, optimizer: Optimizer, made: Target) -> Optimizer:
    """The optimizer with its parameters as the target names and orders them."""
    sources = target_parameters(checkpoint, optimizer, made.shape)
    members = {target: optimizer.members[source] for target, source in sources.items()}
    return replace(optimizer, members=members)


def _universal(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    made: Target,
    moved: Mapping[str, Mapping[str, Whole]],
) -> Universal:
    names = {p: _named(made, p) for p in optimizer.members}
    return universal(checkpoint.architecture, made.config, moved, made.shape, names)


def _tied_head(made: Target, layers: range, parameter: Parameter) -> bool:
    """Whether it is of the embeddings, and these layers end with the head that is tied to them."""
    return made.config.tied_embeddings and parameter[0] == 0 and made.config.layers + 4 in layers


def _named(made: Target, parameter: Parameter) -> str:
    layout, tied = made.shape.layout, made.config.tied_embeddings
    return parameter_name(parameter, layout=layout, tied=tied)


def _changed(made: Target) -> dict[str, Any]:
    """The yml's keys that aren't as they were."""
    raw = made.settings.raw
    zero = {**_zero(raw), "stage": made.zero}
    told = raw.get("checkpoint") or {}
    loading = {"checkpoint": {**told, "load_universal": made.universal}}
    return {
        **(loading if made.universal or told else {}),
        "pipe_parallel_size": made.shape.stages if made.shape.layout == "layers" else 0,
        "model_parallel_size": made.shape.tp,
        "make_vocab_size_divisible_by": made.vocabulary.multiple,
        "train_micro_batch_size_per_gpu": made.batch.micro,
        "gradient_accumulation_steps": made.batch.accumulation,
        "zero_optimization": zero,
        **_output_layer(made),
        **made.settings.changed,
        **(made.rescaling.yml(raw) if made.rescaling is not None else {}),
    }


def _output_layer(made: Target) -> dict[str, Any]:
    """How the output layer is divided over ranks, where GPT-NeoX would take it otherwise."""
    told = made.settings.raw.get(OUTPUT_LAYER)
    stays = told == COLUMN or (told is None and not made.shape.predates_deepspeed_06)
    return {} if stays else {OUTPUT_LAYER: COLUMN}


def _zero(settings: Mapping[str, Any]) -> dict[str, Any]:
    """ZeRO's settings without elastic_checkpoint, whose default is how the states are written."""
    zero = dict(settings.get("zero_optimization") or {})
    zero.pop(_ELASTIC, None)
    return zero


def _metadata(
    checkpoint: Checkpoint,
    sources: Sources,
    made: Target,
    groups: Mapping[tuple[int, int], list[RankGroup]],
    inside: Mapping[int, Stage0],
    info: Mapping[str, Any] | None,
    number: int,
    module: Any,
) -> tuple[dict[str, Any], list[OutputTensor]]:
    stage, rank = divmod(number, made.shape.tp)
    new = {
        "module": module,
        "buffer_names": _buffer_names(checkpoint, sources, made, stage),
        "param_shapes": None if inside else param_shapes(groups[stage, rank]),
        "dp_world_size": made.dp,
        "mp_world_size": made.shape.stages * made.shape.tp,
        "ds_config": _ds_config(sources.metas[0].get("ds_config"), made),
        "args": _args(checkpoint, made),
        INFO: info,
    }
    frozen: dict[str, Any] | None = {} if made.zero == 2 else None  # engine.py, save_frozen_param
    told = {"frozen_param_shapes": frozen, "frozen_param_fragments": frozen}
    if (made.zero == 0) != (sources.metas[0].get("param_shapes") is None):
        told |= {"shared_params": None if inside else {}, "optimizer": None}
    new |= {key: value for key, value in told.items() if key in sources.metas[0]}
    if not inside:
        return mp_rank(sources, stage, rank, new)
    new["optimizer"], states, _ = inside[number]
    value, tensors = mp_rank(sources, stage, rank, new)
    return value, [*states, *tensors]


def _v1_metadata(
    checkpoint: Checkpoint, sources: Sources, made: Target, number: int, module: Any
) -> tuple[dict[str, Any], list[OutputTensor]]:
    """An mp_rank file of GPT-NeoX v1.0."""
    stage, rank = divmod(number, made.shape.tp)
    new = {
        "module": module,
        "dp_world_size": made.dp,
        "mp_world_size": made.shape.stages * made.shape.tp,
        "args": _args(checkpoint, made),
    }
    value, tensors = mp_rank(sources, stage, rank, new)
    return value, old_random_states(tensors)


def _args(checkpoint: Checkpoint, made: Target) -> dict[str, Any]:
    """What GPT-NeoX compares at load."""
    assert checkpoint.neox is not None
    args = {**checkpoint.neox.args, **checkpoint_args(made.config, made.vocabulary, made.shape.tp)}
    if "tokenizer_type" in checkpoint.neox.args:
        args["tokenizer_type"] = checkpoint.neox.args["tokenizer_type"]
    return args


def _buffer_names(checkpoint: Checkpoint, sources: Sources, made: Target, stage: int) -> list[str]:
    """The buffers in a stage's weights: the source's, and inv_freq where the target stores it."""
    state, layers = checkpoint.neox, made.bounds[stage]
    assert state is not None
    names = buffer_names(sources.metas, layers, made.prefix)
    if made.shape.inv_freq == state.inv_freq:
        return names
    names = [name for name in names if not name.endswith(INV_FREQ)]
    if made.shape.inv_freq == "omit":
        return names
    blocks = [layer for layer in layers if 2 <= layer < checkpoint.config.layers + 2]
    return sorted(
        [*names, *(f"{made.prefix}{layer}.{INV_FREQ}" for layer in blocks)],
        key=lambda name: int(name.removeprefix(made.prefix).partition(".")[0]),
    )


def _ds_config(told: Any, made: Target) -> dict[str, Any]:
    config = dict(told) if isinstance(told, dict) else {}
    config["train_batch_size"] = made.batch.total
    config["train_micro_batch_size_per_gpu"] = made.batch.micro
    if made.batch.accumulation > 1 or "gradient_accumulation_steps" in config:
        config["gradient_accumulation_steps"] = made.batch.accumulation
    if "zero_optimization" in config:
        config["zero_optimization"] = {**_zero(config), "stage": made.zero}
    return made.rescaling.ds_config(config) if made.rescaling is not None else config


def _optimizer_files(
    step: str,
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    made: Target,
    groups: Mapping[tuple[int, int], list[RankGroup]],
) -> Iterator[OutputFile]:
    outer = dict(optimizer.head.get("outer") or {})
    if "ds_config" in outer:
        outer["ds_config"] = _ds_config(outer["ds_config"], made)
    for (stage, rank), mine in groups.items():
        yield from zero_files(
            step,
            optimizer,
            stage * made.shape.tp + rank,
            made.dp,
            made.zero,
            mine,
            outer,
            bf16=checkpoint.config.dtype == "bfloat16",
        )


def _v1_files(
    step: str,
    optimizer: Optimizer,
    made: Target,
    groups: Mapping[tuple[int, int], list[RankGroup]],
) -> Iterator[OutputFile]:
    """The optimizer's own files for GPT-NeoX v1.0."""
    raw = target_yml(made)
    for (stage, rank), mine in groups.items():
        layers = made.bounds[stage]
        order = [_named(made, p) for p in _of_layers(optimizer, made, layers)]
        number = stage * made.shape.tp + rank
        yield from v1_files(step, optimizer, number, made.dp, mine, raw, order)


def _step_findings(made: Target, derived: tuple[Finding, ...], was_v1: bool) -> Iterator[Finding]:
    """What becomes of what the source's states, or the target's, do not hold."""
    if not made.shape.predates_deepspeed_06:
        yield from derived
    elif not was_v1:
        yield step_lost()


def target_yml(made: Target) -> dict[str, Any]:
    """The target's settings, as its configs have them."""
    return {**made.settings.raw, **_changed(made)}


def _small_files(
    checkpoint: Checkpoint, made: Target, changed: Mapping[str, Any], target: str
) -> list[OutputFile]:
    state = checkpoint.neox
    assert state is not None
    tokenizer = describe_tokenizer(checkpoint.tokenizer)
    told = dict(changed)
    if checkpoint.unpadded_rows < made.vocabulary.padded:
        told |= origin_settings(checkpoint.unpadded_rows)
    if tokenizer.main:
        told["vocab_file"] = in_yml(f"{target}/tokenizer/{tokenizer.main}")
    record = neox_record(checkpoint, checkpoint.vocab_rows, checkpoint.tokenizer_size)
    if checkpoint.config.grouped_query:
        record["gqa_order"] = made.shape.gqa_order
    yml, configs = resume_yml(made.settings.raw, told, target)
    return [
        text_file(f"{made.step}/{RECORD}", dump_json(record), seals=True),
        text_file(f"{made.step}/configs/neox_bridge.yml", configs),
        *tokenizer_outputs(tokenizer, "tokenizer/"),
        # a name of its own, since it may come into a run that has the other
        text_file("resume_universal.yml" if made.universal else "resume.yml", yml),
        text_file(LATEST if made.universal else "latest", made.step.encode()),
    ]


def target_states(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    asked: Resharding,
    given: Mapping[str, Mapping[str, Whole]] | None = None,
) -> tuple[Optimizer, Mapping[str, Mapping[str, Whole]] | None]:
    """What the target should hold, to check it: the optimizer, and states not as the source's."""
    checkpoint, _ = with_own_defaults(checkpoint, optimizer, asked.era)
    optimizer, given, _ = _settled(checkpoint, optimizer, asked, given)
    return optimizer, given


def _settled(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    asked: Resharding,
    given: Mapping[str, Mapping[str, Whole]] | None,
) -> tuple[Optimizer, Mapping[str, Mapping[str, Whole]] | None, Target]:
    """The optimizer as the target has it, its states where they are not the source's, the target.

    Raises Refused where it can't be.
    """
    version = writer_version(optimizer)
    if asked.era is None and is_v1(optimizer):
        asked = replace(asked, era=era_named("v1.0"))
    if asked.era is not None:
        optimizer = in_current_form(optimizer, checkpoint.raw, asked.era.deepspeed)
    elif not is_current(optimizer):
        raise Refused(
            f"{checkpoint.path}: DeepSpeed {version or 'before 0.6'} wrote its optimizer states, "
            "and this form is read but not written. Choose the GPT-NeoX that resumes the run: "
            "--for today."
        )
    if asked.zero is not None:
        optimizer, given = at_stage(checkpoint, optimizer, asked.zero, given)
    made = settle(checkpoint, optimizer, asked, version)
    if made.rescaling is not None:
        given = made.rescaling.states(given or states(checkpoint, optimizer))
        optimizer = made.rescaling.optimizer(optimizer)
    if made.shape.predates_deepspeed_06:
        check_v1_run(optimizer, made.zero, made.config.dtype, made.universal)
        optimizer = in_v1_form(checkpoint, optimizer, target_yml(made))
    return optimizer, given, made


def _findings(
    checkpoint: Checkpoint, made: Target, sources: Sources, changed: Mapping[str, Any]
) -> Iterator[Finding]:
    state, batch = checkpoint.neox, made.batch
    assert state is not None
    yield Finding(
        "batch",
        "info",
        f"the global batch stays {batch.total}: {made.dp} data-parallel ranks, "
        f"train_micro_batch_size_per_gpu {batch.micro}, gradient_accumulation_steps "
        f"{batch.accumulation}",
    )
    effective = {"gradient_accumulation_steps": made.source.accumulation}
    if (clipping := checkpoint.raw.get("gradient_clipping")) is not None:
        effective["gradient_clipping"] = clipping
    yield from computed_findings(checkpoint.raw, effective)
    yield from gradient_findings(made.version, made.before, made.after, made.rescaling, changed)
    elastic = (checkpoint.raw.get("zero_optimization") or {}).get(_ELASTIC)
    if elastic is not None and bool(elastic) != made.shape.predates_deepspeed_06:
        yield Finding(
            "elastic-checkpoint",
            "info",
            f"zero_optimization.elastic_checkpoint: {str(bool(elastic)).lower()} is left out of "
            "the yml: the states are written as DeepSpeed saves them without it",
        )
    if made.universal:
        yield Finding(
            "load-universal",
            "info",
            "resume_universal.yml has load_universal: true, with which GPT-NeoX starts from this "
            "folder each time",
            "set it to false once the run has saved a checkpoint of its own",
        )
    if ranks := sources.derived(made.shape.tp):
        several = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        yield Finding(
            "random-states",
            "info",
            f"the run had no tensor-parallel rank {several}: the generator of dropout there is "
            "derived from rank 0's",
        )
    rows = checkpoint.config.dims["vocab"]
    if state.universal and made.vocabulary.padded != rows:
        yield Finding(
            "padding-lost",
            "warning",
            f"the universal checkpoint is without {made.vocabulary.padded - rows} rows of padding, "
            "which GPT-NeoX trains too and counts in its loss: they are zeros now",
            "write it with original_vocab_size as large as padded_vocab_size",
        )
    elif made.vocabulary.padded != rows:
        yield Finding(
            "padding-rows",
            "warning",
            f"TP {made.shape.tp} needs {made.vocabulary.padded} vocabulary rows where the run had "
            f"{rows}: zero rows are added, and they count in the loss, "
            "since GPT-NeoX's softmax sees them",
            "choose a TP that divides the run's rows",
        )
    if made.shape.tp != state.tp and checkpoint.config.parallel_residual:
        yield Finding(
            "row-bias",
            "info",
            "with gpt_j_residual each rank trains a bias of its own after attention and MLP, and "
            f"their sum moved {state.tp} x and will move {made.shape.tp} x what it does at TP 1: "
            "from its second step on this isn't bit for bit the run that it was",
        )
