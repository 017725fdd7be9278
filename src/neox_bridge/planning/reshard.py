"""Plans a run's checkpoint on other ranks, with all that it takes to go on training there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint, LayoutName
from neox_bridge.layouts.optimizer import MASTER, Optimizer, Parameter, states
from neox_bridge.layouts.text_files import dump_json
from neox_bridge.layouts.tokenizer import describe_tokenizer
from neox_bridge.layouts.weights import model_weights
from neox_bridge.planning.batch import Batch, batch_of, spread
from neox_bridge.planning.common import drop_vocabulary_rows, text_file, tokenizer_outputs
from neox_bridge.planning.fragments import put
from neox_bridge.planning.mp_rank import Sources, buffer_names, mp_rank, parameter_name
from neox_bridge.planning.neox_files import Shape, rank_parameters, weight_files
from neox_bridge.planning.neox_yml import resume_yml
from neox_bridge.planning.optimizer_files import RankGroup, param_shapes, zero_files
from neox_bridge.planning.optimizer_stage0 import Stage0, stage0
from neox_bridge.planning.options import Options, RowBias
from neox_bridge.planning.pieces import OutputFile, OutputTensor, Plan, Whole
from neox_bridge.planning.record import neox_record, source_summary
from neox_bridge.planning.stages import DEFAULT, block_class, stage_bounds
from neox_bridge.planning.to_neox import checkpoint_args, target_shape
from neox_bridge.planning.vocabulary import Vocabulary, keep, told_multiple


@dataclass(frozen=True, slots=True)
class Resharding:
    """What a user asks for; None means: as the source has it.

    zero: ZeRO's stage. micro_batch: sequences of a rank's forward pass.
    row_bias: see ``geometry.scatter``.
    """

    tp: int | None = None
    pp: int | None = None
    layout: LayoutName | None = None
    dp: int | None = None
    zero: int | None = None
    micro_batch: int | None = None
    row_bias: RowBias = "whole"


@dataclass(frozen=True)
class _Target:
    """The target, settled. config: with the target's rows of the vocabulary."""

    shape: Shape
    config: ModelConfig
    vocabulary: Vocabulary
    dp: int
    zero: int
    batch: Batch
    bounds: tuple[range, ...]

    @property
    def prefix(self) -> str:
        """What precedes the layer's number in DeepSpeed's names."""
        return "" if self.shape.layout == "layers" else "sequential."


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
    state = checkpoint.neox
    assert state is not None
    made = _settle(checkpoint, optimizer, asked)
    weights = _wholes(checkpoint, made.config, checkpoint.tensors)
    moved = {
        key: _wholes(checkpoint, made.config, wholes)
        for key, wholes in (given or states(checkpoint, optimizer)).items()
    }
    groups = _groups(checkpoint, optimizer, made, moved)
    sources = Sources(optimizer.metas, state.tp, optimizer.generators)
    architecture, step = checkpoint.architecture, state.step
    changed = _changed(checkpoint, made)
    inside = {
        stage * made.shape.tp + rank: stage0(optimizer, mine)
        for (stage, rank), mine in groups.items()
        if optimizer.wrapper in ("plain", "fp16")
    }
    metadata = partial(_metadata, checkpoint, sources, made, groups, inside)
    parts = {
        f"{step}/mp_rank_{number:02d}_model_states.pt": found
        for number, (_, _, found) in inside.items()
    }
    files = [
        put(file, parts.get(file.path, {}))
        for file in weight_files(step, architecture, made.config, weights, made.shape, metadata)
    ]
    if not inside:
        files += list(_optimizer_files(step, checkpoint, optimizer, made, groups))
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
    }
    findings = tuple(_findings(checkpoint, made, sources))
    return Plan(source_summary(checkpoint), summary, tuple(files), (), findings)


