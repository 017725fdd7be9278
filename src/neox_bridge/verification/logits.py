"""``verify --logits``: whether two checkpoints compute the same, or where and why not."""

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context
from neox_bridge.execution.transform import boxes
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.head import as_stored
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.tensors.pieces import Whole
from neox_bridge.verification.causes import Hypothesis, hypotheses
from neox_bridge.verification.compare import MEASURED_ELEMENTS, values
from neox_bridge.verification.forward_passes import ForwardPass, Settings, forward_pass
from neox_bridge.verification.reference import Stage
from neox_bridge.verification.verify import as_one_model

# relative to the largest value: fp32 rounding in one layer, and in the logits of a model
LAYER = 2e-5
LOGITS = 1e-5
_MOST = 3  # maximum number of causes to search for
_NONE: Settings = {}


@dataclass(frozen=True, slots=True)
class Cause:
    """Why two sides differ.

    Attributes:
        inherent: Whether no conversion can remove it.
    """

    cause: str
    text: str
    inherent: bool


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Logits that are NaN or infinite.

    Attributes:
        tokens: How many tokens have such logits on either side.
        first: How many logits are not finite in the first model.
        second: The same in the second model, or in the recorded logits.
        same_places: Whether these are the same logits on both sides.
        tensor: The first weight, in model order, that explains it: one that is not finite on only
            one side, or else one that is not finite on both. "" if all weights are finite.
        tensor_first: How many values of that weight are not finite in the first model.
        tensor_second: The same in the second model.
    """

    tokens: int
    first: int
    second: int
    same_places: bool
    tensor: str = ""
    tensor_first: int = 0
    tensor_second: int = 0


@dataclass(frozen=True, slots=True)
class LoadChange:
    """Tensors by which a model that transformers loaded is not the model in the files.

    Attributes:
        path: The folder of the model.
        kind: "initialized": the files do not contain these weights, so that they are random.
            "ignored": the class does not have these tensors of the files.
        keys: The names of the tensors.
    """

    path: str
    kind: Literal["initialized", "ignored"]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close the logits of two checkpoints are; logits [tokens, common vocabulary rows].

    Attributes:
        tokens: The tokens whose logits are finite on both sides. The numbers are about these (0.0
            if there are none).
        largest: The largest absolute difference.
        mean: The mean absolute difference.
        relative: ``largest`` divided by the largest logit.
        kl: The KL divergence of the second distribution from the first in nats, averaged over the
            tokens.
        top1: The share of tokens for which both predict the same next token.
        place: The first layer and part that differ; "" if none does.
        apart: The difference there, relative to the largest value of the part.
        causes: With these, the sides agree completely or up to a later part.
        explained: Whether they agree completely.
        non_finite: The logits that are NaN or infinite; None if all are finite. Otherwise, place is
            where such values first appear, and apart has no meaning.
        load_changes: What transformers changed when it loaded models of no known family. If there
            is any, they were not computed.
    """

    tokens: int
    largest: float
    mean: float
    relative: float
    kl: float
    top1: float
    place: str = ""
    apart: float = 0.0
    causes: tuple[Cause, ...] = ()
    explained: bool = False
    non_finite: NonFinite | None = None
    load_changes: tuple[LoadChange, ...] = ()

    @property
    def comparable(self) -> bool:
        """Whether logits can be compared: False if the same ones are NaN or infinite.

        Also False if transformers loaded other models than those in the files.
        """
        if self.load_changes:
            return False
        return self.non_finite is None or not self.non_finite.same_places

    @property
    def agrees(self) -> bool:
        """Whether both are the same model, as far as both frameworks can express it."""
        if self.non_finite is not None or self.load_changes:
            return False
        inherent = self.explained and all(cause.inherent for cause in self.causes)
        return not self.place or inherent


@dataclass(frozen=True, slots=True)
class _Parting:
    """A part at which the sides differ: its index in the model, and the size of the difference."""

    number: int
    name: str
    apart: float


