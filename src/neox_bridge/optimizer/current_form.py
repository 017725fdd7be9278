"""Converts an optimizer that an old DeepSpeed saved to the format of DeepSpeed 0.6 and later.

Sources: deepspeed 0.16 runtime/zero/stage_1_and_2.py (state_dict, load_state_dict),
runtime/fp16/loss_scaler.py, runtime/engine.py (_save_checkpoint, _save_zero_checkpoint).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.formats.pickles import Global, Record
from neox_bridge.frameworks.deepspeed import SUB_PARTITIONS
from neox_bridge.frameworks.writers import OLD_SPARSE_NAMES
from neox_bridge.layouts.untrusted import number, text
from neox_bridge.optimizer.gradient_scale import CLIPPING
from neox_bridge.optimizer.rank_states import is_current as current_states
from neox_bridge.optimizer.states import Group, Optimizer, loss_scaler
from neox_bridge.planning.neox_files import MP_RANK
from neox_bridge.planning.random_states import current_cuda_state, current_cuda_tensor

OLDEST_VERSION = "0.3.15"  # DeeperSpeed of GPT-NeoX until v1.0, whose files contain no version
_OF_DEEPSPEED = ("ds_config", "ds_version")
# keys that the Adam implementations of GPT-NeoX expect in a group: FusedAdam of apex and of
# DeepSpeed, and torch's AdamW
ADAM: Mapping[str, Any] = {
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
DECAYING, STILL = "weight_decay_params", "no_weight_decay_params"


def is_current(optimizer: Optimizer) -> bool:
    """Whether DeepSpeed of 2022 and later can load the optimizer files unchanged."""
    form = optimizer.form
    return form is None or current_states(form.kind, form.generation)


def writer_version(optimizer: Optimizer) -> str | None:
    """The version of DeepSpeed that wrote the files, such as "0.16.5"; None if unknown."""
    version = text(optimizer.metas[0], "ds_version")
    if not version and optimizer.form is not None and optimizer.form.generation is SUB_PARTITIONS:
        return OLDEST_VERSION
    return version or None


def in_current_form(optimizer: Optimizer, raw: Mapping[str, Any], version: str) -> Optimizer:
    """Return the optimizer with the keys, scalars and settings that a later DeepSpeed loads.

    Args:
        optimizer: In any format. If it is current, only the states of GPU generators may change.
        raw: The run's yml, which contains the values that are missing in old files.
        version: The DeepSpeed that loads it, such as "0.16.5".
    """
    generators = {n: current_cuda_state(data) for n, data in optimizer.generators.items()}
    if is_current(optimizer):
        metas = tuple(map(_with_current_random_states, optimizer.metas))
        return replace(optimizer, metas=metas, generators=generators)
    config = _config(raw)
    outer = {"ds_config": config, "ds_version": version}
    clipping = number(raw, "gradient_clipping", "the yml")
    head = {
        "loss_scaler": _scaler(optimizer.head.get("loss_scaler")),
        "dynamic_loss_scale": bool(optimizer.head.get("dynamic_loss_scale")),
        "overflow": bool(optimizer.head.get("overflow")),
        "clip_grad": CLIPPING if clipping is None else float(clipping),
        "ds_version": version,
        "outer": outer,
    }
    metas = tuple(_meta(meta, config, version) for meta in optimizer.metas)
    return replace(
        optimizer,
        groups=tuple(map(_group, optimizer.groups)),
        head=head,
        metas=metas,
        generators=generators,
        form=None,
    )


def _scaler(scaler: Any) -> Any:
    """A loss scaler with the fields of DeepSpeed 0.9 and later (loss_scaler.py)."""
    if not isinstance(scaler, Record) or not isinstance(scaler.state, dict):
        return scaler
    dynamic = "scale_window" in scaler.state
    state = {"cur_scale": scaler.state.get("cur_scale", 1.0), "dynamic": dynamic}
    state |= {key: value for key, value in scaler.state.items() if key not in state}
    if dynamic:
        state.setdefault("dtype", Global("torch", "float16"))
    return loss_scaler(state, dynamic=dynamic)


def _group(group: Group) -> Group:
    """A group with its step where each Adam implementation looks for it, and GPT-NeoX's name."""
    step = group.settings.get("step", group.scalars.get("step"))
    name = STILL if not group.settings.get("weight_decay") else DECAYING
    settings = {**ADAM, **group.settings, "name": name}
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    return Group(settings, group.scalars if step is None else {**group.scalars, "step": step})


def _meta(meta: Mapping[str, Any], config: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The content of an mp_rank file, with DeepSpeed's keys in their order, then GPT-NeoX's."""
    kept = {key: value for key, value in meta.items() if key != OLD_SPARSE_NAMES}
    defaults = {**MP_RANK, "ds_config": dict(config), "ds_version": version}
    if OLD_SPARSE_NAMES in meta:
        defaults["sparse_tensor_module_names"] = meta[OLD_SPARSE_NAMES]
    given = {key: kept[key] for key in defaults if key in kept and key not in _OF_DEEPSPEED}
    others = {key: kept[key] for key in kept if key not in defaults}
    return _with_current_random_states({**defaults, **given, **others})


def _with_current_random_states(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an mp_rank file, with GPU generator states that torch 1.13 accepts."""
    changed = dict(meta)
    if "cuda_rng_state" in meta:
        changed["cuda_rng_state"] = current_cuda_tensor(meta["cuda_rng_state"])
    tracked = meta.get("rng_tracker_states")
    if isinstance(tracked, dict):
        changed["rng_tracker_states"] = {k: current_cuda_tensor(v) for k, v in tracked.items()}
    return changed


def _config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config in the yml, as DeepSpeed saves it with the states."""
    keys = ("optimizer", "fp16", "bf16", "zero_optimization", "gradient_clipping")
    return {key: dict(v) if isinstance(v := raw[key], dict) else v for key in keys if key in raw}
