"""Writes the files of ZeRO stages 1 and 2, one per data-parallel and model-parallel rank.

Keys and their order as deepspeed 0.16 writes them (runtime/engine.py, _save_zero_checkpoint;
runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py, state_dict).
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.pickles import Global, Record
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.layouts.file_names import states_file
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.states import Group, Optimizer, Scalar
from neox_bridge.tensors.flat import Flat
from neox_bridge.tensors.fragments import Parts, partition, put, stand_in
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Shape

_ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")
SIZE = Global("torch", "Size")


@dataclass(frozen=True)
class RankGroup:
    """The part of one parameter group on a model-parallel rank.

    states: by state, the parameters by DeepSpeed's names, in order.
    """

    group: Group
    states: Mapping[str, Mapping[str, OutputTensor]]

    @property
    def shapes(self) -> dict[str, Shape]:
        """The parameters' shapes on this rank."""
        first = next(iter(self.states.values()))
        return {name: tensor.shape for name, tensor in first.items()}


def param_shapes(groups: Sequence[RankGroup]) -> list[Any]:
    """``param_shapes`` of an mp_rank file."""
    return [
        OrderedDict((name, Record(SIZE, (shape,))) for name, shape in group.shapes.items())
        for group in groups
    ]


def stage_enum(stage: int) -> Record:
    """A ZeRO stage as DeepSpeed saves it."""
    return Record(Global("deepspeed.runtime.zero.config", "ZeroStageEnum"), (stage,))


def zero_files(
    folder: str,
    optimizer: Optimizer,
    groups: Mapping[int, Sequence[RankGroup]],
    dp: int,
    stage: int,
    outer: Mapping[str, Any],
    *,
    bf16: bool,
) -> Iterator[OutputFile]:
    """The files of all ranks.

    Args:
        optimizer: The source of the wrapper and the scalars.
        groups: The parameter groups, by model-parallel rank.
        stage: The ZeRO stage.
        outer: The keys of a file besides the optimizer's dictionary.
        bf16: Whether the model is in bf16.
    """
    prefix = "bf16_" if bf16 else ""
    for number, rank_groups in groups.items():
        flats = [Flat(group.shapes, dp) for group in rank_groups]
        for rank in range(dp):
            parts: dict[str, Parts] = {}
            tensors: list[OutputTensor] = []
            state: dict[int, Any] = {}
            masters = []
            for index, (group, flat) in enumerate(zip(rank_groups, flats, strict=True)):
                bare = {MASTER} if optimizer.wrapper != "bf16" else set()
                padded = group.states.keys() - bare
                slots = flat_slots(group, flat, rank, f"{{}}.{index}", tensors, parts, padded)
                masters.append(slots.pop(MASTER))
                state[index] = {**scalar_slots(group.group, f"{index}", tensors), **slots}
            settings = [{**g.group.settings, "params": [n]} for n, g in enumerate(rank_groups)]
            base = {"state": state, "param_groups": settings}
            mappings = [_mapping(flat, rank) for flat in flats]
            paddings = [_padding(optimizer, flat, rank) for flat in flats]
            head = _head(optimizer, stage, base, masters, paddings, mappings, dp)
            path = f"{folder}/{prefix}{states_file(rank, number)}"
            value = {"optimizer_state_dict": head, **outer}
            yield put(layout_pt(path, value, tensors), parts)


def flat_slots(
    group: RankGroup,
    flat: Flat,
    number: int,
    name: str,
    tensors: list[OutputTensor],
    parts: dict[str, Parts],
    padded: Collection[str] = (),
) -> dict[str, TensorSlot]:
    """A part of a flat group, for each state, by number.

    Args:
        name: The name of the slots, with ``{}`` for the state. Their tensors are added to
            ``tensors``, and the parts that are written instead to ``parts``.
        padded: The states that are padded with zeros to the size of a partition.
    """
    slots = {}
    for key, named in group.states.items():
        slot = name.format(key)
        parts[slot] = partition(slot, named, flat, number, padded=key in padded)
        size = flat.partition if key in padded else flat.used(number)
        dtype = next(iter(named.values())).dtype
        tensors.append(stand_in(slot, dtype, (size,), parts[slot]))
        slots[key] = TensorSlot(slot)
    return slots


def scalar_slots(group: Group, name: str, tensors: list[OutputTensor]) -> dict[str, Any]:
    """The non-parameter values of a group's state. Small tensors are added to ``tensors``."""
    slots: dict[str, Any] = {}
    for key, entry in group.scalars.items():
        slots[key] = entry
        if isinstance(entry, Scalar):
            slot = f"{key}.{name}"
            tensors.append(OutputTensor(slot, entry.dtype, entry.shape, inline=entry.data))
            slots[key] = TensorSlot(slot)
    return slots


def _padding(optimizer: Optimizer, flat: Flat, rank: int) -> int:
    """DeepSpeed's group_paddings. BF16_Optimizer has one total, stored for the last rank."""
    if optimizer.wrapper == "bf16":
        return flat.partition * flat.dp - flat.numel if rank == flat.dp - 1 else 0
    return flat.partition - flat.used(rank)


def _mapping(flat: Flat, rank: int) -> "OrderedDict[str, Record]":
    return OrderedDict(
        (part.name, Record(_ADDRESS, state={"numel": part.numel, "start": part.start}, new=True))
        for part in flat.fragments(rank)
    )


def _head(
    optimizer: Optimizer,
    stage: int,
    base: Mapping[str, Any],
    masters: Sequence[TensorSlot],
    paddings: Sequence[int],
    mappings: Sequence[Any],
    dp: int,
) -> dict[str, Any]:
    head = {key: value for key, value in optimizer.head.items() if key != "outer"}
    written: dict[str, Any] = {
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": list(masters),
        "zero_stage": stage_enum(stage),
        "group_paddings": list(paddings),
        "partition_count": [dp] * len(paddings),
        "ds_version": head.get("ds_version"),
        "param_slice_mappings": list(mappings),
    }
    if optimizer.wrapper == "bf16":
        del written["zero_stage"]
    before = {key: value for key, value in head.items() if key not in written}
    return {**before, **written}


def whole_head(optimizer: Optimizer, stage: int, dp: int) -> dict[str, Any]:
    """The head that a universal checkpoint keeps: no entries per parameter, no paddings."""
    head = _head(optimizer, stage, {}, [], [0] * len(optimizer.groups), [], dp)
    for key in ("base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings"):
        del head[key]
    groups = [{**g.settings, "params": [n]} for n, g in enumerate(optimizer.groups)]
    return {**head, "param_groups": groups}