def _settle(checkpoint: Checkpoint, optimizer: Optimizer, asked: Resharding) -> _Target:
    state, raw = checkpoint.neox, checkpoint.raw
    assert state is not None
    options = Options(
        to="neox", tp=asked.tp, pp=asked.pp, layout=asked.layout, row_bias=asked.row_bias
    )
    shape, _ = target_shape(checkpoint, options)
    vocabulary = keep(
        checkpoint.config.dims["vocab"], told_multiple(state.args, raw), state.tp, shape.tp
    )
    config = replace(checkpoint.config, dims={**checkpoint.config.dims, "vocab": vocabulary.padded})
    dp = asked.dp or optimizer.dp
    zero = optimizer.stage if asked.zero is None else asked.zero
    if zero == 2 and shape.layout == "layers":
        raise Refused(
            "ZeRO stage 2 doesn't go with pipe_parallel_size 1 or more: DeepSpeed refuses it. "
            "Use --zero 1, or --pp 0."
        )
    if (zero == 0) != (optimizer.stage == 0):
        raise BridgeError(
            f"--zero {zero}: the source is of stage {optimizer.stage}, and stage 0 keeps its "
            "states in another way. Stages 1 and 2 become each other; leave --zero out else."
        )
    told = optimizer.metas[0].get("ds_config") or {}
    batch = spread(batch_of(told, raw, optimizer.dp), dp, asked.micro_batch)
    return _Target(
        shape, config, vocabulary, dp, zero, batch, tuple(_bounds(checkpoint, shape, config))
    )


def _bounds(checkpoint: Checkpoint, shape: Shape, config: ModelConfig) -> list[range]:
    """The layers of each stage; all of them in one where there are no stages."""
    if shape.stages == 1:
        return [range(config.layers + 5)]
    counts: dict[int, int] = {}
    for (layer, _), tensor in rank_parameters(
        checkpoint.architecture, config, _wholes(checkpoint, config, checkpoint.tensors), shape, 0
    ).items():
        counts[layer] = counts.get(layer, 0) + prod(tensor.shape)
    return stage_bounds(
        str(checkpoint.raw.get("pipe_partition_method") or DEFAULT),
        config.layers,
        shape.stages,
        counts,
        tied=config.tied_embeddings,
        block=block_class(checkpoint.architecture.name),
    )


def _wholes(
    checkpoint: Checkpoint, config: ModelConfig, wholes: Mapping[str, Whole]
) -> dict[str, Whole]:
    """The tensors with the target's rows of the vocabulary; rows that are added are zeros."""
    return {
        name: drop_vocabulary_rows(wholes[name], weight, config.dims["vocab"])
        for weight, block in model_weights(checkpoint.architecture, config)
        for name in [weight.hf.format(i=block)]
    }


