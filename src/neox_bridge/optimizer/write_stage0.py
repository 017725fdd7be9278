"""Writes the optimizer of ZeRO stage 0, which is part of an mp_rank file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.optimizer.write_zero import RankGroup, flat_slots, scalar_slots
from neox_bridge.tensors.flat import Flat
from neox_bridge.tensors.fragments import Parts, cut_out, joined, stand_in
from neox_bridge.tensors.pieces import OutputTensor

Stage0 = tuple[dict[str, Any], list[OutputTensor], dict[str, Parts]]


def stage0(optimizer: Optimizer, groups: Sequence[RankGroup]) -> Stage0:
    """The ``optimizer`` of a model-parallel rank, its tensors, and which of them are in parts.

    Source: torch's Optimizer.state_dict for fp32; deepspeed 0.16 runtime/fp16/fused_optimizer.py,
    state_dict, for fp16, whose flat tensors have no padding.
    """
    return _plain(groups) if optimizer.wrapper == "plain" else _fp16(optimizer.head, groups)


def _plain(groups: Sequence[RankGroup]) -> Stage0:
    tensors: list[OutputTensor] = []
    parts: dict[str, Parts] = {}
    state: dict[int, Any] = {}
    settings = []
    for group in groups:
        first = len(state)
        for name in group.shapes:
            number = len(state)
            entry = scalar_slots(group.group, f"optimizer.{number}", tensors)
            for key, named in group.states.items():
                slot, tensor = f"optimizer.{number}.{key}", named[name]
                runs = joined(cut_out(tensor, 0, prod(tensor.shape)))
                parts[slot] = [replace(p, name=f"{slot}#{n}") for n, p in enumerate(runs)]
                tensors.append(stand_in(slot, tensor.dtype, tensor.shape, parts[slot]))
                entry[key] = TensorSlot(slot)
            state[number] = entry
        settings.append({**group.group.settings, "params": list(range(first, len(state)))})
    return {"state": state, "param_groups": settings}, tensors, parts


def _fp16(head: Mapping[str, Any], groups: Sequence[RankGroup]) -> Stage0:
    tensors: list[OutputTensor] = []
    parts: dict[str, Parts] = {}
    state: dict[int, Any] = {}
    masters, settings = [], []
    for index, group in enumerate(groups):
        flat = Flat(group.shapes, 1)
        entry = scalar_slots(group.group, f"optimizer.{index}", tensors)
        entry |= flat_slots(group, flat, 0, f"optimizer.{index}.{{}}", tensors, parts)
        masters.append(entry.pop(MASTER))
        state[index] = entry
        settings.append({**group.group.settings, "params": [index]})
    inner = {"state": state, "param_groups": settings}
    last = {key: value for key, value in head.items() if key == "clip_grad"}
    first = {key: value for key, value in head.items() if key not in last}
    value = {**first, "optimizer_state_dict": inner, "fp32_groups_flat": masters, **last}
    return value, tensors, parts
