"""Reads DeepSpeed's universal checkpoints: ``zero/NAME/fp32.pt``, ``exp_avg.pt`` and so on.

Each file contains one whole state of one parameter, and how the ranks shared it: ``cat_dim``, or
nothing if each rank had all of it. Sources: DeepSpeed 0.16 checkpoint/ds_to_universal.py, which
writes the files; checkpoint/universal_checkpoint.py and runtime/base_optimizer.py, which read them.
The weights are read from their fp32 master weights, as in DeepSpeed. There are no layer files.

GPT-NeoX does not tell ds_to_universal.py how its ranks share parameters. Every parameter then has
``cat_dim`` 0, so a file contains the parts of the ranks one behind the other.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig
from neox_bridge.architectures.rows import model_rows
from neox_bridge.errors import BridgeError
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.layouts.deepspeed_values import check_tensor, shapes
from neox_bridge.layouts.tensor_names import check_names
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.layouts.universal_folder import MASTER, STATE, ZERO, file_name, parameter
from neox_bridge.stores.paths import isfile
from neox_bridge.tensors.pieces import Whole, box
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

Shards = list[dict[int, dict[str, TensorRef]]]  # by rank, by layer, by name


@dataclass(frozen=True, slots=True)
class Masters:
    """The fp32 master weights and their files.

    Attributes:
        ranks: The tensors by rank. If the files contain whole tensors, there is only one rank.
        files: The files.
        numbered: Whether the parameters have the names of a run without pipeline stages.
    """

    ranks: Shards
    files: tuple[str, ...]
    numbered: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """One state of one parameter. joined: whether it is the ranks' parts behind each other."""

    ref: TensorRef
    joined: bool


def masters(folder: str, metas: Sequence[Mapping[str, Any]], tp: int) -> Masters:
    """The master weights, from which a model is read.

    Args:
        folder: The folder of the step.
        metas: The values of the mp_rank files.
        tp: The tensor-parallel ranks of the run.

    Raises:
        BridgeError: A file is missing, or does not belong to a universal checkpoint.
    """
    states = stored_states(folder, MASTER)
    order = [name for meta in metas for group in parameter_shapes(meta, folder) for name in group]
    if odd := sorted(set(order) ^ set(states)):
        raise BridgeError(
            f"{folder}: {some(odd)} is not in both {ZERO} and the param_shapes of the mp_rank "
            "files. Copy the checkpoint again."
        )
    files = tuple(stored.ref.file for stored in states.values())
    numbered = all(name.startswith("sequential.") for name in states)
    return Masters(by_rank({name: states[name] for name in order}, tp), files, numbered)


def dtype_of(meta: Mapping[str, Any]) -> str:
    """The dtype in which the run computes, by ds_config of its mp_rank files."""
    config = meta.get("ds_config") or {}
    kinds = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}
    return next(
        (d for key, d in kinds.items() if (config.get(key) or {}).get("enabled")), "float32"
    )


def as_computed(
    architecture: Architecture,
    config: ModelConfig,
    tensors: Mapping[str, Whole],
    dtype: str,
    copies: int,
) -> tuple[ModelConfig, dict[str, Whole]]:
    """The model as the run computes with it: rounded, and with biases summed over the ranks.

    Args:
        architecture: The family.
        config: The settings of the model.
        tensors: The master weights.
        dtype: See ``dtype_of``.
        copies: The number of ranks that each had a bias of which the mean is stored.
    """
    summed = {
        row.hf
        for row in model_rows(architecture, config)
        if row.weight.split == "row_bias" and config.parallel_residual and copies > 1
    }
    computed = {}
    for name, whole in tensors.items():
        rounded = replace(whole, dtype=dtype)
        if name in summed:
            ref = next(piece.source for piece in whole.pieces)
            assert ref is not None
            rounded = Whole(dtype, whole.shape, (box(ref),) * copies, "sum")
        computed[name] = rounded
    return replace(config, dtype=dtype), computed


def parameter_shapes(meta: Mapping[str, Any], folder: str) -> list[Mapping[str, Any]]:
    if not isinstance(meta.get("param_shapes"), list):
        raise BridgeError(
            f"{folder}: param_shapes is missing from an mp_rank file. Copy the checkpoint again."
        )
    return shapes(meta, f"{folder}/mp_rank_*_model_states.pt")


def stored_states(folder: str, key: str) -> dict[str, Stored]:
    """One state of every parameter, by the names of DeepSpeed."""
    states = {}
    names = [name for name in list_folder(os.path.join(folder, ZERO)) if name != STATE]
    check_names(names, os.path.join(folder, ZERO))
    for name in names:
        path = os.path.join(folder, ZERO, name, file_name(key))
        if not isfile(path):
            raise BridgeError(f"{path} is missing. Copy the checkpoint again.")
        value = read_torch(path)
        ref = value.get("param") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(ref, TensorRef):
            raise BridgeError(f"{path} is not a file of a universal checkpoint: param is missing.")
        check_tensor("param", ref, path)
        states[name] = Stored(ref, value.get("cat_dim") == 0 and set(value) == {"cat_dim", "param"})
    return states


def by_rank(states: Mapping[str, Stored], tp: int) -> Shards:
    """The states by rank if all of them are joined, and as those of one rank otherwise."""
    count = tp if all(stored.joined for stored in states.values()) else 1
    ranks: Shards = [{} for _ in range(count)]
    for name, stored in sorted(states.items(), key=lambda item: parameter(item[0], ZERO)[0]):
        layer, short = parameter(name, stored.ref.file)
        for rank in range(count):
            ranks[rank].setdefault(layer, {})[short] = _rows(stored.ref, count, rank)
    return ranks


def _rows(ref: TensorRef, count: int, rank: int) -> TensorRef:
    if count == 1:
        return ref
    if not ref.shape or ref.shape[0] % count or ref.strides is not None:
        raise BridgeError(
            f"{ref.file}: its shape {list(ref.shape)} cannot be split over {count} "
            "tensor-parallel ranks. It may belong to another layout than the mp_rank files. "
            "Copy the checkpoint again."
        )
    shape = (ref.shape[0] // count, *ref.shape[1:])
    return replace(ref, offset=ref.offset + rank * (ref.nbytes // count), shape=shape)
