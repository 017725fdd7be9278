"""Parses one file of ZeRO states, in every format that DeepSpeed has used.

Sources: DeepSpeed 0.3.16 runtime/zero/stage1.py (_elastic_state_dict, _rigid_state_dict) and
runtime/zero/stage2.py; DeepSpeed 0.4.5 and 0.5.8 runtime/zero/stage2.py (state_dict); DeepSpeed
0.5.10 to 0.16 runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.formats.pickles import Record
from neox_bridge.frameworks.deepspeed import (
    LEAN_PARTITIONS,
    PARTITIONS,
    SUB_PARTITIONS,
    StatesKind,
    ZeroGeneration,
    release_of,
)
from neox_bridge.layouts.deepspeed_values import (
    check_config,
    check_head,
    check_tensor,
    numbers_of,
    parameter_groups,
    states_of,
)
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.layouts.untrusted import count, mapping, unexpected, whole
from neox_bridge.optimizer.read_files import scalar, stage_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural

BASE = "base_optimizer_state"
STEP = "base_optimizer_state_step"  # in elastic states of DeepSpeed 0.10 and later
INTERVALS = "num_comm_intervals_per_group"
RANKS = "partition_count"
# keys that describe the parts of the rank; older formats have more of them
_OF_PARTS = (BASE, PARTITIONS.masters, "param_slice_mappings")
_OF_OLD_PARTS = (*_OF_PARTS, STEP, INTERVALS, RANKS, SUB_PARTITIONS.masters, "group_paddings")
_NOT_OUTER = ("optimizer_state_dict", "param_shapes")
_MOST_GROUPS = 64
_MOST_INTERVALS = 1 << 16
_LEAST_PART_BYTES = 128  # of the file per part, because its pickle describes at least three tensors


@dataclass(frozen=True)
class RankStates:
    """The states of one data-parallel rank on one model-parallel rank.

    Attributes:
        parts: The states by name, masters first, by group and communication interval. All have one
            dimension. In the current format, each may end with padding; in others, all or none do.
        scalars: The non-tensor values of the states, by group.
        settings: ``param_groups`` without their parameters; None for elastic states, which have
            none.
        head: The rest of ``optimizer_state_dict``.
        outer: The other keys of the file.
    """

    path: str
    kind: StatesKind
    generation: ZeroGeneration
    parts: tuple[tuple[Mapping[str, TensorRef], ...], ...]
    scalars: tuple[Mapping[str, Any], ...]
    settings: tuple[Mapping[str, Any], ...] | None
    head: Mapping[str, Any]
    outer: Mapping[str, Any]

    @property
    def is_current(self) -> bool:
        """Whether DeepSpeed 0.5.10 and later saves this form by default."""
        return is_current(self.kind, self.generation)


def is_current(kind: StatesKind, generation: ZeroGeneration) -> bool:
    """Whether DeepSpeed 0.5.10 and later saves this form by default."""
    return kind == "rigid" and generation is PARTITIONS


def generation_of(inner: Mapping[str, Any]) -> ZeroGeneration:
    """The versions of DeepSpeed that save an ``optimizer_state_dict`` like this one."""
    if SUB_PARTITIONS.masters in inner:
        return SUB_PARTITIONS
    release = release_of(inner.get("ds_version"))
    if isinstance(inner.get(BASE), list) and (release or (0, 0, 0)) < PARTITIONS.since:
        return LEAN_PARTITIONS
    return PARTITIONS


def kind_of(inner: Mapping[str, Any]) -> StatesKind:
    """Whether states are elastic: without padding and without ``param_groups``."""
    return "elastic" if isinstance(inner.get(BASE), list) else "rigid"


def interval_counts(inner: Mapping[str, Any], path: str) -> tuple[int, ...]:
    """How many communication intervals each group has. Raises BridgeError for other values."""
    return tuple(map(len, _masters(inner, generation_of(inner), path)))


def zero_stage(value: Mapping[str, Any], raw: Mapping[str, Any], path: str) -> int:
    """The ZeRO stage of a state file.

    Before DeepSpeed 0.7.0, the file of a stage 1 run may contain 2, as a plain number. For such
    files, the settings decide. raw: the merged yml.
    """
    inner = value["optimizer_state_dict"]
    if generation_of(inner) is SUB_PARTITIONS:
        return 1
    recorded = stage_of(inner, {})
    if isinstance(inner.get("zero_stage"), Record):
        return recorded
    for config in (mapping(value, "ds_config", path), raw):
        stage = whole(mapping(config, "zero_optimization", path), "stage", path)
        if stage is not None:
            return stage
    return recorded


def rank_states(value: Mapping[str, Any], dp: int, path: str) -> RankStates:
    """Parse the content of one DeepSpeed file, which has an ``optimizer_state_dict``.

    dp: the number of data-parallel ranks that saved them. Raises BridgeError for values that
    DeepSpeed does not write there, and Refused for an optimizer that is not like Adam.
    """
    inner: Mapping[str, Any] = value["optimizer_state_dict"]
    generation = generation_of(inner)
    masters = _masters(inner, generation, path)
    _check_counts(inner, [len(group) for group in masters], dp, path)
    check_head(inner, path)
    check_config(mapping(value, "ds_config", path), path, "ds_config.")
    if kind_of(inner) == "elastic":
        entries, settings = _elastic_entries(inner, masters, generation, path), None
    else:
        entries, settings = _rigid_entries(inner, masters, path)
    padded = is_current(kind_of(inner), generation)
    of_parts = _OF_PARTS if padded else _OF_OLD_PARTS
    parts, scalars = [], []
    for index, group in enumerate(masters):
        group_parts, group_scalars = [], None
        for interval, master in enumerate(group):
            key = _key(generation, index, interval)
            tensors, others = _split(master, entries[index][interval], key, path, padded=padded)
            if group_scalars not in (None, others):
                raise BridgeError(
                    f"{path}: {BASE}[{index}] has different values in interval {interval} and in "
                    "the first. Copy the checkpoint again."
                )
            group_parts.append(tensors)
            group_scalars = others
        parts.append(tuple(group_parts))
        # later versions store the step of elastic states once
        step = count(inner, STEP, path)
        scalars.append(({} if step is None else {"step": step}) | (group_scalars or {}))
    return RankStates(
        path,
        kind_of(inner),
        generation,
        tuple(parts),
        tuple(scalars),
        settings,
        {key: entry for key, entry in inner.items() if key not in of_parts},
        {key: entry for key, entry in value.items() if key not in _NOT_OUTER},
    )


def _masters(
    inner: Mapping[str, Any], generation: ZeroGeneration, path: str
) -> list[list[TensorRef]]:
    """The fp32 weights by group and interval."""
    groups = inner.get(generation.masters)
    if not isinstance(groups, list) or not 1 <= len(groups) <= _MOST_GROUPS:
        raise unexpected(path, generation.masters, groups, f"a list of 1 to {_MOST_GROUPS} groups")
    masters = []
    for index, group in enumerate(groups):
        parts = group if generation is SUB_PARTITIONS else [group]
        key = f"{generation.masters}[{index}]"
        if not isinstance(parts, list) or not 1 <= len(parts) <= _MOST_INTERVALS:
            raise unexpected(path, key, parts, f"a list of 1 to {_MOST_INTERVALS:,} intervals")
        masters.append(
            [_part(part, _key(generation, index, n), path) for n, part in enumerate(parts)]
        )
    _check_amount(masters, generation, path)
    return masters


def _check_amount(masters: list[list[TensorRef]], generation: ZeroGeneration, path: str) -> None:
    """Raise BridgeError if one tensor represents many parts, which would exhaust memory."""
    end = max(part.offset + part.nbytes for group in masters for part in group)
    parts = sum(map(len, masters))
    if parts * _LEAST_PART_BYTES > end:
        raise BridgeError(
            f"{path}: {generation.masters} has {parts:,} parts, more than a file of this size "
            "holds. The file is damaged or malicious. Download or copy it again."
        )


def _key(generation: ZeroGeneration, index: int, interval: int) -> str:
    """The key of the master weights of a group and an interval in a file."""
    inner = f"[{interval}]" if generation is SUB_PARTITIONS else ""
    return f"{generation.masters}[{index}]{inner}"


def _part(value: object, key: str, path: str) -> TensorRef:
    """A flat part: a tensor of one dimension without gaps."""
    part = check_tensor(key, value, path)
    if len(part.shape) != 1 or part.strides is not None:
        raise BridgeError(
            f"{path}: {key} has the shape {list(part.shape)}, and a part of a flat group has one "
            "dimension. The file is damaged or malicious. Download or copy it again."
        )
    return part


def _check_counts(inner: Mapping[str, Any], intervals: list[int], dp: int, path: str) -> None:
    """Check the recorded ranks and intervals against the content of the file."""
    recorded = inner.get(INTERVALS)
    if recorded is not None and recorded != intervals:
        raise BridgeError(
            f"{path}: {INTERVALS} does not match its states, which have {intervals} intervals by "
            "group. The file is damaged. Download or copy it again."
        )
    ranks = inner.get(RANKS)
    for number in ranks if isinstance(ranks, list) else [ranks]:
        if number is not None and count({RANKS: number}, RANKS, path) != dp:
            raise BridgeError(
                f"{path}: {RANKS} is {number}, and the checkpoint has {dp} data-parallel ranks. "
                "The file is from another save. Copy the checkpoint again."
            )


def _elastic_entries(
    inner: Mapping[str, Any],
    masters: list[list[TensorRef]],
    generation: ZeroGeneration,
    path: str,
) -> list[list[Mapping[str, Any]]]:
    """The states of each group and interval: base_optimizer_state[group][interval]."""
    groups = inner[BASE]
    if len(groups) != len(masters):
        raise BridgeError(
            f"{path}: {BASE} has {plural(len(groups), 'group')}, and {generation.masters} has "
            f"{len(masters)}. The file is damaged. Download or copy it again."
        )
    entries = []
    for index, (group, parts) in enumerate(zip(groups, masters, strict=True)):
        states = group if generation is SUB_PARTITIONS else [group]
        if not isinstance(states, list) or len(states) != len(parts):
            raise unexpected(
                path, f"{BASE}[{index}]", states, f"a list of {plural(len(parts), 'interval')}"
            )
        for entry in states:
            if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
                raise unexpected(path, f"{BASE}[{index}]", entry, "states by their names")
        entries.append(states)
    return entries


def _rigid_entries(
    inner: Mapping[str, Any], masters: list[list[TensorRef]], path: str
) -> tuple[list[list[Mapping[str, Any]]], tuple[Mapping[str, Any], ...]]:
    """The states of each group and interval, and ``param_groups``, from torch's state dict.

    The intervals are the optimizer's parameters, numbered through all groups.
    """
    base = inner.get(BASE)
    if not isinstance(base, dict):
        raise unexpected(path, BASE, base, "an optimizer's state dict")
    groups = parameter_groups(base, path)
    if len(groups) != len(masters):
        raise BridgeError(
            f"{path}: param_groups has {plural(len(groups), 'group')}, and its masters have "
            f"{len(masters)}. The file is damaged. Download or copy it again."
        )
    entries = []
    for index, (group, parts) in enumerate(zip(groups, masters, strict=True)):
        numbers = numbers_of(group, index, path)
        if len(numbers) != len(parts):
            raise BridgeError(
                f"{path}: param_groups[{index}].params and the group differ: {len(numbers)} "
                f"and {plural(len(parts), 'interval')}. The file is damaged. Download or copy it "
                "again."
            )
        entries.append([states_of(base, number, path) for number in numbers])
    settings = tuple({k: v for k, v in group.items() if k != "params"} for group in groups)
    return entries, settings


def _split(
    master: TensorRef, entry: Mapping[str, Any], key: str, path: str, *, padded: bool
) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """The tensors of a part and its other values.

    padded: whether tensors may be larger than the masters; otherwise all sizes are equal.
    """
    tensors, others = {MASTER: master}, {}
    least = max(2, prod(master.shape)) if padded else 0  # smaller tensors are scalars
    for name, value in entry.items():
        if not isinstance(value, TensorRef) or not value.shape or prod(value.shape) < least:
            others[name] = _scalar(value, f"{name} beside {key}", path)
            continue
        part = _part(value, f"{name} beside {key}", path)
        if part.shape != master.shape and not padded:
            raise BridgeError(
                f"{path}: {name} beside {key} has {prod(part.shape):,} elements, and the masters "
                f"have {prod(master.shape):,}. The file is damaged. Download or copy it again."
            )
        tensors[name] = part
    if len(tensors) == 1 and not padded:
        raise Refused(
            f"{path}: the states beside {key} contain no tensors, so they are not from an "
            "optimizer like Adam. Convert only the weights."
        )
    return tensors, others


def _scalar(value: object, key: str, path: str) -> Any:
    """A value that is not a part: a number, a short text, or a tensor of one element."""
    if isinstance(value, TensorRef):
        return scalar(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise unexpected(path, key, value, "a tensor or a number")
    return value