def _groups(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    made: _Target,
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
            found[stage, rank] = list(_rank_groups(checkpoint, optimizer, made, layers, by_state))
    return found


def _rank_groups(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    made: _Target,
    layers: range,
    by_state: Mapping[str, Mapping[Parameter, OutputTensor]],
) -> Iterator[RankGroup]:
    """The groups that have parameters in these layers, which may be none in a stage."""
    order = [p for p in _order(checkpoint) if p[0] in layers or _tied_head(made, layers, p)]
    for index, group in enumerate(optimizer.groups):
        mine = [p for p in order if optimizer.members.get(p) == index]
        if mine:
            yield RankGroup(
                group,
                {
                    key: {_named(made, p): tensors[p] for p in mine}
                    for key, tensors in by_state.items()
                },
            )


def _order(checkpoint: Checkpoint) -> list[Parameter]:
    """The parameters in the order of GPT-NeoX's modules, which is that of a state dict's keys."""
    assert checkpoint.neox is not None
    layers = checkpoint.neox.ranks[0]
    return [(layer, name) for layer in sorted(layers) for name in layers[layer]]


def _tied_head(made: _Target, layers: range, parameter: Parameter) -> bool:
    """Whether it is of the embeddings, and these layers end with the head that is tied to them."""
    return made.config.tied_embeddings and parameter[0] == 0 and made.config.layers + 4 in layers


def _named(made: _Target, parameter: Parameter) -> str:
    layout, tied = made.shape.layout, made.config.tied_embeddings
    return parameter_name(parameter, layout=layout, tied=tied)


def _changed(checkpoint: Checkpoint, made: _Target) -> dict[str, Any]:
    """The yml's keys that aren't as they were."""
    zero = {**(checkpoint.raw.get("zero_optimization") or {}), "stage": made.zero}
    return {
        "pipe_parallel_size": made.shape.stages if made.shape.layout == "layers" else 0,
        "model_parallel_size": made.shape.tp,
        "make_vocab_size_divisible_by": made.vocabulary.multiple,
        "train_micro_batch_size_per_gpu": made.batch.micro,
        "gradient_accumulation_steps": made.batch.accumulation,
        "zero_optimization": zero,
    }


def _metadata(
    checkpoint: Checkpoint,
    sources: Sources,
    made: _Target,
    groups: Mapping[tuple[int, int], list[RankGroup]],
    inside: Mapping[int, Stage0],
    number: int,
    module: Any,
) -> tuple[dict[str, Any], list[OutputTensor]]:
    stage, rank = divmod(number, made.shape.tp)
    assert checkpoint.neox is not None
    args = {**checkpoint.neox.args, **checkpoint_args(made.config, made.vocabulary, made.shape.tp)}
    if "tokenizer_type" in checkpoint.neox.args:
        args["tokenizer_type"] = checkpoint.neox.args["tokenizer_type"]
    new = {
        "module": module,
        "buffer_names": buffer_names(sources.metas, made.bounds[stage], made.prefix),
        "param_shapes": None if inside else param_shapes(groups[stage, rank]),
        "dp_world_size": made.dp,
        "mp_world_size": made.shape.stages * made.shape.tp,
        "ds_config": _ds_config(sources.metas[0].get("ds_config"), made),
        "args": args,
    }
    frozen: dict[str, Any] | None = {} if made.zero == 2 else None  # engine.py, save_frozen_param
    for key in ("frozen_param_shapes", "frozen_param_fragments"):
        if key in sources.metas[0]:
            new[key] = frozen
    if not inside:
        return mp_rank(sources, stage, rank, new)
    new["optimizer"], states, _ = inside[number]
    value, tensors = mp_rank(sources, stage, rank, new)
    return value, [*states, *tensors]


def _ds_config(told: Any, made: _Target) -> dict[str, Any]:
    config = dict(told) if isinstance(told, dict) else {}
    config["train_batch_size"] = made.batch.total
    config["train_micro_batch_size_per_gpu"] = made.batch.micro
    if made.batch.accumulation > 1 or "gradient_accumulation_steps" in config:
        config["gradient_accumulation_steps"] = made.batch.accumulation
    if "zero_optimization" in config:
        config["zero_optimization"] = {**config["zero_optimization"], "stage": made.zero}
    return config


def _optimizer_files(
    step: str,
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    made: _Target,
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


def _small_files(
    checkpoint: Checkpoint, made: _Target, changed: Mapping[str, Any], target: str
) -> list[OutputFile]:
    state = checkpoint.neox
    assert state is not None
    tokenizer = describe_tokenizer(checkpoint.tokenizer)
    told = dict(changed)
    if tokenizer.main:
        told["vocab_file"] = f"{target}/tokenizer/{tokenizer.main}"
    record = neox_record(checkpoint, checkpoint.vocab_rows, checkpoint.tokenizer_size)
    if checkpoint.config.grouped_query:
        record["gqa_order"] = made.shape.gqa_order
    yml, configs = resume_yml(checkpoint.raw, told, target)
    return [
        text_file(f"{state.step}/{RECORD}", dump_json(record), seals=True),
        text_file(f"{state.step}/configs/neox_bridge.yml", configs),
        *tokenizer_outputs(tokenizer, "tokenizer/"),
        text_file("resume.yml", yml),
        text_file("latest", state.step.encode()),
    ]


def _findings(checkpoint: Checkpoint, made: _Target, sources: Sources) -> Iterator[Finding]:
    state, batch = checkpoint.neox, made.batch
    assert state is not None
    yield Finding(
        "batch",
        "info",
        f"the global batch stays {batch.total}: {made.dp} data-parallel ranks, "
        f"train_micro_batch_size_per_gpu {batch.micro}, gradient_accumulation_steps "
        f"{batch.accumulation}",
    )
    if ranks := sources.derived(made.shape.tp):
        several = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        yield Finding(
            "random-states",
            "info",
            f"the run had no tensor-parallel rank {several}: the generator of dropout there is "
            "derived from rank 0's",
        )
    if made.vocabulary.padded != checkpoint.config.dims["vocab"]:
        yield Finding(
            "padding-rows",
            "warning",
            f"TP {made.shape.tp} needs {made.vocabulary.padded} vocabulary rows where the run had "
            f"{checkpoint.config.dims['vocab']}: zero rows are added, and they count in the loss, "
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
