"""Reads optimizer states in safetensors under Hugging Face names, with their JSON file."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.safetensors import read_safetensors
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.joined_tensors import from_stored, stored_name
from neox_bridge.layouts.text_files import read_json
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.states import Optimizer, Scalar, stored_tensors, stored_wholes
from neox_bridge.stores.paths import isfile
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.wording import some

SCALARS = "optimizer.json"
FORMAT = 1


def scalars(checkpoint: Checkpoint, optimizer: Optimizer) -> dict[str, Any]:
    """The values of an optimizer besides tensors, as plain data that JSON can represent."""
    meta = optimizer.metas[0]
    members = _members(checkpoint, optimizer)
    scaler = optimizer.head.get("loss_scaler")
    values = {
        "format": FORMAT,
        "states": list(optimizer.keys),
        "iteration": checkpoint.neox_state.iteration,
        "groups": [
            {
                **group.settings,
                "state": {key: number_in(entry) for key, entry in group.scalars.items()},
                "tensors": [name for name, number in members.items() if number == index],
            }
            for index, group in enumerate(optimizer.groups)
        ],
        "loss_scaler": scaler.state if isinstance(scaler, Record) else dict(optimizer.head),
        **{
            key: meta.get(key)
            for key in ("lr_scheduler", "global_steps", "global_samples", "skipped_steps")
        },
        "ds_config": meta.get("ds_config"),
        "data_parallel": optimizer.dp,
        "zero_stage": optimizer.stage,
        "derived": {derived.key: derived.source for derived in optimizer.derived},
    }
    plain: dict[str, Any] = _plain(values)
    return plain


def read_export(folder: str, checkpoint: Checkpoint) -> dict[str, dict[str, Whole]]:
    """Read the states of an export by name, and check them against the tensors of this model.

    Raises BridgeError if a tensor is missing or has another shape.
    """
    path = os.path.join(folder, SCALARS)
    exported = read_json(path)
    names = exported.get("states")
    known = isinstance(names, list) and all(re.fullmatch(r"\w+", str(name)) for name in names)
    if exported.get("format") != FORMAT or not isinstance(names, list) or not known:
        raise BridgeError(
            f"{path} was not written by export-optimizer, or by a newer version: no known states."
        )
    return {
        str(key): _read(os.path.join(folder, f"{key}.safetensors"), checkpoint) for key in names
    }


def with_export(
    checkpoint: Checkpoint, optimizer: Optimizer, folder: str
) -> tuple[Checkpoint, dict[str, dict[str, Whole]]]:
    """The run with the states of an export, and with weights rounded from its master weights.

    Raises BridgeError if the states are not those of the run's optimizer.
    """
    exported = read_export(folder, checkpoint)
    if sorted(exported) != sorted(optimizer.keys):
        raise BridgeError(
            f"{folder} has the states {', '.join(exported)}, and the optimizer of "
            f"{checkpoint.path} {', '.join(optimizer.keys)}."
        )
    exported = {key: exported[key] for key in optimizer.keys}
    if MASTER in exported:
        dtypes = {name: whole.dtype for name, whole in checkpoint.trained.items()}
        rounded = {n: replace(w, dtype=dtypes[n]) for n, w in exported[MASTER].items()}
        checkpoint = replace(checkpoint, tensors=rounded)
    return checkpoint, exported


def _read(path: str, checkpoint: Checkpoint) -> dict[str, Whole]:
    if not isfile(path):
        raise BridgeError(f"{path} is missing. Export the optimizer again.")
    stored = {name: whole_of(ref) for name, ref in read_safetensors(path).items()}
    tensors = from_stored(checkpoint.architecture, checkpoint.config, stored, path)
    if odd := sorted(set(tensors) ^ set(checkpoint.trained)):
        raise BridgeError(
            f"{path} does not have the same tensors as {checkpoint.path}. Only one of them has "
            f"{some(odd)}. The export is from another model."
        )
    for name, whole in tensors.items():
        if whole.shape != checkpoint.tensors[name].shape:
            raise BridgeError(
                f"{path}: {name} has the shape {list(whole.shape)}, and in {checkpoint.path} "
                f"{list(checkpoint.tensors[name].shape)}. The export is from another model."
            )
    return tensors


def _members(checkpoint: Checkpoint, optimizer: Optimizer) -> dict[str, int]:
    """The group of each tensor of the model."""
    parameters = {ref: parameter for (_, parameter), ref in stored_tensors(checkpoint).items()}
    return {
        stored_name(checkpoint.architecture, name): optimizer.members[parameters[piece.source]]
        for name, whole in stored_wholes(checkpoint).items()
        for piece in whole.pieces[:1]
        if piece.source is not None
    }


def number_in(entry: Any) -> Any:
    """A scalar as a Python number."""
    if not isinstance(entry, Scalar):
        return entry
    import numpy as np

    from neox_bridge.tensors.dtypes import to_numpy

    values = np.frombuffer(entry.data, to_numpy(entry.dtype)).reshape(entry.shape)
    return values.astype(np.float64).tolist() if values.dtype.kind in "Vf" else values.tolist()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): _plain(entry) for key, entry in value.items()}
        return {key: entry for key, entry in kept.items() if entry is not NotImplemented}
    if isinstance(value, list | tuple):
        return [entry for entry in map(_plain, value) if entry is not NotImplemented]
    return value if value is None or isinstance(value, str | int | float | bool) else NotImplemented
