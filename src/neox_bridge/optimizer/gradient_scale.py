"""Rescales an optimizer if the scale of the gradients changes.

In some versions, the pipeline engine of DeepSpeed sums the gradients of the micro-batches
(``frameworks/deepspeed``). A gradient is then ``gradient_accumulation_steps`` times the mean, so
another accumulation changes the scale of Adam's moments and of gradient clipping. If k is the new
scale divided by the old one, the run stays the same with k times the first moments, k**2 times the
second moments, k times ``gradient_clipping`` and k times Adam's ``eps``: the update, k m /
(sqrt(k**2 v) + k eps), does not change.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.formats.pickles import Record
from neox_bridge.frameworks.deepspeed import PipelineAccumulation
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.layouts.untrusted import FLOAT
from neox_bridge.optimizer.states import Group, Optimizer, States
from neox_bridge.tensors.pieces import scaled

Engine = Literal["sums", "averages"]

CLIPPING = 1.0  # GPT-NeoX's default of gradient_clipping
_WEIGHT_DECAY = 0.1  # GPT-NeoX's default of weight_decay
_EPS = 1e-8  # the default in Adam of apex, DeepSpeed and torch

# The power of k by which each state is multiplied, by the name of the optimizer in GPT-NeoX
# (megatron/training.py, get_optimizer). The updates of all other optimizers would change.
_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
ADAMS = ("adam", "cpu_adam", "cpu_torch_adam")
_POWERS: dict[str, dict[str, int]] = {**dict.fromkeys(ADAMS, _ADAM), "lion": {"exp_avg": 1}}


@dataclass(frozen=True, slots=True)
class Rescaling:
    """How an optimizer is rescaled for gradients of another scale.

    Attributes:
        factor: The new scale divided by the old one.
        powers: The power of the factor for each state.
        decays: Whether weight_decay is scaled, since it is added to the gradient (L2 mode).
        has_eps: Whether the optimizer has an ``eps``.
        half: Whether the run is in float16.
    """

    factor: Fraction
    powers: Mapping[str, int]
    decays: bool
    has_eps: bool
    half: bool

    @property
    def exact(self) -> bool:
        """Whether scaling is exact, because the factor is a power of two."""
        return math.frexp(self.factor)[0] == 0.5

    @property
    def loss_scale(self) -> float:
        """The divisor of the loss scale: the smallest power of two that is at least the factor.

        So scaled gradients do not grow, and no new ones overflow.
        """
        return 2.0 ** math.ceil(math.log2(self.factor))

    def times(self, value: Any) -> Any:
        """A scaled hyperparameter; values that are not numbers are unchanged.

        YAML 1.1 reads 1e-08, which has no decimal point, as text.
        """
        if isinstance(value, str) and FLOAT.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return _as_given(value, value * self.factor.numerator / self.factor.denominator)

    def states(self, states: States) -> States:
        """The states, scaled."""
        changed = dict(states)
        for key, power in self.powers.items():
            scale = float(self.factor**power)
            changed[key] = {name: scaled(whole, scale) for name, whole in states[key].items()}
        return changed

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer with hyperparameters, clipping and loss scale scaled; not its states."""
        head = dict(optimizer.head)
        if "clip_grad" in head:
            head["clip_grad"] = self.times(head["clip_grad"])
        if self.half and optimizer.wrapper == "fp16" and "cur_scale" in head:
            head["cur_scale"] = self._divided(head["cur_scale"], head.get("min_loss_scale"))
        scaler = head.get("loss_scaler")
        if self.half and isinstance(scaler, Record) and isinstance(scaler.state, dict):
            state = dict(scaler.state)
            state["cur_scale"] = self._divided(state.get("cur_scale"), state.get("min_scale"))
            head["loss_scaler"] = replace(scaler, state=state)
        groups = tuple(
            Group(self._settings(group.settings), group.scalars) for group in optimizer.groups
        )
        return replace(optimizer, head=head, groups=groups)

    def ds_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """DeepSpeed's settings in an mp_rank file, scaled."""
        changed = dict(config)
        if "gradient_clipping" in config:
            changed["gradient_clipping"] = self.times(config["gradient_clipping"])
        optimizer = config.get("optimizer")
        if isinstance(optimizer, dict) and isinstance(optimizer.get("params"), dict):
            changed["optimizer"] = {**optimizer, "params": self._settings(optimizer["params"])}
        return {**changed, **self._static_scale(config)}

    def yml(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of GPT-NeoX's settings that change, with their new values."""
        changed: dict[str, Any] = {
            "gradient_clipping": self.times(raw.get("gradient_clipping", CLIPPING))
        }
        if self.has_eps:
            optimizer = raw.get("optimizer") or {}
            params = {"eps": _EPS, **(optimizer.get("params") or {})}
            changed["optimizer"] = {**optimizer, "params": {**params, **self._settings(params)}}
        if self.decays:
            changed["weight_decay"] = self.times(raw.get("weight_decay", _WEIGHT_DECAY))
        return {**changed, **self._static_scale(raw)}

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        is_scaled = {"eps": self.has_eps, "weight_decay": self.decays}
        return {k: self.times(v) if is_scaled.get(k) else v for k, v in settings.items()}

    def _static_scale(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        half = settings.get("fp16")
        if not self.half or not isinstance(half, dict) or not half.get("loss_scale"):
            return {}
        return {"fp16": {**half, "loss_scale": self._divided(half["loss_scale"], None)}}

    def _divided(self, value: Any, least: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        lowest = least if isinstance(least, int | float) else 0.0
        return _as_given(value, max(value / self.loss_scale, lowest))


def _as_given(value: float, result: float) -> float:
    """The result as an integer if the input was one and the result is whole."""
    return int(result) if isinstance(value, int) and result == int(result) else result


@dataclass(frozen=True, slots=True)
class Side:
    """The facts on which the scale of a run's gradients depends.

    Attributes:
        engine: What its pipeline engine does with the gradients.
        pipeline: Whether it has one (pipe_parallel_size >= 1).
    """

    engine: PipelineAccumulation
    pipeline: bool
    stages: int
    accumulation: int

    @property
    def scale(self) -> int | None:
        """The gradients relative to the mean gradient; None if stages differ."""
        if not self.pipeline or self.engine == "averages" or self.accumulation == 1:
            return 1
        if self.engine == "once a stage":
            return None if self.stages > 1 else 1
        return self.accumulation


def kept_accumulation(source: Side, target: Side) -> int | None:
    """The accumulation that keeps the scale of the gradients.

    None if every accumulation does so, or none. The accumulation of the target is ignored.
    """
    if not target.pipeline or target.engine == "averages":
        return None
    if target.engine == "once a stage" and target.stages == 1:
        return None
    if source.scale is None:
        return source.accumulation
    return source.scale if target.engine == "sums" else 1


def change_of_scale(source: Side, target: Side, way_out: str) -> Fraction:
    """The factor by which the gradients of the target are larger.

    Args:
        source: The facts about the source.
        target: The facts about the target.
        way_out: The advice in the error message.

    Raises:
        Refused: There is no single factor.
    """
    if source == target:
        return Fraction(1)
    if source.scale is None or target.scale is None:
        raise Refused(
            "DeepSpeed 0.18.3 to 0.19.2 divides the gradients by gradient_accumulation_steps "
            "once in each pipeline stage (DeepSpeed#8152), so no scaling of the states can keep "
            f"the run the same. {way_out} If the DeepSpeed of the run contains the fix, use "
            "`source_engine=averages`."
        )
    return Fraction(target.scale, source.scale)


def rescaling(
    optimizer: Optimizer, raw: Mapping[str, Any], factor: Fraction, dtype: str, way_out: str
) -> Rescaling:
    """Choose how the run continues with gradients of another scale.

    Args:
        factor: The new scale divided by the old one.
        dtype: The dtype of the run.
        way_out: The advice in the Refused that is raised if no rescaling keeps the run the same.
    """
    setting = raw.get("optimizer") or {}
    name = str(setting.get("type") or "adam").lower()
    keys = {key for key in optimizer.keys if key != MASTER}
    powers = _POWERS.get(name)
    quantized = bool(raw.get("use_bnb_optimizer"))
    if powers is None or not keys <= set(powers) or quantized:
        what = "use_bnb_optimizer: true" if quantized else f"optimizer.type {name}"
        raise Refused(
            f"The gradients of the resharded run would be {factor} x what they were, and with "
            f"{what} (states {', '.join(sorted(keys)) or 'none'}) no scaling of its states can "
            f"keep the run the same; this is possible only for Adam and Lion. {way_out}"
        )
    decays = powers is _ADAM and _is_l2(optimizer, raw, setting.get("params") or {})
    used = {key: powers[key] for key in optimizer.keys if key in powers}
    return Rescaling(factor, used, decays, powers is _ADAM, dtype == "float16")


def _is_l2(optimizer: Optimizer, raw: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether Adam adds a weight decay to the gradient.

    Adam of apex and DeepSpeed does so if ``adam_w_mode`` or ``adamw_mode`` is false, mup's MuAdam
    always. By default, every GPT-NeoX since 2023 uses decoupled decay.
    """
    if not any(group.settings.get("weight_decay") for group in optimizer.groups):
        return False
    coupled = any(params.get(key) is False for key in ("adam_w_mode", "adamw_mode"))
    groups = any(g.settings.get("decoupled_weight_decay") is False for g in optimizer.groups)
    return coupled or groups or bool(raw.get("use_mup"))


_DOES: dict[str, str] = {
    "sums": "sums micro-batches' gradients",
    "averages": "averages micro-batches' gradients",
    "once a stage": "divides micro-batches' gradients once in each stage",
}


def gradient_findings(
    version: str | None,
    before: Side,
    after: Side,
    changes: Rescaling | None,
    settings: Mapping[str, Any],
) -> Iterator[Finding]:
    """Findings about assumptions on the engines, and about scaled values.

    Args:
        version: The DeepSpeed of the source.
        settings: The keys of the target's yml that differ from the source, with their values.
    """
    if not any(side.pipeline and side.accumulation > 1 for side in (before, after)):
        return
    name = f"DeepSpeed {version}" if version else "an unknown DeepSpeed version"
    assumed = (
        f"This assumes that the pipeline engine of the run ({name}) {_DOES[before.engine]}, and "
        f"that the one that resumes it {_DOES[after.engine]}"
    )
    other = "averages" if after.engine == "sums" else "sums"
    remedy = (
        f"to resume with an engine that {other} them, use `engine={other}`; if the engine of the "
        "run did not do what its version suggests, set `source_engine=`"
    )
    steps = f"gradient_accumulation_steps {before.accumulation} -> {after.accumulation}"
    if changes is None:
        text = f"the gradients keep their scale ({steps}). {assumed}"
        yield Finding("gradient-scale", "info", text, remedy)
        return
    k = f"{float(changes.factor):g}"
    states = ", ".join(
        f"{key} x {float(changes.factor**power):g}" for key, power in changes.powers.items()
    )
    keys = [f"gradient_clipping: {settings['gradient_clipping']}"]
    if changes.has_eps:
        keys.append(f"optimizer.params.eps: {settings['optimizer']['params']['eps']}")
    if changes.decays:
        keys.append(f"weight_decay: {settings['weight_decay']}")
    rounding = "" if changes.exact else " (rounded, because it is not a power of two)"
    yield Finding(
        "gradient-scale",
        "warning",
        f"the gradients are {k} x what they were ({steps}). To keep the run the same, its states "
        f"are scaled ({states}{rounding}) and resume.yml has {', '.join(keys)}. Resume with these "
        f"settings, not with the old ones of the run. {assumed}",
        remedy,
    )
    if changes.half and changes.loss_scale != 1:
        change = f"divided by {changes.loss_scale:g} (no further than min_loss_scale)"
        if changes.loss_scale < 1:
            change = f"multiplied by {1 / changes.loss_scale:g}"
        yield Finding(
            "loss-scale",
            "info",
            f"fp16: the loss scale is {change}, so that scaled gradients do not overflow",
        )
    if changes.decays:
        yield Finding(
            "coupled-weight-decay",
            "warning",
            "weight_decay is added to the gradient (L2 mode: adam_w_mode or adamw_mode false, or "
            f"use_mup), so it is scaled too: weight_decay x {k} in resume.yml and in the "
            "optimizer's states",
        )
