"""Reads optimizer states of ZeRO stage 3; see ``layouts.zero3``.

Source: deepspeed 0.16 runtime/zero/stage3.py, _rigid_state_dict. The number of a sub-group of
parameters is its index in ``fp32_flat_groups`` and in ``param_shapes``, and the key of its states
in torch's state dict.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.deepspeed_values import (
    check_config,
    check_head,
    numbers_of,
    parameter_groups,
    shapes,
    states_of,
)
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.layouts.transformer_engine import plain_parameter
from neox_bridge.layouts.universal_folder import MASTER, Parameter
from neox_bridge.layouts.untrusted import count, mapping
from neox_bridge.layouts.zero3 import (
    MASTERS,
    flat_parts,
    model_file,
    states_file_of,
    sub_group_sizes,
    zero3_files,
)
from neox_bridge.optimizer.rank_states import RANKS
from neox_bridge.optimizer.read_files import check_weights, generators, same_group, scalar
from neox_bridge.optimizer.states import Group, Optimizer
from neox_bridge.stores.paths import ahead
from neox_bridge.tensors.flat import wholes_of_parts
from neox_bridge.tensors.pieces import Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural

BASE = "optimizer_state_dict"


def read_zero3_states(checkpoint: Checkpoint, folder: str) -> Optimizer:
    """Read the states of every parameter.

    Raises BridgeError for files that are not of this model or of one save, and Refused for states
    of a kind that cannot be read.
    """
    files = zero3_files(folder, list_folder(folder))
    metas = tuple(model_file(paths[0]) for paths in files.models)
    groups: dict[str, Group] = {}
    members: dict[Parameter, int] = {}
    shards: dict[tuple[int, Parameter], dict[str, Whole]] = {}
    keys: dict[str, None] = {}
    head: dict[str, Any] = {}
    dp = len(files.states[0])
    for number, (meta, models, paths) in enumerate(
        zip(metas, files.models, files.states, strict=True)
    ):
        sub_groups = shapes(meta, models[0])
        sizes = sub_group_sizes(sub_groups, dp)
        parts: dict[tuple[int, str], list[list[TensorRef]]] = {}
        group_of: dict[int, int] = {}
        for path in ahead(paths):
            value = states_file_of(path)
            inner = value["optimizer_state_dict"]
            _check(inner, dp, path)
            base = mapping(inner, BASE, path)
            masters = flat_parts(inner[MASTERS], sizes, MASTERS, path)
            for label, (settings, numbers) in enumerate(_groups(base, len(sizes), path)):
                for index in numbers:
                    tensors, scalars = _split(states_of(base, index, path), sizes[index], path)
                    tensors = {MASTER: masters[index], **tensors}
                    for key, ref in tensors.items():
                        parts.setdefault((index, key), []).append([ref])
                    group = Group(settings, scalars)
                    name = str(settings.get("name", label))
                    same_group(groups.setdefault(name, group), group, path)
                    group_of[index] = list(groups).index(name)
            if not head:
                config = mapping(value, "ds_config", path)
                check_config(config, path, "ds_config.")
                outer = {key: entry for key, entry in value.items() if key != BASE}
                left = {k: v for k, v in inner.items() if k not in (BASE, MASTERS, RANKS)}
                head = {**left, "outer": outer}
        for (index, key), by_rank in parts.items():
            if len(by_rank) != dp:
                raise BridgeError(
                    f"{folder}: {key} of sub-group {index} is in the states of {len(by_rank)} of "
                    f"{dp} data-parallel ranks. The files are from different saves. Copy the "
                    "checkpoint again."
                )
            keys[key] = None
            for name, whole in wholes_of_parts(sub_groups[index], by_rank).items():
                place = plain_parameter(name, models[0])
                shards.setdefault((number, place), {})[key] = whole
                members[place] = group_of[index]
    optimizer = Optimizer(
        wrapper="zero",
        stage=3,
        dp=dp,
        keys=tuple(keys),
        groups=tuple(groups.values()),
        members=members,
        shards=shards,
        head=head,
        metas=metas,
        files=tuple(path for paths in files.states for path in paths),
        generators=generators(metas[0]),
    )
    check_weights(checkpoint, optimizer, folder)
    return optimizer


def _check(inner: Mapping[str, Any], dp: int, path: str) -> None:
    check_head(inner, path)
    ranks = count(inner, RANKS, path)
    if ranks not in (None, dp):
        raise BridgeError(
            f"{path}: {RANKS} is {ranks}, and the checkpoint has {dp} data-parallel ranks. The "
            "file is from another save. Copy the checkpoint again."
        )


def _groups(
    base: Mapping[str, Any], sub_groups: int, path: str
) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """The settings of each parameter group, and the numbers of its sub-groups."""
    groups = []
    for index, group in enumerate(parameter_groups(base, path)):
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append((settings, tuple(numbers_of(group, index, path))))
    numbers = [number for _, of_group in groups for number in of_group]
    if numbers != list(range(sub_groups)):
        raise BridgeError(
            f"{path}: its param_groups refer to {plural(len(numbers), 'sub-group')}, but the "
            f"model file lists {sub_groups}. The files may be from different saves. Copy the "
            "checkpoint again."
        )
    return groups


def _split(
    entry: Mapping[str, Any], size: int, path: str
) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """The states of a sub-group: flat tensors of its size, and the others, such as the step."""
    tensors, scalars = {}, {}
    for key, value in entry.items():
        if isinstance(value, TensorRef) and value.shape and prod(value.shape) > 1:
            (tensors[key],) = flat_parts([value], [size], key, path)
        else:
            scalars[key] = scalar(value)
    return tensors, scalars