def compare_logits(
    first: Checkpoint, second: Checkpoint, tokens: Tensor, device: str = "cpu"
) -> Agreement:
    """Run both on tokens [b, s], in float32, with one layer of each in memory.

    Raises BridgeError for models that cannot be computed here.
    """
    first, second = as_one_model(first, second)
    ignored = first.ignored_keys | second.ignored_keys
    first, second = (replace(one, ignored_keys=ignored) for one in (first, second))
    sides = [forward_pass(checkpoint, tokens, device) for checkpoint in (first, second)]
    a, b = (_logits(one) for one in sides)
    rows = min(first.vocab_rows, second.vocab_rows)
    a, b = (logits[..., :rows].flatten(0, -2) for logits in (a, b))
    measured = measure(a, b)
    if (odd := describe_non_finite(a, b, (first, second))) is not None:
        return replace(measured, non_finite=odd, place=_first_non_finite(sides, odd.same_places))
    if measured.relative <= LOGITS:
        return measured
    place = _part(sides, {}, 0)
    if place is None and measured.relative > 1e-3:
        place = _Parting(0, "rounding that grows over the layers", measured.relative)
    if place is None:
        return measured
    chosen, left = _explain(first, second, sides, place)
    causes = tuple(Cause(h.cause, h.text, h.inherent) for h in chosen)
    return replace(
        measured,
        place=place.name,
        apart=place.apart,
        causes=causes,
        explained=bool(causes) and left is None,
    )


def compare_recorded(
    checkpoint: Checkpoint, tokens: Tensor, recorded: Tensor, device: str = "cpu"
) -> Agreement:
    """Compare the logits of a checkpoint with recorded logits of a framework.

    recorded: float32 [b, s, v], of tokens [b, s]. If a GPT-NeoX checkpoint does not match, other
    interpretations of its weights are tried, such as another grouped-query order.
    """
    checkpoint = as_stored(check_copies(checkpoint))
    if recorded.dim() != 3 or recorded.shape[:-1] != tokens.shape:
        raise BridgeError(
            f"`tokens=`: the recorded logits have the shape {list(recorded.shape)}, and the "
            f"tokens {list(tokens.shape)}. They must contain one row of logits per token."
        )
    one = forward_pass(checkpoint, tokens, device)
    rows = min(checkpoint.vocab_rows, recorded.shape[-1])
    wanted = recorded.to(device)[..., :rows].flatten(0, -2)

    def computed(settings: Settings) -> Tensor:
        return _logits(one, settings)[..., :rows].flatten(0, -2)

    logits = computed({})
    agreement = measure(wanted, logits)
    if (odd := describe_non_finite(logits, wanted, (checkpoint,))) is not None:
        return replace(agreement, non_finite=odd, place="the recorded logits")
    # recorded logits of a half-precision model were computed in half precision
    enough = LOGITS if checkpoint.config.dtype == "float32" else 0.02
    if agreement.relative <= enough:
        return agreement
    causes: tuple[Cause, ...] = ()
    explained = False
    if checkpoint.kind == "neox":
        tried = []
        for h in hypotheses(checkpoint, checkpoint):
            with suppress(BridgeError):
                tried.append((measure(wanted, computed(h.settings)), h))
        best, h = min(tried, key=lambda each: each[0].relative)
        if best.relative <= max(enough, agreement.relative / 10):
            causes = (Cause(h.cause, h.text, h.inherent),)
        explained = best.relative <= enough
    return replace(
        agreement,
        place="the recorded logits",
        apart=agreement.relative,
        causes=causes,
        explained=explained,
    )


def _explain(
    first: Checkpoint, second: Checkpoint, sides: list[ForwardPass], place: _Parting
) -> tuple[list[Hypothesis], _Parting | None]:
    """The hypotheses under which the sides agree further, and where they still differ."""
    if "neox" not in (first.kind, second.kind):
        return [], place
    on = 0 if first.kind == "neox" else 1
    neox, other = (first, second) if on == 0 else (second, first)
    left: _Parting | None = place
    chosen: list[Hypothesis] = []
    settings: dict[str, object] = {}
    candidates = hypotheses(neox, other)
    while left is not None and len(chosen) < _MOST:
        tried = []
        for h in candidates:
            with suppress(BridgeError):  # hypotheses that do not apply to this model
                tried.append((h, _part(sides, {**settings, **h.settings}, on)))
        # prefer a later first difference, then a smaller one
        best, there = max(
            tried, key=lambda one: (one[1].number, -one[1].apart) if one[1] else (math.inf, 0.0)
        )
        if there is not None and there.number <= left.number and there.apart > left.apart / 2:
            break
        chosen.append(best)
        settings |= best.settings
        left = there
    return chosen, left


def _part(sides: list[ForwardPass], settings: Settings, on: int) -> _Parting | None:
    """The first part that differs although both sides got the same input."""
    both: list[Settings] = [_NONE, _NONE]
    both[on] = settings
    with closing(_in_step(sides, both)) as parts:
        for number, (name, a, b) in enumerate(parts, 1):
            if (size := apart(a, b)) > LAYER:
                return _Parting(number, name, size)
    return None


