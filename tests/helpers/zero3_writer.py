"""Writes checkpoints of ZeRO stage 3 as DeepSpeed 0.16 does for GPT-NeoX, by rules written anew.

Nothing here is shared with the package. tests/neox/test_zero3_neox.py holds these files against
those that the real GPT-NeoX writes. Sources: DeepSpeed 0.16 runtime/zero/stage3.py
(_rigid_state_dict), runtime/zero/partition_parameters.py, runtime/engine.py (_save_checkpoint).
"""

import enum
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import yaml
import zero_writer
from zero_writer import LR_SCHEDULER, Model, Parameter, States

PADDING = 7.0  # DeepSpeed leaves there what was in memory
CONFIG = "deepspeed.runtime.zero.config"


class ZeroStageEnum(int, enum.Enum):
    """DeepSpeed's, by its name in pickles."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


ZeroStageEnum.__module__ = CONFIG


@dataclass(frozen=True)
class Zero3:
    """How a checkpoint is saved. sub_group: sub_group_size, in elements of a rank's part.

    frozen: the parameters that the run does not train.
    """

    dp: int = 2
    sub_group: int = 10**9
    frozen: Sequence[Parameter] = ()
    iteration: int = 8


def write(model: Model, save: Zero3, root: Path) -> Path:
    """A run with one step, in float16. Returns its folder."""
    step = root / f"global_step{save.iteration}"
    (step / "configs").mkdir(parents=True)
    settings = yaml.safe_load(zero_writer._yml(model, zero_writer.Save(stages=[])))
    zero = {"stage": 3, "sub_group_size": save.sub_group}
    settings |= {"zero_optimization": zero, "tokenizer_type": "HFTokenizer"}
    (step / "configs" / "run.yml").write_text(yaml.safe_dump(settings))
    (root / "latest").write_text(step.name)
    for number, states in enumerate(model.ranks):
        named = {f"sequential.{layer}.{name}": held for (layer, name), held in states.items()}
        frozen = {f"sequential.{layer}.{name}" for layer, name in save.frozen}
        groups = _sub_groups({n: s for n, s in named.items() if n not in frozen}, save)
        for rank in range(save.dp):
            start = f"zero_pp_rank_{rank}_mp_rank_{number:02d}"
            meta = _meta(model, save, named, frozen, groups, rank)
            _save(step / f"{start}_model_states.pt", meta)
            _save(step / f"{start}_optim_states.pt", _states(save, groups, rank))
    return root


SubGroups = list[tuple[int, dict[str, States]]]  # the parameter group, and the parameters


def _sub_groups(named: dict[str, States], save: Zero3) -> SubGroups:
    """The parameters of each flat tensor."""
    sub_groups: SubGroups = []
    for index, group in enumerate(zero_writer._groups(named, 0.1)):
        members: dict[str, States] = {}
        for name, states in group.items():
            members[name] = states
            held = sum(_size(s["fp32"], save.dp) for s in members.values())
            if held >= save.sub_group:
                sub_groups.append((index, members))
                members = {}
        if members:
            sub_groups.append((index, members))
    return sub_groups


def _size(values: Any, dp: int) -> int:
    return math.ceil(values.size / dp)


def _part(values: Any, dp: int, rank: int) -> torch.Tensor:
    """A rank's part of a parameter, padded."""
    size = _size(values, dp)
    flat = torch.full((size * dp,), PADDING)
    flat[: values.size] = torch.from_numpy(values.reshape(-1))
    return flat[rank * size : (rank + 1) * size]


def _meta(
    model: Model,
    save: Zero3,
    named: dict[str, States],
    frozen: set[str],
    groups: SubGroups,
    rank: int,
) -> dict[str, Any]:
    shapes = {name: torch.Size(states["fp32"].shape) for name, states in named.items()}
    module: OrderedDict[str, torch.Tensor] = OrderedDict()
    buffers = []
    for name in named:
        module[name] = torch.empty(0, dtype=torch.float16)
        if name.endswith("query_key_value.bias"):  # which rotary_emb follows in the module
            buffer = name.replace("query_key_value.bias", "rotary_emb.inv_freq")
            module[buffer] = zero_writer._inv_freq(model)
            buffers.append(buffer)
    still = [name for name in named if name in frozen]
    fragments = [_part(named[name]["fp32"], save.dp, rank).half() for name in still]
    return {
        "module": module,
        "buffer_names": buffers,
        "optimizer": None,
        "param_shapes": [OrderedDict((n, shapes[n]) for n in group) for _, group in groups],
        "frozen_param_shapes": OrderedDict((name, shapes[name]) for name in still),
        "shared_params": {},
        "frozen_param_fragments": OrderedDict(zip(still, fragments, strict=True)),
        "lr_scheduler": LR_SCHEDULER,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": save.iteration,
        "global_samples": 4 * save.iteration,
        "dp_world_size": save.dp,
        "mp_world_size": len(model.ranks),
        "ds_config": _config(save),
        "ds_version": "0.16.5",
        "iteration": save.iteration,
        "args": zero_writer.args_of(model),
        "torch_rng_state": torch.full((16,), rank, dtype=torch.uint8),
    }


def _config(save: Zero3) -> dict[str, Any]:
    return {
        "train_batch_size": 2 * save.dp,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-08}},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3, "sub_group_size": save.sub_group},
    }


def _scaler() -> zero_writer.DynamicLossScaler:
    scaler = zero_writer.DynamicLossScaler()
    state = {"cur_scale": 4096, "dynamic": True, **zero_writer.SCALER, "dtype": torch.float16}
    scaler.__dict__ = state
    return scaler


def _states(save: Zero3, groups: SubGroups, rank: int) -> dict[str, Any]:
    flat = {
        kind: [
            torch.cat([_part(states[kind], save.dp, rank) for states in group.values()])
            for _, group in groups
        ]
        for kind in zero_writer.KINDS
    }
    state = {
        n: {"step": torch.tensor(9.0), **{k: flat[k][n] for k in zero_writer.KINDS[1:]}}
        for n in range(len(groups))
    }
    numbers = [[n for n, (index, _) in enumerate(groups) if index == group] for group in range(2)]
    settings = [
        {
            **{"lr": 0.009, "betas": (0.9, 0.95), "eps": 1e-08, "amsgrad": False},
            "weight_decay": decay,
            "name": name,
            "params": params,
        }
        for decay, name, params in zip(
            (0.1, 0.0), ("weight_decay_params", "no_weight_decay_params"), numbers, strict=True
        )
    ]
    inner = {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": _scaler(),
        "dynamic_loss_scale": True,
        "overflow": False,
        "partition_count": save.dp,
        "optimizer_state_dict": {"state": state, "param_groups": settings},
        "fp32_flat_groups": flat["fp32"],
    }
    return {"optimizer_state_dict": inner, "ds_config": _config(save), "ds_version": "0.16.5"}


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """While it is entered, pickle finds DeepSpeed's classes by their names."""
    module = ModuleType(CONFIG)
    module.ZeroStageEnum = ZeroStageEnum  # type: ignore[attr-defined]
    with zero_writer.scaler_module(), patch.dict(sys.modules, {CONFIG: module}):
        yield


def _save(path: Path, value: Any) -> None:
    with deepspeed_names():
        torch.save(value, path)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the value of a file."""
    with deepspeed_names():
        value = torch.load(path, weights_only=False)
    change(value)
    _save(path, value)
