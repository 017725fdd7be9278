"""Reads the optimizer of a GPT-NeoX checkpoint, and checks it against the weights."""

import os
import re
from collections.abc import Mapping
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.deepspeed_values import (
    check_meta,
    check_settings,
)
from neox_bridge.layouts.file_names import rank_file
from neox_bridge.layouts.missing_files import rank_files, refuse_missing_ranks, told_ranks
from neox_bridge.layouts.neox_reader import read_values
from neox_bridge.optimizer.states import Group, Optimizer, Scalar, stored_tensors, stored_wholes
from neox_bridge.stores.paths import ahead, read_at
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

_SCALAR_BYTES = 64  # largest scalar


def read_optimizer(
    checkpoint: Checkpoint, without_states: str = "Use convert for its weights."
) -> Optimizer:
    """The optimizer states as references. Raises BridgeError or Refused.

    without_states: what to do instead if there are none.
    """
    state = checkpoint.neox
    if state is None:
        raise BridgeError(
            f"{checkpoint.path} is a Hugging Face model, so it has no optimizer states. Name the "
            "GPT-NeoX run that it was converted from."
        )
    folder = state.folder
    refuse_missing_ranks(state)
    if state.is_zero3:
        from neox_bridge.optimizer.read_zero3 import read_zero3_states

        check_settings(checkpoint.raw, folder)
        return read_zero3_states(checkpoint, folder)
    count = state.tp * max(1, state.pp)
    paths = [os.path.join(folder, rank_file(n)) for n in range(count)]
    check_settings(checkpoint.raw, folder)
    metas = tuple(map(_meta, ahead(paths)))
    if state.te and state.universal:
        raise Refused(
            f"{folder}: the run used modules of Transformer Engine, and the states of such a "
            "universal checkpoint cannot be read. Use the checkpoint that it was made from."
        )
    if state.universal:
        from neox_bridge.optimizer.read_universal import read_universal

        return read_universal(checkpoint, folder, metas)
    if state.optimizer:
        from neox_bridge.optimizer.read_zero import read_zero

        dp = told_ranks(metas[0], "dp_world_size")
        files = rank_files(folder, state.optimizer, dp, len(metas))
        return read_zero(checkpoint, folder, metas, files)
    if isinstance(metas[0].get("optimizer"), dict):
        from neox_bridge.optimizer.read_stage0 import read_stage0

        return read_stage0(checkpoint, folder, metas)
    raise BridgeError(
        f"{folder} contains no optimizer states: no *zero_pp_rank_*_optim_states.pt, and no "
        f"optimizer in the mp_rank files. {without_states}"
    )


def _meta(path: str) -> Mapping[str, Any]:
    value = read_values(path)
    check_meta(value, path)
    return value


def optimizer_states(path: str, until: str | None = None) -> Mapping[str, Any]:
    """Read a ZeRO file. Raises BridgeError for a file without an ``optimizer_state_dict``.

    until: the later key at which reading stops; see ``pickles.load``.
    """
    value = read_torch(path, until=until)
    inner = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(inner, dict):
        raise BridgeError(f"{path} is not a DeepSpeed file: it contains no optimizer_state_dict.")
    if "fp32_flat_groups" in inner:
        raise BridgeError(
            f"{path} is from ZeRO stage 3, but the weights beside it are from another stage. They "
            "are from different saves. Copy the checkpoint again."
        )
    return value


def scalar(entry: Any) -> Any:
    """A state whose size is not that of its parameter: a number, or a small tensor as bytes."""
    if not isinstance(entry, TensorRef):
        return entry
    if entry.nbytes > _SCALAR_BYTES:
        raise Refused(
            f"{entry.file}: the optimizer has a tensor with the shape {list(entry.shape)}, which "
            "no parameter has. Only optimizers like Adam can be read. Convert only the weights."
        )
    return Scalar(entry.dtype, entry.shape, read_at(entry.file, entry.offset, entry.nbytes))


def same_group(first: Group, second: Group, path: str) -> None:
    """Raise BridgeError if the files of two ranks have different hyperparameters for one group."""
    if first.scalars != second.scalars or first.settings != second.settings:
        differ = [k for k in first.settings if first.settings[k] != second.settings.get(k)]
        differ += [k for k in first.scalars if first.scalars[k] != second.scalars.get(k)]
        raise BridgeError(
            f"{path}: {some(differ) or 'a hyperparameter'} differs between ranks, so their files "
            "are from different saves. Copy the checkpoint again."
        )


def stage_of(head: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
    """The ZeRO stage. DeepSpeed before 0.7.0 also recorded stage 1 as 2, as a plain number."""
    recorded = head.get("zero_stage")
    if isinstance(recorded, Record) and recorded.args and isinstance(recorded.args[0], int):
        return recorded.args[0]
    config = (meta.get("ds_config") or {}).get("zero_optimization") or {}
    stage = config.get("stage")
    if stage is None and isinstance(recorded, int):
        return recorded
    return int(stage or 0)


def check_weights(checkpoint: Checkpoint, optimizer: Optimizer, folder: str) -> None:
    """Raise BridgeError unless every weight of every rank has states of its shape.

    Raises Refused for invalid names of states, because they become file names.
    """
    if odd := [key for key in optimizer.keys if not re.fullmatch(r"\w{1,40}", key)]:
        raise Refused(f"{folder}: {odd[0][:80]!r} is not a valid name of an optimizer state.")
    places = {place for _, place in stored_tensors(checkpoint)}
    strange = [f"layer {p[0]}: {p[1]}" for p in optimizer.members if p not in places]
    if strange:
        raise Refused(
            f"{folder}: the optimizer trains {some(strange)}, but the model does not contain it. "
            "Convert only the weights."
        )
    used = {piece.source for whole in stored_wholes(checkpoint).values() for piece in whole.pieces}
    for place, ref in stored_tensors(checkpoint).items():
        _, (layer, name) = place
        rank_states = optimizer.shards.get(place, {})
        missing = [key for key in optimizer.keys if key not in rank_states]
        if ref in used and missing:
            raise BridgeError(
                f"{folder}: the optimizer has no {missing[0]} for layer {layer}: {name}. The "
                "parameter may have been frozen. Only runs that train all parameters can be read."
            )
        if any(whole.shape != ref.shape for whole in rank_states.values()):
            raise BridgeError(
                f"{folder}: layer {layer}: {name} has the shape {list(ref.shape)}, but its "
                "optimizer states have another. The files may be from different saves. Copy the "
                "checkpoint again."
            )


def generators(meta: Mapping[str, Any]) -> dict[str, bytes]:
    """The states in ``rng_tracker_states``, by name."""
    states = {}
    for name, ref in (meta.get("rng_tracker_states") or {}).items():
        if isinstance(ref, TensorRef) and ref.nbytes < 1 << 16:
            states[str(name)] = read_at(ref.file, ref.offset, ref.nbytes)
    return states