def _count_non_finite(whole: Whole, context: Context) -> int:
    """How many values of a tensor are NaN or infinite, read block by block."""
    count = 0
    for start, shape in boxes(whole.shape, MEASURED_ELEMENTS):
        block = values(whole, whole.dtype, start, shape, context)
        count += int(block.size - np.count_nonzero(np.isfinite(block)))
    return count


def describe_non_finite(
    first: Tensor, second: Tensor, checkpoints: tuple[Checkpoint | StoredModel, ...]
) -> NonFinite | None:
    """Find the non-finite logits [tokens, vocabulary] and their origin; None if all are finite.

    checkpoints: the models whose weights are searched: both, or only the first.
    """
    bad = ~first.isfinite(), ~second.isfinite()
    either = bad[0] | bad[1]
    if not bool(either.any()):
        return None
    same = bool((bad[0] == bad[1]).all())
    tensor, counts = _first_weight(checkpoints, same)
    tokens = int(either.any(-1).sum())
    return NonFinite(tokens, int(bad[0].sum()), int(bad[1].sum()), same, tensor, *counts)


def _first_weight(
    checkpoints: tuple[Checkpoint | StoredModel, ...], same: bool
) -> tuple[str, tuple[int, int]]:
    """The first weight that is not finite, and how many of its values are not on each side."""
    context = Context()
    fallback: tuple[str, tuple[int, int]] = ("", (0, 0))
    try:
        # the order of the model, if its family is known
        for name in checkpoints[0].by_name or checkpoints[0].tensors:
            counts = [
                _count_non_finite(one.tensors[name], context) if name in one.tensors else 0
                for one in checkpoints
            ]
            pair = (counts[0], counts[-1] if len(counts) > 1 else 0)
            if len(counts) == 1 or same:
                if any(counts):
                    return name, pair
            elif pair[0] != pair[1]:
                return name, pair
            elif any(counts) and not fallback[0]:
                fallback = (name, pair)
    finally:
        context.files.close()
    return fallback


def _first_non_finite(sides: list[ForwardPass], same_places: bool) -> str:
    """The first part where values are not finite: on both sides, or only on one side."""
    with closing(_in_step(sides, [_NONE, _NONE])) as parts:
        for name, a, b in parts:
            bad = ~a.isfinite(), ~b.isfinite()
            apart = bad[0].shape != bad[1].shape or bool((bad[0] != bad[1]).any())
            if apart or (same_places and bool(bad[0].any())):
                return name
    return "logits"


def _in_step(
    sides: list[ForwardPass], settings: Sequence[Settings]
) -> Generator[tuple[str, Tensor, Tensor], None, None]:
    """Yield each part of both sides. The second side gets the outputs of the first as inputs."""
    first, second = (one(meant) for one, meant in zip(sides, settings, strict=True))
    with closing(first), closing(second):
        output = None
        for a in first:
            try:
                b = next(second) if output is None else second.send(output)
            except StopIteration:
                return
            yield from _pairs(a.name, a, b)
            output = a.output


def _pairs(name: str, a: Stage, b: Stage) -> Iterator[tuple[str, Tensor, Tensor]]:
    for part in a.parts:
        yield f"{name}, {part}", a.parts[part], b.parts[part]
    rows = min(a.output.shape[-1], b.output.shape[-1])  # logits may be padded
    yield name, a.output[..., :rows], b.output[..., :rows]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, divided by the largest value; infinite if shapes or NaN differ."""
    finite = a.isfinite()
    if a.shape != b.shape or bool((finite != b.isfinite()).any()):
        return math.inf
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    gap = float((a - b).abs().max())
    scale = float(torch.maximum(a.abs().max(), b.abs().max()))
    return gap / scale if scale else 0.0


def _logits(one: ForwardPass, settings: Settings = _NONE) -> Tensor:
    (last,) = deque(one(settings), maxlen=1)
    return last.output


def measure(a: Tensor, b: Tensor) -> Agreement:
    """a, b: [tokens, vocabulary], float32. Tokens with logits that are not finite are ignored."""
    finite = a.isfinite().all(-1) & b.isfinite().all(-1)
    a, b = a[finite], b[finite]
    if not a.numel():
        return Agreement(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    gap = (a - b).abs()
    scale = float(a.abs().max())
    largest = float(gap.max())
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    top1 = float((a.argmax(-1) == b.argmax(-1)).float().mean())
    relative = largest / scale if scale else float(largest > 0)
    return Agreement(len(a), largest, float(gap.mean()), relative, max(kl, 0.0), top1)
