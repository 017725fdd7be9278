"""Reads checkpoints of DeepSpeed's ZeRO stage 3, whose model files contain no weights.

The parameters in model files are empty tensors. Each data-parallel rank has an equal, padded part
of every parameter. For trained parameters it has the fp32 master weights, in its file of optimizer
states (``fp32_flat_groups``). For frozen ones it has the weights, in its model file
(``frozen_param_fragments``). When DeepSpeed loads a checkpoint, it rounds the masters to the run's
dtype.

Sources: deepspeed 0.16 runtime/zero/stage3.py (_rigid_state_dict, _rigid_load_state_dict,
_create_fp16_sub_groups), runtime/engine.py (_save_checkpoint), utils/zero_to_fp32.py.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.writers import SHAPES
from neox_bridge.layouts.deepspeed_values import check_meta, check_tensor, shapes
from neox_bridge.layouts.file_names import ZERO3, optimizer_files, zero3_file
from neox_bridge.layouts.missing_files import rank_files, told_ranks
from neox_bridge.layouts.tensor_names import check_names
from neox_bridge.layouts.transformer_engine import STATE
from neox_bridge.layouts.universal_folder import parameter
from neox_bridge.layouts.untrusted import mapping, unexpected
from neox_bridge.stores.paths import ahead
from neox_bridge.tensors.flat import part_size, wholes_of_parts
from neox_bridge.tensors.pieces import Shape, Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural, some

MASTERS = "fp32_flat_groups"
FRAGMENTS = "frozen_param_fragments"
SHARED = "shared_params"  # the owner of a parameter by its other names; only on the first rank
FROZEN = "frozen_param_shapes"
_MODULE = "module"
_SHOWN = 7  # files in a message; any number of files can be missing
_COPY_AGAIN = "Copy the checkpoint again."

Layers = dict[int, dict[str, TensorRef]]


@dataclass(frozen=True, slots=True)
class Zero3Files:
    """The paths of a step's files, by model-parallel, then data-parallel rank."""

    models: tuple[tuple[str, ...], ...]
    states: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Zero3:
    """The contents of a step.

    Attributes:
        ranks: The tensors by model-parallel rank, layer and name. Only buffers can be read. The
            others are placeholders for parameters, with their dtype and shape.
        parts: The bytes of these parameters.
        meta: The first model file.
    """

    files: Zero3Files
    ranks: list[Layers]
    parts: Mapping[TensorRef, Whole]
    meta: Mapping[str, Any]


def read_zero3(folder: str, names: Sequence[str]) -> Zero3:
    """Read a step. names: the names of its files.

    Raises BridgeError for missing files, and for values that DeepSpeed does not write there.
    """
    files = zero3_files(folder, names)
    metas = [model_file(paths[0]) for paths in files.models]
    shared = mapping(metas[0], SHARED, files.models[0][0])
    ranks: list[Layers] = []
    parts: dict[TensorRef, Whole] = {}
    for meta, models, states in zip(metas, files.models, files.states, strict=True):
        groups = shapes(meta, models[0])
        named = {name: shape for group in groups for name, shape in group.items()}
        trained = wholes_of_parts(named, _masters(states, groups))
        frozen = _frozen(meta, models)
        layers: Layers = {}
        module = _module(meta, models[0])
        if lost := sorted({*trained, *frozen} - set(module)):
            raise BridgeError(
                f"{models[0]}: its module does not list {some(lost)}, whose shapes it has. "
                f"{_COPY_AGAIN}"
            )
        for number, (name, ref) in enumerate(module.items()):
            layer, short = parameter(name, models[0])
            owner = str(shared.get(name, name))
            whole = frozen.get(owner) or trained.get(owner)
            if whole is None:
                if not prod(ref.shape):
                    raise BridgeError(
                        f"{models[0]}: the parameter {name} is empty, and neither {SHAPES} nor "
                        f"{FROZEN} lists it. {_COPY_AGAIN}"
                    )
            else:
                ref = TensorRef(models[0], -1 - number, ref.dtype, whole.shape)
                parts[ref] = whole
            layers.setdefault(layer, {})[short] = ref
        ranks.append(layers)
    return Zero3(files, ranks, parts, metas[0])


