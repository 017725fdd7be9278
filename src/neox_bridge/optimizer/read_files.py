"""Reads the optimizer of a GPT-NeoX checkpoint, and checks it against the weights."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.deepspeed import PARTITIONS
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.deepspeed_values import (
    check_config,
    check_head,
    check_meta,
    check_settings,
    check_tensor,
    parameter_groups,
    shapes,
    states_of,
)
from neox_bridge.layouts.missing_files import rank_files, refuse_missing_ranks, told_ranks
from neox_bridge.layouts.universal_folder import MASTER, Parameter, parameter
from neox_bridge.layouts.untrusted import mapping, unexpected
from neox_bridge.optimizer.states import Group, Optimizer, SavedForm, Scalar, Wrapper
from neox_bridge.stores.paths import ahead, read_at
from neox_bridge.tensors.flat import Flat
from neox_bridge.tensors.pieces import Shape, Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

_MOST = 64  # bytes of a scalar
_NOT_OUTER = ("optimizer_state_dict", "param_shapes")
_SHARDED = ("base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings")


def read_optimizer(checkpoint: Checkpoint) -> Optimizer:
    """The optimizer's states as references. Raises BridgeError or Refused, naming the file."""
    state = checkpoint.neox
    if state is None:
        raise BridgeError(f"{checkpoint.path} isn't a GPT-NeoX checkpoint, so it has no optimizer.")
    folder = state.folder
    refuse_missing_ranks(state)
    count = state.tp * max(1, state.pp)
    paths = [os.path.join(folder, f"mp_rank_{n:02d}_model_states.pt") for n in range(count)]
    check_settings(checkpoint.raw, folder)
    metas = tuple(map(_meta, ahead(paths)))
    if state.te:
        raise Refused(
            f"{folder}: its blocks are Transformer Engine's, and their optimizer states can't be "
            "read yet. Convert the weights alone."
        )
    if state.universal:
        from neox_bridge.optimizer.read_universal import read_universal

        return read_universal(checkpoint, folder, metas)
    if state.optimizer:
        return _read_files(checkpoint, folder, metas)
    if isinstance(metas[0].get("optimizer"), dict):
        from neox_bridge.optimizer.read_stage0 import read_stage0

        return read_stage0(checkpoint, folder, metas)
    raise BridgeError(
        f"{folder} holds no optimizer states: neither *zero_pp_rank_*_optim_states.pt nor an "
        "optimizer in the mp_rank files. Use convert for its weights."
    )


def _meta(path: str) -> Mapping[str, Any]:
    value = read_torch(path)
    if not isinstance(value, dict):
        raise BridgeError(f"{path} isn't a GPT-NeoX file: it holds no dictionary.")
    check_meta(value, path)
    return value


def _read_files(
    checkpoint: Checkpoint, folder: str, metas: tuple[Mapping[str, Any], ...]
) -> Optimizer:
    state = checkpoint.neox
    assert state is not None
    from neox_bridge.optimizer.read_zero import is_handled, read_zero

    dp_recorded = told_ranks(metas[0], "dp_world_size")
    files = rank_files(state, dp_recorded, len(metas))
    if is_handled(optimizer_states(files[0][0])["optimizer_state_dict"]):
        return read_zero(checkpoint, folder, metas, files)
    dp = len(files[0])
    members: dict[Parameter, int] = {}
    shards: dict[tuple[int, Parameter], dict[str, Whole]] = {}
    groups: dict[str, Group] = {}
    keys: list[str] = []
    paths: list[str] = []
    head: dict[str, Any] = {}
    for number, meta in enumerate(metas):
        mine = files[number]
        paths += mine
        values = [_states(path) for path in ahead(mine)]
        head = head or {k: v for k, v in values[0].items() if k not in _SHARDED}
        shapes = _shapes(meta, mine[0], number)
        for index, flats in enumerate(shapes):
            flat = Flat(flats, dp)
            group, tensors = _group(values, mine, index, flat)
            label = str(group.settings.get("name", index))
            known = groups.setdefault(label, group)
            same_group(known, group, mine[0])
            keys += [key for key in tensors if key not in keys]
            for key, parts in tensors.items():
                for name, whole in flat.wholes(parts).items():
                    place = parameter(name, mine[0])
                    # tied embeddings are in the first and the last stage, kept alike by DeepSpeed
                    shards.setdefault((number % state.tp, place), {}).setdefault(key, whole)
                    members[place] = list(groups).index(label)
    wrapper: Wrapper = "zero" if "zero_stage" in head else "bf16"
    stage = stage_of(head, metas[0])
    form = SavedForm("rigid", PARTITIONS, dp, (1,) * len(groups))
    result = Optimizer(
        wrapper, stage, dp, tuple(keys), tuple(groups.values()), members, shards, head, metas,
        tuple(paths), generators(metas[0]), form,
    )  # fmt: skip
    check_weights(checkpoint, result, folder)
    return result


