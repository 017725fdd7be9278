"""Converts an optimizer from one ZeRO stage to another.

Stages 1 and 2 have the same format. Stage 3 stores no gradient clipping and no version, and always
a loss scaler. Stage 0 stores masters only in fp16, because in fp32 the weights are the masters; the
fields of its loss scaler are in the dictionary itself, not in an object. In bf16, stage 0 uses
another optimizer, BF16_Optimizer.
Sources: deepspeed 0.16 runtime/fp16/fused_optimizer.py and loss_scaler.py,
runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/engine.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.errors import Refused
from neox_bridge.formats.pickles import Global, Record
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.states import DEEPSPEED, Optimizer, States, loss_scaler, states

_TOLD = ("last_overflow_iter", "scale_factor", "scale_window")


def at_stage(
    checkpoint: Checkpoint, optimizer: Optimizer, stage: int, given: States | None = None
) -> tuple[Optimizer, States | None]:
    """The optimizer at this ZeRO stage, and its states if they differ from the source.

    given: states that replace those of the source. Raises Refused if DeepSpeed has no such
    optimizer.
    """
    if (stage == 0) == (optimizer.stage == 0):
        return _sharded(optimizer, stage), given
    dtype = checkpoint.config.dtype
    if optimizer.wrapper == "bf16" or dtype == "bfloat16":
        raise Refused(
            f"`zero={stage}`: the source is a bfloat16 run at stage {optimizer.stage}. In "
            "bfloat16, only stages 1, 2 and 3 can be converted into each other. Use one of these."
        )
    by_state = dict(given if given is not None else states(checkpoint, optimizer))
    fp16 = dtype == "float16"
    if stage and MASTER not in by_state:
        by_state = {MASTER: checkpoint.trained, **by_state}
    elif not stage and not fp16:
        del by_state[MASTER]
    meta = optimizer.metas[0]
    if stage:
        head = _object(optimizer, meta, fp16=fp16)
    else:
        head = _plain(optimizer.head, meta) if fp16 else {}
    converted = replace(
        optimizer,
        wrapper="zero" if stage else "fp16" if fp16 else "plain",
        stage=stage,
        keys=tuple(by_state),
        head=head,
    )
    return converted, by_state


def _sharded(optimizer: Optimizer, stage: int) -> Optimizer:
    """Convert the optimizer of stage 1, 2 or 3 to another of these stages."""
    if (stage == 3) == (optimizer.stage == 3):
        return replace(optimizer, stage=stage)
    meta, head = optimizer.metas[0], dict(optimizer.head)
    if stage == 3:
        none = {"cur_scale": 1.0, "dynamic": False}
        head.setdefault("loss_scaler", loss_scaler(none, dynamic=False))
        head.setdefault("dynamic_loss_scale", False)
        head.setdefault("overflow", False)
    else:
        config = meta.get("ds_config") or {}
        head.setdefault("clip_grad", config.get("gradient_clipping", 0.0))
        head.setdefault("ds_version", meta.get("ds_version") or DEEPSPEED)
    return replace(optimizer, stage=stage, head=head, wrapper="zero")


def _object(optimizer: Optimizer, meta: Mapping[str, Any], *, fp16: bool) -> dict[str, Any]:
    """The head of stages 1 and 2, with the loss scaler as an object."""
    scaler, config = optimizer.head, meta.get("ds_config") or {}
    dynamic = bool(scaler.get("dynamic_loss_scale"))
    state: dict[str, Any] = {"cur_scale": scaler.get("cur_scale", 1.0), "dynamic": dynamic}
    if dynamic:
        settings = config.get("fp16") or {}
        shift = settings.get("hysteresis", 2)
        state |= {
            "cur_iter": scaler["cur_iter"],
            **{key: scaler[key] for key in _TOLD},
            "min_scale": settings.get("min_loss_scale", 1),
            "delayed_shift": shift,
            "cur_hysteresis": shift,
            "consecutive_hysteresis": settings.get("consecutive_hysteresis", False),
            "raise_error_at_min_scale": True,
            "dtype": Global("torch", "float16"),
        }
    return {
        "loss_scaler": loss_scaler(state, dynamic=dynamic),
        "dynamic_loss_scale": dynamic if fp16 else False,
        "overflow": False,
        "clip_grad": scaler.get("clip_grad", config.get("gradient_clipping", 0.0)),
        "ds_version": meta.get("ds_version") or DEEPSPEED,
        "outer": {key: meta.get(key) for key in ("ds_config", "ds_version")},
    }


def _plain(head: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The head of stage 0 in fp16."""
    scaler = head.get("loss_scaler")
    state = scaler.state if isinstance(scaler, Record) else None
    state = state if isinstance(state, dict) else {}
    dynamic = bool(head.get("dynamic_loss_scale"))
    return {
        "dynamic_loss_scale": dynamic,
        "cur_scale": state.get("cur_scale", 1.0),
        "cur_iter": state.get("cur_iter", meta.get("global_steps", 0)),
        **({key: state[key] for key in _TOLD if key in state} if dynamic else {}),
        "clip_grad": head.get("clip_grad", 0.0),
    }
