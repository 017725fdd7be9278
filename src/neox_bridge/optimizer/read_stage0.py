"""Reads the optimizer of ZeRO stage 0 from the mp_rank files, which have no parameter names.

fp32: torch's state dict, with the states of each parameter. fp16: deepspeed 0.16
runtime/fp16/fused_optimizer.py, FP16_Optimizer, with one flat tensor per group, without padding.
The order of parameters is that of GPT-NeoX's modules.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.deepspeed_values import (
    check_stage0_scaler,
    check_tensor,
    numbers_of,
    parameter_groups,
    states_of,
)
from neox_bridge.layouts.file_names import rank_file
from neox_bridge.layouts.transformer_engine import plain_name
from neox_bridge.layouts.universal_folder import MASTER, Parameter
from neox_bridge.layouts.untrusted import mapping, sequence
from neox_bridge.optimizer.parameter_order import divided, source_bounds, stored_parameters
from neox_bridge.optimizer.read_files import check_weights, generators, scalar
from neox_bridge.optimizer.states import Group, Optimizer
from neox_bridge.tensors.flat import Flat
from neox_bridge.tensors.pieces import Shape, Whole, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural


def read_stage0(
    checkpoint: Checkpoint, folder: str, metas: tuple[Mapping[str, Any], ...]
) -> Optimizer:
    """Read the states of a stage 0 source. Raises BridgeError if they do not match the model."""
    state = checkpoint.neox_state
    members: dict[Parameter, int] = {}
    shards: dict[tuple[int, Parameter], dict[str, Whole]] = {}
    groups: dict[int, Group] = {}
    bounds = source_bounds(checkpoint)
    for number, meta in enumerate(metas):
        stage, rank = divmod(number, state.tp)
        path = f"{folder}/{rank_file(number)}"
        named = stored_parameters(checkpoint, bounds[stage], rank)
        head = mapping(meta, "optimizer", path)
        inner = head.get("optimizer_state_dict")
        if inner is not None and "fp32_groups_flat" not in head:
            raise Refused(
                f"{path}: its optimizer (such as DeepSpeed's FP16_UnfusedOptimizer) cannot be "
                "read. Resume the run with a fused Adam or ZeRO stage 1, and save it again."
            )
        if inner is not None:
            check_stage0_scaler(head, path)
        torch_state = head if inner is None else mapping(head, "optimizer_state_dict", path)
        param_groups = parameter_groups(torch_state, path)
        if len(param_groups) not in (1, 2):
            raise BridgeError(
                f"{path}: param_groups of its optimizer has {len(param_groups)} groups, but "
                "GPT-NeoX writes one or two. The file is damaged. Download or copy it again."
            )
        for index, stored in enumerate(divided(named, len(param_groups), path)):
            group_shapes = {
                (layer, plain_name(n)[0]): shape for (layer, n), shape in stored.items()
            }
            if inner is None:
                scalars = _plain(torch_state, index, group_shapes, rank, shards, path)
            else:
                scalars = _flat(head, index, group_shapes, rank, shards, path)
            settings = {k: v for k, v in param_groups[index].items() if k != "params"}
            groups.setdefault(index, Group(settings, scalars))
            members |= dict.fromkeys(group_shapes, index)
    head = metas[0]["optimizer"]
    flat = "fp32_groups_flat" in head
    kept = {k: v for k, v in head.items() if k not in ("optimizer_state_dict", "fp32_groups_flat")}
    keys = list(dict.fromkeys(key for states in shards.values() for key in states))
    result = Optimizer(
        "fp16" if flat else "plain",
        0,
        int(metas[0].get("dp_world_size") or 1),
        tuple(keys),
        tuple(groups[index] for index in sorted(groups)),
        members,
        shards,
        kept if flat else {},
        metas,
        (),
        generators(metas[0]),
    )
    check_weights(checkpoint, result, folder)
    return result


def _plain(
    state: Mapping[str, Any],
    index: int,
    group_shapes: Mapping[Parameter, Shape],
    rank: int,
    shards: dict[tuple[int, Parameter], dict[str, Whole]],
    path: str,
) -> dict[str, Any]:
    """Fill ``shards`` from per-parameter states; return the other states of the group."""
    numbers = numbers_of(state["param_groups"][index], index, path)
    if len(numbers) != len(group_shapes):
        raise BridgeError(
            f"{path}: group {index} of its optimizer has {plural(len(numbers), 'parameter')}, "
            f"but by the model it should have {len(group_shapes)}. Part of the model may have been "
            "frozen."
        )
    scalars: dict[str, Any] = {}
    for number, (place, shape) in zip(numbers, group_shapes.items(), strict=True):
        for key, entry in states_of(state, number, path).items():
            if isinstance(entry, TensorRef) and entry.shape:
                check_tensor(key, entry, path)
                if entry.shape != shape:
                    raise BridgeError(
                        f"{path}: {key} of parameter {number} has the shape {list(entry.shape)}, "
                        f"and layer {place[0]}: {place[1]} has {list(shape)}. The optimizer may "
                        "belong to another model. Copy the file again."
                    )
                shards.setdefault((rank, place), {})[key] = whole_of(entry)
            else:
                # DeepSpeed's FusedAdam counts the steps only at the last parameter of a group
                scalars[key] = scalar(entry)
    return scalars


def _flat(
    value: Mapping[str, Any],
    index: int,
    group_shapes: Mapping[Parameter, Shape],
    rank: int,
    shards: dict[tuple[int, Parameter], dict[str, Whole]],
    path: str,
) -> dict[str, Any]:
    """The same from flat tensors, including the masters."""
    flat = Flat({f"{layer}.{name}": shape for (layer, name), shape in group_shapes.items()}, 1)
    masters = sequence(value, "fp32_groups_flat", path)
    if index >= len(masters):
        raise BridgeError(
            f"{path}: fp32_groups_flat has no tensor for the parameter group {index}. Copy the "
            "file again."
        )
    entries: dict[str, Any] = {MASTER: check_tensor(MASTER, masters[index], path)}
    entries |= states_of(value["optimizer_state_dict"], index, path)
    scalars: dict[str, Any] = {}
    for key, entry in entries.items():
        if not isinstance(entry, TensorRef) or not entry.shape:
            scalars[key] = scalar(entry)
            continue
        check_tensor(key, entry, path)
        if prod(entry.shape) != flat.numel:
            raise BridgeError(
                f"{path}: {key} of group {index} has {prod(entry.shape):,} elements, but by the "
                f"model it should have {flat.numel:,}. Part of the model may have been frozen."
            )
        wholes = flat.wholes([replace(entry, shape=(flat.numel,))])
        for place, whole in zip(group_shapes, wholes.values(), strict=True):
            shards.setdefault((rank, place), {})[key] = whole
    return scalars