def optimizer_states(path: str, until: str | None = None) -> Mapping[str, Any]:
    """A file of ZeRO's, which has an ``optimizer_state_dict``. Raises BridgeError for others.

    until: the key behind it at which reading stops, see ``pickles.load``.
    """
    value = read_torch(path, until=until)
    inner = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(inner, dict):
        raise BridgeError(f"{path} holds no optimizer_state_dict: it isn't a file of DeepSpeed's.")
    if "fp32_flat_groups" in inner:
        raise Refused(f"{path} is of ZeRO stage 3, which can't be read. Save with stage 1 or 2.")
    return value


def _states(path: str) -> Mapping[str, Any]:
    value = optimizer_states(path)
    inner = value["optimizer_state_dict"]
    base = inner.get("base_optimizer_state")
    if isinstance(base, list) or "local_sub_partitions_of_fp32_groups" in inner:
        raise BridgeError(
            f"{path} holds states in another form than the file of the first rank, so their files "
            "are of different saves. Copy the checkpoint again."
        )
    if not isinstance(base, dict) or not isinstance(base.get("state"), dict):
        raise BridgeError(f"{path} holds no base_optimizer_state: it is of an unknown optimizer.")
    check_head(inner, path)
    if isinstance(value.get("ds_config"), dict):
        check_config(value["ds_config"], path, "ds_config.")
    elif value.get("ds_config") is not None:
        raise unexpected(path, "ds_config", value["ds_config"], "a mapping of names to values")
    return {**inner, "outer": {k: v for k, v in value.items() if k not in _NOT_OUTER}}


def _shapes(meta: Mapping[str, Any], path: str, number: int) -> Sequence[Mapping[str, Shape]]:
    """The parameters of a rank by group: from its mp_rank file, or from a file of its states.

    DeepSpeed 0.5.4 to 0.5.10 kept ``param_shapes`` in the latter (dd0c8fa7, 135a6256).
    """
    beside = optimizer_states(path)
    recorded = [values for values in (meta, beside) if values.get("param_shapes") is not None]
    if not recorded or not isinstance(recorded[0]["param_shapes"], list):
        raise Refused(
            f"{path} and mp_rank_{number:02d}_model_states.pt beside it hold no list param_shapes, "
            "so its flat partitions cannot be divided into parameters. DeepSpeed saves the list "
            "since 0.5.4 (2021): copy the checkpoint again."
        )
    for values in (meta, beside):
        zero = mapping(mapping(values, "ds_config", path), "zero_optimization", path)
        if zero.get("round_robin_gradients"):
            raise Refused(
                f"{path}: zero_optimization.round_robin_gradients was on, which shuffles "
                "parameters over partitions. Resume the run without it and save again."
            )
    return shapes(recorded[0], path)


def _group(
    values: Sequence[Mapping[str, Any]], paths: Sequence[str], index: int, flat: Flat
) -> tuple[Group, dict[str, list[TensorRef]]]:
    """One group's hyperparameters and, by state, its partitions by data-parallel rank."""
    tensors: dict[str, list[TensorRef]] = {}
    first: Group | None = None
    for rank, (value, path) in enumerate(zip(values, paths, strict=True)):
        masters = value.get("single_partition_of_fp32_groups")
        base = value["base_optimizer_state"]
        groups = parameter_groups(base, path)
        if not isinstance(masters, list) or index >= min(len(masters), len(groups)):
            raise BridgeError(f"{path} lacks parameter group {index}. Copy the checkpoint again.")
        _check_mappings(value, index, flat, rank, path)
        _add(tensors, MASTER, masters[index], flat, rank, path)
        scalars = {}
        for key, entry in states_of(base, index, path).items():
            if isinstance(entry, TensorRef) and prod(entry.shape) >= max(2, flat.used(rank)):
                _add(tensors, key, entry, flat, rank, path)
            else:
                scalars[key] = scalar(entry)
        settings = {k: v for k, v in groups[index].items() if k != "params"}
        group = Group(settings, scalars)
        if first is not None:
            same_group(first, group, path)
        first = first or group
    assert first is not None
    if short := [key for key, parts in tensors.items() if len(parts) < len(values)]:
        raise BridgeError(f"{paths[0]}: {some(short)} isn't on every data-parallel rank.")
    return first, tensors


