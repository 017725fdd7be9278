"""Reads the optimizer states of DeepSpeed's universal checkpoints; see ``layouts.universal``."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.deepspeed_values import check_head, parameter_groups
from neox_bridge.layouts.file_names import rank_file
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.layouts.universal import by_rank, parameter_shapes, stored_states
from neox_bridge.layouts.universal_folder import MASTER, STATE, STEP, ZERO, Parameter, parameter
from neox_bridge.optimizer.read_files import check_weights, generators, scalar, stage_of
from neox_bridge.optimizer.states import Group, Optimizer
from neox_bridge.stores.paths import isfile
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.wording import plural


def read_universal(
    checkpoint: Checkpoint, folder: str, metas: tuple[Mapping[str, Any], ...]
) -> Optimizer:
    """Read the states of a universal source. Raises BridgeError if they do not match the model."""
    state = checkpoint.neox_state
    path = os.path.join(folder, ZERO, STATE)
    state_file = read_torch(path)
    groups = state_file.get("param_groups") if isinstance(state_file, dict) else None
    if not isinstance(state_file, dict) or not isinstance(groups, list) or not groups:
        raise BridgeError(
            f"{path} is not from a universal checkpoint: it contains no param_groups."
        )
    parameter_groups(state_file, path)
    check_head(state_file, path)
    members: dict[str, int] = {}
    for number, meta in enumerate(metas):
        shapes = parameter_shapes(meta, folder)
        if len(shapes) != len(groups):
            raise BridgeError(
                f"{folder}/{rank_file(number)} has {plural(len(shapes), 'parameter group')} and "
                f"{path} {len(groups)}. They may be from different saves. Copy the checkpoint "
                "again."
            )
        members |= {name: index for index, group in enumerate(shapes) for name in group}
    shards: dict[tuple[int, Parameter], dict[str, Whole]] = {}
    keys = _keys(folder, next(iter(members)))
    for key in keys:
        for rank, layers in enumerate(by_rank(stored_states(folder, key), state.tp)):
            for layer, tensors in layers.items():
                for name, ref in tensors.items():
                    shards.setdefault((rank, (layer, name)), {})[key] = whole_of(ref)
    parameter_groups_ = [
        Group(
            {key: value for key, value in group.items() if key != "params"},
            _step(folder, [name for name, at in members.items() if at == index]),
        )
        for index, group in enumerate(groups)
    ]
    head = {key: value for key, value in state_file.items() if key != "param_groups"}
    outer = {key: metas[0].get(key) for key in ("ds_config", "ds_version")}
    result = Optimizer(
        "zero" if "zero_stage" in head else "bf16",
        stage_of(head, metas[0]),
        int(metas[0].get("dp_world_size") or 1),
        keys,
        tuple(parameter_groups_),
        {parameter(name, path): index for name, index in members.items()},
        shards,
        {**head, "outer": outer},
        metas,
        (),
        generators(metas[0]),
    )
    check_weights(checkpoint, result, folder)
    return result


def _keys(folder: str, name: str) -> tuple[str, ...]:
    """The states of a parameter, masters first."""
    files = list_folder(os.path.join(folder, ZERO, name))
    keys = sorted(file[:-3] for file in files if file.endswith(".pt"))
    return (MASTER, *(key for key in keys if key not in ("fp32", STEP)))


def _step(folder: str, names: Sequence[str]) -> dict[str, Any]:
    """The step of a group, which must be equal for all its parameters."""
    paths = [os.path.join(folder, ZERO, name, f"{STEP}.pt") for name in names]
    steps = [scalar(read_torch(path)) for path in paths if isfile(path)]
    if not steps:
        return {}
    for path, step in zip(paths, steps, strict=False):
        if step != steps[0] or len(steps) < len(paths):
            raise BridgeError(
                f"{path}: not all parameters have the same step. Copy the checkpoint again."
            )
    return {STEP: steps[0]}
