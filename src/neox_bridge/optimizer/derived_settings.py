"""Derives hyperparameters of Adam that elastic states do not contain.

Elastic states have no ``param_groups``. Sources: GPT-NeoX v1.0 megatron/training.py
(get_optimizer), megatron/learning_rates.py (AnnealingLR.get_lr) and neox_arguments; DeepSpeed
0.3.16 runtime/zero/stage1.py (_initialize_optimizer_states).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.frameworks.deepspeed import makes_initial_step
from neox_bridge.layouts.deepspeed_values import MOST_NUMBER, check_betas
from neox_bridge.layouts.untrusted import CONFIGS, mapping, number, unexpected, whole
from neox_bridge.optimizer.gradient_scale import ADAMS
from neox_bridge.optimizer.states import Derived

_LR = 0.001  # OPT_PARAMS_DEFAULTS of neox_arguments/arguments.py
_WEIGHT_DECAY = 0.01  # neox_arguments/neox_args.py
_BETAS = [0.9, 0.999]  # defaults of FusedAdam in apex and DeepSpeed
_EPS = 1e-8
_LARGEST_EXPONENT = 700.0  # exp of a larger number overflows; no schedule of GPT-NeoX comes near


@dataclass(frozen=True)
class DerivedSettings:
    """``param_groups`` without parameters, and the origins of their values."""

    groups: tuple[Mapping[str, Any], ...]
    derived: tuple[Derived, ...]
    findings: tuple[Finding, ...]


def derived_settings(
    raw: Mapping[str, Any],
    meta: Mapping[str, Any],
    scalars: Sequence[Mapping[str, Any]],
    folder: str,
    path: str,
    version: str,
) -> DerivedSettings:
    """The hyperparameters of an Adam whose states are elastic. Raises Refused for others.

    Args:
        raw: The merged yml.
        meta: The content of the first mp_rank file, ``path``.
        scalars: The non-tensor values of the states, by group; their "step" is kept.
        version: The version of DeepSpeed; "" if unknown.
    """
    yml = f"{folder}{CONFIGS}"
    optimizer = mapping(raw, "optimizer", yml)
    kind = str(optimizer.get("type") or "Adam")
    if kind.lower() not in ADAMS:
        raise Refused(
            f"{yml}: optimizer.type is {kind[:40]!r}, and its states are elastic, so they contain "
            "no hyperparameters. neox-bridge can derive them only for Adam. Convert only the "
            "weights."
        )
    params = mapping(optimizer, "params", yml, "optimizer.params")
    values = [
        _learning_rate(params, meta, yml, path),
        _betas(params, yml),
        _setting(params, "eps", _EPS, yml, "optimizer.params"),
        _setting(raw, "weight_decay", _WEIGHT_DECAY, yml, ""),
    ]
    listed = ", ".join(f"{v.key} {_shown(v.value)} ({v.source})" for v in values)
    settings_finding = Finding(
        "optimizer-settings-derived",
        "info",
        f"{path}: the optimizer states are elastic and contain no hyperparameters. These values "
        f"were derived: {listed}",
    )
    findings = [settings_finding]
    if not all("step" in group for group in scalars):
        step, finding = _step(meta, path, version)
        values.append(step)
        findings.append(finding)
    return DerivedSettings(
        tuple(_groups({v.key: v.value for v in values}, len(scalars))),
        tuple(values),
        tuple(findings),
    )


def _groups(values: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The groups with their keys in the order of FusedAdam."""
    names = ("lr", "bias_correction", "betas", "eps", "weight_decay", "step")
    settings = {"bias_correction": True, **values}
    ordered = {name: settings[name] for name in names if name in settings}
    still = {"weight_decay": 0.0, **{k: v for k, v in ordered.items() if k != "weight_decay"}}
    return [still] if count == 1 and not values["weight_decay"] else [ordered, still][:count]