def zero3_files(folder: str, names: Sequence[str]) -> Zero3Files:
    """The files of all ranks. names: the names of the folder's files.

    Raises BridgeError with the names of missing files.
    """
    first = next(name for name in names if ZERO3.fullmatch(name))
    meta = model_file(os.path.join(folder, first))
    present = {(int(m[2]), int(m[3])): m[0] for name in names if (m := ZERO3.fullmatch(name))}
    dp = told_ranks(meta, "dp_world_size") or max(rank for rank, _ in present) + 1
    count = told_ranks(meta, "mp_world_size") or max(number for _, number in present) + 1
    states = optimizer_files(names)
    if not states:
        raise BridgeError(
            f"{folder} has no *zero_pp_rank_*_optim_states.pt. At ZeRO stage 3 the weights are in "
            f"these files, of {dp * count} ranks here: the model files contain only their shapes. "
            "Copy them too."
        )
    if dp * count > len(present):
        places = ((rank, number) for number in range(count) for rank in range(dp))
        missing = [zero3_file(*place) for place in places if place not in present][:_SHOWN]
        raise BridgeError(
            f"{folder} is incomplete: {some(missing)} missing, of {dp * count} ranks. {_COPY_AGAIN}"
        )
    if dp * count < len(present):
        extra = [name for (rank, n), name in present.items() if rank >= dp or n >= count]
        raise BridgeError(
            f"{folder} has files of more ranks than the {dp * count} that saved it: "
            f"{some(extra)}. Remove the files of the other layout."
        )
    models = tuple(
        tuple(os.path.join(folder, present[rank, number]) for rank in range(dp))
        for number in range(count)
    )
    return Zero3Files(models, tuple(map(tuple, rank_files(folder, states, dp, count))))


def model_file(path: str) -> Mapping[str, Any]:
    """The value of a model file. Raises BridgeError if it is not from DeepSpeed."""
    value = read_torch(path)
    if not isinstance(value, dict) or not isinstance(value.get(SHAPES), list):
        raise BridgeError(
            f"{path} is not a model file of ZeRO stage 3: it contains no list {SHAPES}. "
            f"{_COPY_AGAIN}"
        )
    check_meta(value, path)
    return value


def states_file_of(path: str) -> Mapping[str, Any]:
    """The value of a file of optimizer states. Raises BridgeError if it is not from stage 3."""
    value = read_torch(path)
    inner = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(inner, dict) or MASTERS not in inner:
        raise BridgeError(
            f"{path} is not from ZeRO stage 3: it contains no {MASTERS}. It may be from another "
            f"save than the model files. {_COPY_AGAIN}"
        )
    return value


def flat_parts(entries: object, sizes: Sequence[int], key: str, path: str) -> list[TensorRef]:
    """The flat tensors of a rank. sizes: the number of elements of each.

    Raises BridgeError if they do not match.
    """
    if not isinstance(entries, list) or len(entries) != len(sizes):
        raise unexpected(path, key, entries, f"a list of {plural(len(sizes), 'tensor')}")
    refs = []
    for index, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
        ref = check_tensor(f"{key}[{index}]", entry, path)
        if len(ref.shape) != 1 or ref.strides is not None:
            raise unexpected(path, f"{key}[{index}]", ref, "a tensor of one dimension")
        if not ref.shape[0] and size:
            raise Refused(
                f"{path}: {key}[{index}] is empty, because the run kept its optimizer on an NVMe "
                "disk (zero_optimization.offload_optimizer). The master weights are not in the "
                "checkpoint. Resume the run without it and save again."
            )
        if ref.shape[0] != size:
            raise BridgeError(
                f"{path}: {key}[{index}] has {ref.shape[0]:,} elements, but by the shapes in the "
                f"model file it should have {size:,}. The files may be from different saves. "
                f"{_COPY_AGAIN}"
            )
        refs.append(ref)
    return refs


def sub_group_sizes(groups: Sequence[Mapping[str, Shape]], dp: int) -> list[int]:
    """The number of elements of each flat tensor of a rank. groups: ``param_shapes``.

    There is one flat tensor for each sub-group. A parameter group is split between parameters if a
    rank's part of it exceeds ``sub_group_size`` elements.
    """
    return [sum(part_size(shape, dp) for shape in group.values()) for group in groups]


def _masters(paths: Sequence[str], groups: Sequence[Mapping[str, Shape]]) -> list[list[TensorRef]]:
    """The flat tensors of master weights by data-parallel rank."""
    sizes = sub_group_sizes(groups, len(paths))
    ranks = []
    for path in ahead(paths):
        inner = states_file_of(path)["optimizer_state_dict"]
        ranks.append(flat_parts(inner[MASTERS], sizes, MASTERS, path))
    return ranks


def _frozen(meta: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Whole]:
    """The parameters that the run does not train. meta: the first model file."""
    listed = mapping(meta, FROZEN, paths[0])
    if not listed:
        return {}
    (named,) = shapes({SHAPES: [dict(listed)]}, paths[0])
    sizes = [part_size(shape, len(paths)) for shape in named.values()]
    by_rank = []
    for path in ahead(paths):
        fragments = mapping(model_file(path), FRAGMENTS, path)
        entries = [fragments.get(name) for name in named]
        by_rank.append(flat_parts(entries, sizes, FRAGMENTS, path))
    return wholes_of_parts(named, by_rank)


def _module(meta: Mapping[str, Any], path: str) -> dict[str, TensorRef]:
    """The tensors of a model file by name. Those of parameters are empty."""
    module = mapping(meta, _MODULE, path)
    check_names(module, path)
    tensors = {name: ref for name, ref in module.items() if not name.endswith(STATE)}
    for name, ref in tensors.items():
        if not isinstance(ref, TensorRef):
            raise unexpected(path, f"{_MODULE}: {name}", ref, "a tensor")
    return tensors
