"""Creates a new optimizer: masters from the weights, zero moments, a schedule at a step."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.architectures.pipeline_stages import holds, with_owners
from neox_bridge.errors import Refused
from neox_bridge.layouts.universal_folder import MASTER, Parameter
from neox_bridge.optimizer.current_form import ADAM, DECAYING, STILL
from neox_bridge.optimizer.gradient_scale import ADAMS
from neox_bridge.optimizer.mp_rank import parameter_name
from neox_bridge.optimizer.parameter_order import divided
from neox_bridge.optimizer.states import DEEPSPEED, Group, Optimizer
from neox_bridge.optimizer.write_zero import RankGroup, param_shapes, zero_files
from neox_bridge.planning.neox_files import (
    NeoxModel,
    NewOptimizer,
    RankLayout,
    rank_parameters,
    stage_layers,
)
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import OutputTensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def fresh(model: NeoxModel, training: Mapping[str, Any], iteration: int, dp: int) -> NewOptimizer:
    """The optimizer for a target. model: with its tensors in the source's dtype.

    training: the keys of the yml. Raises Refused for optimizers other than Adam, and for models
    with another parameter order.
    """
    architecture, config, layout = model.architecture, model.config, model.layout
    adam = training.get("optimizer") or {}
    if str(adam.get("type", "adam")).lower() not in ADAMS:
        raise Refused(
            f"`optimizer=fresh`: the settings' optimizer is {adam['type']}, but only the states "
            "of Adam can be created. Leave the option out."
        )
    if layout.te or (layout.old_names and architecture.gated):
        raise Refused(
            "`optimizer=fresh`: not supported for Transformer Engine modules and for gated MLPs "
            "of GPT-NeoX before 2024-09. Leave out `te=True`, and use `era=today`."
        )
    params = adam.get("params") or {}
    schedule = schedule_of(training, float(params.get("lr", 1e-5)), iteration)
    bounds = stage_layers(model, training)
    owners = with_owners(architecture, config.layers, bounds)
    by_rank = [_states(replace(model, architecture=owners), n) for n in range(layout.tp)]
    decay = float(training.get("weight_decay", 0.1))
    settings = {
        **ADAM,
        "lr": learning_rate(schedule),
        "betas": tuple(params.get("betas", (0.9, 0.999))),
        "eps": float(params.get("eps", 1e-8)),
    }
    none = Group({**settings, "weight_decay": 0.0, "name": STILL}, {"step": 0})
    some = Group({**settings, "weight_decay": decay, "name": DECAYING}, {"step": 0})
    groups = (some, none) if decay else (none,)
    data_types = training.get("data_types") or {}
    high = config.dtype == "bfloat16" and data_types.get("grad_accum_dtype") in ("fp32", "float32")
    head = {"clip_grad": float(training.get("gradient_clipping", 1.0)), "ds_version": DEEPSPEED}
    optimizer = Optimizer(
        "bf16" if high else "zero", 1, dp, (MASTER, *_MOMENTS), groups, {}, {}, head, (), (), {}
    )  # fmt: skip
    rank_groups = {
        stage * layout.tp + rank: _groups(config, layout, layers, groups, states)
        for stage, layers in enumerate(bounds)
        for rank, states in enumerate(by_rank)
    }
    zero = training.get("zero_optimization") or {}
    stage = 2 if zero.get("stage") == 2 and layout.name == "ranks" else 1
    micro = int(training.get("train_micro_batch_size_per_gpu", 4))
    passes = int(training.get("gradient_accumulation_steps", 1))
    ds_config = {
        "train_batch_size": micro * passes * dp,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "zero_optimization": {"stage": stage},
    }
    values = [
        {
            "param_shapes": param_shapes(rank_groups[number]),
            "lr_scheduler": dict(schedule),
            "global_samples": iteration * micro * passes * dp,
            "dp_world_size": dp,
            "ds_config": dict(ds_config),
        }
        for number in range(len(rank_groups))
    ]
    outer = {"ds_config": ds_config, "ds_version": DEEPSPEED}
    bf16 = config.dtype == "bfloat16"
    files = zero_files(
        f"global_step{iteration}", optimizer, rank_groups, dp, stage, outer, bf16=bf16
    )
    return NewOptimizer(stage, values, tuple(files))


def schedule_of(training: Mapping[str, Any], lr: float, iteration: int) -> dict[str, Any]:
    """The state of GPT-NeoX's AnnealingLR at a step (megatron/training.py, learning_rates.py)."""
    last = training.get("lr_decay_iters")
    total = int(training.get("train_iters") or 1)
    if last is None:
        last = math.floor(total * float(training.get("lr_decay_fraction") or 1.0))
    last = max(1, int(last))
    return {
        "start_lr": lr,
        "warmup_iter": float(training.get("warmup", 0.01)) * last,
        "num_iters": iteration,
        "decay_style": str(training.get("lr_decay_style", "linear")),
        "end_iter": last,
        "min_lr": float(training.get("min_lr", 0.0)),
    }


def learning_rate(schedule: Mapping[str, Any]) -> float:
    """The learning rate at the step of the schedule, as in AnnealingLR.get_lr."""
    start, low = float(schedule["start_lr"]), float(schedule["min_lr"])
    at, warmup = float(schedule["num_iters"]), float(schedule["warmup_iter"])
    style = schedule["decay_style"]
    if warmup > 0 and at <= warmup:
        return start * max(1, at) / warmup
    at, end = at - warmup, float(schedule["end_iter"]) - warmup
    if style == "linear":
        rate = start * (end - at) / end
    elif style == "cosine":
        rate = low + (start - low) / 2.0 * (math.cos(math.pi * at / end) + 1)
    elif style == "exponential":
        rate = start * math.exp(-0.693 * at / float(schedule["end_iter"]))
    else:
        rate = start
    return max(rate, low)


def _states(model: NeoxModel, rank: int) -> dict[str, dict[Parameter, OutputTensor]]:
    """One rank's masters and moments."""
    wholes = {name: replace(whole, dtype="float32") for name, whole in model.wholes.items()}
    config = replace(model.config, dtype="float32")
    rank_masters = rank_parameters(replace(model, config=config, wholes=wholes), rank)
    zeros = {
        place: OutputTensor(t.name, "float32", t.shape, (constant(t.shape, 0.0),))
        for place, t in rank_masters.items()
    }
    return {MASTER: rank_masters, **dict.fromkeys(_MOMENTS, zeros)}


def _groups(
    config: ModelConfig,
    layout: RankLayout,
    layers: range,
    groups: tuple[Group, ...],
    states: Mapping[str, Mapping[Parameter, OutputTensor]],
) -> list[RankGroup]:
    stage_shapes = {
        place: tensor.shape
        for place, tensor in sorted(states[MASTER].items(), key=lambda item: item[0][0])
        if holds(config, layers, place[0])
    }
    named = {
        p: parameter_name(p, layout=layout.name, tied=config.tied_embeddings) for p in stage_shapes
    }
    return [
        RankGroup(
            group, {key: {named[p]: tensors[p] for p in part} for key, tensors in states.items()}
        )
        for group, part in zip(groups, divided(stage_shapes, len(groups), ""), strict=True)
        if part
    ]