def _setting(values: Mapping[str, Any], key: str, default: float, yml: str, prefix: str) -> Derived:
    name = f"{prefix}.{key}" if prefix else key
    value = number(values, key, yml, name)
    if value is None:
        return Derived(key, default, f"GPT-NeoX's default: the yml has no {name}")
    return Derived(key, float(value), f"{name} of the yml")


def _betas(params: Mapping[str, Any], yml: str) -> Derived:
    betas = params.get("betas")
    if betas is None:
        return Derived("betas", _BETAS, "Adam's default: the yml has no optimizer.params.betas")
    return Derived("betas", check_betas(betas, yml), "optimizer.params.betas of the yml")


def _learning_rate(
    params: Mapping[str, Any], meta: Mapping[str, Any], yml: str, path: str
) -> Derived:
    """The learning rate of the last step, by the schedule."""
    schedule = mapping(meta, "lr_scheduler", path)
    if not schedule:
        value = number(params, "lr", yml, "optimizer.params.lr")
        if value is None:
            return Derived("lr", _LR, "GPT-NeoX's default: there is no schedule and no lr")
        return Derived("lr", float(value), "optimizer.params.lr of the yml: there is no schedule")
    return Derived("lr", annealed(schedule, path), "lr_scheduler")


def annealed(schedule: Mapping[str, Any], path: str) -> float:
    """The learning rate of an AnnealingLR's state.

    Source: GPT-NeoX v1.0 megatron/learning_rates.py, AnnealingLR.get_lr.
    """
    start, warmup, done, end, least = (
        _needed(schedule, key, path)
        for key in ("start_lr", "warmup_iter", "num_iters", "end_iter", "min_lr")
    )
    style = schedule.get("decay_style")
    if end <= 0:
        raise unexpected(path, "lr_scheduler.end_iter", end, "a number of iterations")
    iters = min(done, end - warmup)
    if warmup > 0 and done <= warmup:
        return float(start * iters / warmup)
    iters -= warmup
    if style == "linear":
        rate = start * (end - iters) / end
    elif style == "cosine":
        rate = start / 2.0 * (math.cos(math.pi * iters / end) + 1)
    elif style == "exponential":
        rate = start * math.exp(min(-0.693 * iters / end, _LARGEST_EXPONENT))
    else:
        rate = start
    return float(max(rate, least))


def _needed(schedule: Mapping[str, Any], key: str, path: str) -> float:
    value = number(schedule, key, path, f"lr_scheduler.{key}")
    if value is None or value > MOST_NUMBER:
        raise unexpected(path, f"lr_scheduler.{key}", schedule.get(key), "a number")
    return value


def _step(meta: Mapping[str, Any], path: str, version: str) -> tuple[Derived, Finding]:
    """Adam's step count: one per iteration that was not skipped, and one before training."""
    iteration = whole(meta, "iteration", path) or 0
    skipped = whole(meta, "skipped_steps", path) or 0
    steps = whole(meta, "global_steps", path)
    other_run = skipped > iteration or (steps is not None and steps != iteration)
    first = int(makes_initial_step(version))
    step, rule, numbers = iteration, "iteration", f"{iteration}"
    if skipped <= iteration:
        step, rule, numbers = step - skipped, f"{rule} - skipped_steps", f"{numbers} - {skipped}"
    if first:
        step, rule, numbers = 1 + step, f"1 + {rule}", f"1 + {numbers}"
    why = f"{rule} = {numbers} = {step}"
    if first:
        why += ", because DeepSpeed makes one step on zero gradients before training"
    if other_run:
        why += (
            f". global_steps is {steps} and skipped_steps {skipped}, so the run started from the "
            "weights of another run, and its step count may differ"
        )
    return Derived("step", step, rule), Finding(
        "adam-step-derived",
        "warning" if other_run else "info",
        f"{path}: the optimizer states are elastic and do not contain Adam's step. It was "
        f"derived: {why}. If the run was resumed from such states before, Adam's step restarted "
        "at 1, and no file records this",
    )


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