def _add(
    tensors: dict[str, list[TensorRef]], key: str, part: Any, flat: Flat, rank: int, path: str
) -> None:
    used = flat.used(rank)
    part = check_tensor(key, part, path)
    size = prod(part.shape)
    first = tensors.get(key)
    if first and first[0].dtype != part.dtype:
        raise BridgeError(
            f"{path}: {key} has the dtype {part.dtype}, and in {first[0].file} {first[0].dtype}. "
            "Are they of one save?"
        )
    if not used <= size <= flat.partition:
        raise BridgeError(
            f"{path}: the partition of {key} has {size:,} elements, and by the model's shapes it "
            f"should have {flat.partition:,}. Is a file of another layout or model?"
        )
    tensors.setdefault(key, []).append(replace(part, shape=(prod(part.shape),)))


def _check_mappings(value: Mapping[str, Any], index: int, flat: Flat, rank: int, path: str) -> None:
    """DeepSpeed's own words for where parameters lie in a partition, held against ours."""
    told = value.get("param_slice_mappings")
    if not isinstance(told, list) or index >= len(told):
        return
    if not isinstance(told[index], dict):
        raise unexpected(path, f"param_slice_mappings[{index}]", told[index], "a mapping")
    theirs = {
        name: (entry.state.get("start"), entry.state.get("numel"))
        for name, entry in told[index].items()
        if isinstance(entry, Record) and isinstance(entry.state, dict)
    }
    ours = {part.name: (part.start, part.numel) for part in flat.fragments(rank)}
    if theirs != ours:
        name = next(n for n in [*theirs, *ours] if theirs.get(n) != ours.get(n))
        raise BridgeError(
            f"{path}: its param_slice_mappings put {name} at {theirs.get(name)}, and by the "
            f"param_shapes it lies at {ours.get(name)} (start, elements). Are they of one save?"
        )


def scalar(entry: Any) -> Any:
    """A state that isn't of a parameter's size: a number as it is, a small tensor as bytes."""
    if not isinstance(entry, TensorRef):
        return entry
    if entry.nbytes > _MOST:
        raise Refused(
            f"{entry.file}: the optimizer has a tensor of the shape {list(entry.shape)}, none of a "
            "parameter's: only optimizers like Adam can be read."
        )
    return Scalar(entry.dtype, entry.shape, read_at(entry.file, entry.offset, entry.nbytes))


def same_group(first: Group, second: Group, path: str) -> None:
    """Raise BridgeError where two ranks' files say different hyperparameters of one group."""
    if first.scalars != second.scalars or first.settings != second.settings:
        differ = [k for k in first.settings if first.settings[k] != second.settings.get(k)]
        differ += [k for k in first.scalars if first.scalars[k] != second.scalars.get(k)]
        raise BridgeError(
            f"{path}: {some(differ) or 'a hyperparameter'} differs between ranks, so their files "
            "are of different saves. Copy the checkpoint again."
        )


def stage_of(head: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
    """ZeRO's stage. DeepSpeed before 0.7.0 recorded 2 for stage 1 too, as a plain number."""
    recorded = head.get("zero_stage")
    if isinstance(recorded, Record) and recorded.args and isinstance(recorded.args[0], int):
        return recorded.args[0]
    config = (meta.get("ds_config") or {}).get("zero_optimization") or {}
    stage = config.get("stage")
    if stage is None and isinstance(recorded, int):
        return recorded
    return int(stage or 0)


def check_weights(checkpoint: Checkpoint, optimizer: Optimizer, folder: str) -> None:
    """Raise BridgeError unless every weight of every rank has its states, in its shape.

    Refused for states with names that no optimizer gives, since they become names of files.
    """
    if odd := [key for key in optimizer.keys if not re.fullmatch(r"\w{1,40}", key)]:
        raise Refused(f"{folder}: {odd[0][:80]!r} isn't the name of an optimizer's state.")
    assert checkpoint.neox is not None
    used = {
        ref
        for whole in checkpoint.tensors.values()
        for ref in (piece.source for piece in whole.pieces)
    }
    for rank, layers in enumerate(checkpoint.neox.ranks):
        for layer, tensors in layers.items():
            for name, ref in tensors.items():
                mine = optimizer.shards.get((rank, (layer, name)), {})
                lacking = [key for key in optimizer.keys if key not in mine]
                if ref in used and lacking:
                    raise BridgeError(
                        f"{folder}: the optimizer has no {lacking[0]} of layer {layer}: {name}. "
                        "Was that parameter frozen? Only runs that train all can be read."
                    )
                if any(whole.shape != ref.shape for whole in mine.values()):
                    raise BridgeError(
                        f"{folder}: layer {layer}: {name} has the shape {list(ref.shape)}, and its "
                        "optimizer states another. Are all files of one save?"
                    )


def generators(meta: Mapping[str, Any]) -> dict[str, bytes]:
    """The states in ``rng_tracker_states``, by name."""
    found = {}
    for name, ref in (meta.get("rng_tracker_states") or {}).items():
        if isinstance(ref, TensorRef) and ref.nbytes < 1 << 16:
            found[str(name)] = read_at(ref.file, ref.offset, ref.nbytes)
    return found
