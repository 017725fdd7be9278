"""Writes the files of ZeRO stage 3: two for each data-parallel and model-parallel rank.

Keys and their order as deepspeed 0.16 writes them (runtime/engine.py, _save_checkpoint;
runtime/zero/stage3.py, _rigid_state_dict).
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import INV_FREQ
from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.layouts.file_names import states_file, zero3_file
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.layouts.untrusted import count, mapping
from neox_bridge.layouts.zero3 import MASTERS
from neox_bridge.optimizer.rank_states import RANKS
from neox_bridge.optimizer.read_zero3 import BASE
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.optimizer.write_zero import RankGroup, scalar_slots, stage_enum
from neox_bridge.planning.neox_files import Metadata, NeoxModel, rank_modules
from neox_bridge.tensors.flat import part_size
from neox_bridge.tensors.fragments import Parts, put, rank_parts, stand_in
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

_SUB_GROUP_ELEMENTS = 1_000_000_000  # DeepSpeed's default of sub_group_size
_OF_HEAD = ("loss_scaler", "dynamic_loss_scale", "overflow")


def sub_groups(
    groups: Sequence[RankGroup], dp: int, raw: Mapping[str, Any]
) -> tuple[RankGroup, ...]:
    """Split the parameter groups according to zero_optimization.sub_group_size.

    A sub-group ends with the parameter whose part on a rank makes it reach that size
    (runtime/zero/stage3.py, _create_fp16_sub_groups). raw: the yml of the target.
    """
    zero = mapping(raw, "zero_optimization", "the yml")
    most = count(zero, "sub_group_size", "the yml", "zero_optimization.sub_group_size")
    return tuple(
        replace(
            group,
            states={key: {name: of[name] for name in names} for key, of in group.states.items()},
        )
        for group in groups
        for names in _cut(group, dp, most or _SUB_GROUP_ELEMENTS)
    )


def _cut(group: RankGroup, dp: int, most: int) -> Iterator[list[str]]:
    """The names of the parameters of each sub-group."""
    names: list[str] = []
    elements = 0
    for name, shape in group.shapes.items():
        names.append(name)
        elements += part_size(shape, dp)
        if elements >= most:
            yield names
            names, elements = [], 0
    if names:
        yield names


def zero3_model_files(
    folder: str, model: NeoxModel, dp: int, metadata: Metadata
) -> Iterator[OutputFile]:
    """The model files, in which the parameters are empty."""
    untrained = {weight.neox for weight in model.architecture.weights if not weight.trained}
    buffers = (INV_FREQ, *(untrained - {model.architecture.shared}))
    for number, (module, tensors) in enumerate(rank_modules(model)):
        stored = [
            tensor
            if tensor.name.endswith(buffers)
            else OutputTensor(tensor.name, tensor.dtype, (0,), inline=b"")
            for tensor in tensors
        ]
        value, others = metadata(number, module)
        for rank in range(dp):
            yield layout_pt(f"{folder}/{zero3_file(rank, number)}", value, [*stored, *others])


def zero3_state_files(
    folder: str,
    optimizer: Optimizer,
    groups: Mapping[int, Sequence[RankGroup]],
    dp: int,
    outer: Mapping[str, Any],
    *,
    bf16: bool,
) -> Iterator[OutputFile]:
    """The files of optimizer states.

    Args:
        groups: The sub-groups by model-parallel rank.
        outer: The keys of a file besides the optimizer's dictionary.
        bf16: Whether the model is in bf16.
    """
    prefix = "bf16_" if bf16 else ""
    for number, of_rank in groups.items():
        settings = _param_groups(of_rank)
        for rank in range(dp):
            parts: dict[str, Parts] = {}
            tensors: list[OutputTensor] = []
            states: dict[int, dict[str, Any]] = {}
            for index, group in enumerate(of_rank):
                states[index] = scalar_slots(group.group, f"{index}", tensors)
                elements = sum(part_size(shape, dp) for shape in group.shapes.values())
                for key, named in group.states.items():
                    slot = f"{key}.{index}"
                    parts[slot] = rank_parts(slot, named, dp, rank)
                    dtype = next(iter(named.values())).dtype
                    tensors.append(stand_in(slot, dtype, (elements,), parts[slot]))
                    states[index][key] = TensorSlot(slot)
            masters = [state.pop(MASTER) for state in states.values()]
            head = {
                "zero_stage": stage_enum(3),
                **{key: optimizer.head[key] for key in _OF_HEAD if key in optimizer.head},
                RANKS: dp,
                BASE: {"state": states, "param_groups": settings},
                MASTERS: masters,
            }
            path = f"{folder}/{prefix}{states_file(rank, number)}"
            value = {"optimizer_state_dict": head, **outer}
            yield put(layout_pt(path, value, tensors), parts)


def _param_groups(of_rank: Sequence[RankGroup]) -> list[dict[str, Any]]:
    """torch's ``param_groups``: the settings, and the numbers of the sub-groups."""
    numbers: OrderedDict[int, list[int]] = OrderedDict()
    for index, group in enumerate(of_rank):
        numbers.setdefault(id(group.group), []).append(index)
    by_id = {id(group.group): group.group for group in of_rank}
    return [{**by_id[key].settings, "params": params} for key, params in numbers.items()]
