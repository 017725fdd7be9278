"""Finds norms that training does not produce: NaN, infinities, jumps between steps.

A jump is compared with the changes of the same tensor before and after it, per step or per doubling
of the step, whichever explains more. Training changes norms fast at first and slowly later, and
steps may be evenly spaced or powers of two.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neox_bridge.verification.runs import Fault
from neox_bridge.verification.steps import Step
from neox_bridge.wording import plural, some, verb

LEAST = 0.05  # relative to the norm: smaller jumps are ignored
SPIKE = 4.0  # times the change that its neighbors explain: training never does this,
STEP = 8.0  # training rarely does this, on suddenly learning something (at most 6 in tiny models)
# relative to the largest norm of a tensor: smaller norms count as zero, as of initial biases
FLOOR = 1e-3
NEEDED = 4  # steps that are needed to see a trend
BESIDE = 3  # changes on each side


@dataclass(frozen=True, slots=True)
class _Jump:
    name: str
    before: float
    norm: float
    spike: bool

    @property
    def size(self) -> float:
        return abs(math.log((self.norm or 1e-30) / (self.before or 1e-30)))


def broken_faults(steps: Sequence[Step]) -> Iterator[Fault]:
    """NaN, infinities, and matrices that became constant."""
    for step in steps:
        if bad := {name: tensor.bad for name, tensor in step.tensors.items() if tensor.bad}:
            names = [f"{name} ({count:,})" for name, count in bad.items()]
            what = f"{step.run}: step {step.label} has NaN or infinite values in {some(names, 3)}"
            remedy = (
                "the run diverged, or a cast overflowed; use an earlier step, or copy the step "
                "again"
            )
            yield step.fault("not-finite", "error", what, remedy, bad)
    yield from _blank(steps)


def jump_faults(
    steps: Sequence[Step], explained: frozenset[tuple[str, str]] = frozenset()
) -> Iterator[Fault]:
    """Jumps of norms. explained: (label of the step, tensor) that are known to be wrong."""
    known = [step for step in steps if step.number is not None]
    jumps: dict[int, list[_Jump]] = defaultdict(list)
    for name in dict.fromkeys(name for step in known for name in step.tensors):
        usable = [
            (i, norm)
            for i, step in enumerate(known)
            if name in step.tensors
            and (norm := step.tensors[name].norm) is not None
            and not step.tensors[name].bad
            and (step.label, name) not in explained
        ]
        points = [(float(known[i].number or 0), norm) for i, norm in usable]
        for at, spike in jumps_of(points):
            index = usable[at][0]
            jumps[index].append(_Jump(name, points[at - 1][1], points[at][1], spike))
    for index, jumped in sorted(jumps.items()):
        yield _jumped(known[index], jumped)


def _jumped(step: Step, jumps: list[_Jump]) -> Fault:
    jumps = sorted(jumps, key=lambda jump: -jump.size)
    names = [f"{j.name} ({j.before:.4g} to {j.norm:.4g})" for j in jumps]
    count, back = len(jumps), ""
    if all(jump.spike for jump in jumps):
        back = f", and {verb(count, 'return')} to normal at the next step"
    norms = f"the {'norm' if count == 1 else 'norms'} of {plural(count, 'tensor')}"
    norms += f" {verb(count, 'jump')}{back}"
    what = f"{step.run}: at step {step.label} {norms}: {some(names, 3)}"
    remedy = "training was unstable at this step, or the file is from another run or step"
    return step.fault("norm-jump", "warning", what, remedy, (jump.name for jump in jumps))


def _blank(steps: Sequence[Step]) -> Iterator[Fault]:
    """Matrices that become constant, as in incompletely written files."""
    seen: set[str] = set()
    for step in steps:
        matrices = {n: p for n, p in step.tensors.items() if len(p.shape) > 1}
        names = [name for name, p in matrices.items() if p.constant and name in seen]
        seen |= {name for name, p in matrices.items() if not p.constant}
        if names:
            what = f"{step.run}: at step {step.label} all elements are equal in {some(names, 3)}"
            remedy = "the file was not completely written; copy it again"
            yield step.fault("blank-tensor", "error", what, remedy, names)


def jumps_of(points: Sequence[tuple[float, float]]) -> list[tuple[int, bool]]:
    """(index, whether it returns at the next point) of the points to which a norm jumps.

    points: (step, norm), by step. The first never counts, because training starts fast.
    """
    largest = max((norm for _, norm in points), default=0.0)
    if len(points) < NEEDED or not math.isfinite(largest) or largest == 0:
        return []
    ys = [math.log(norm + FLOOR * largest) for _, norm in points]
    evenly = [step for step, _ in points]
    doublings = [math.log2(step + 1) for step, _ in points]
    jumps: list[tuple[int, bool]] = []
    at = 1
    while at < len(ys):
        # a spike is judged alone, because its return would hide it
        if _spikes(at, ys, evenly, doublings):
            jumps.append((at, True))
            at += 2
            continue
        if _steps(at, ys, evenly, doublings):
            jumps.append((at, False))
        at += 1
    return jumps


def _spikes(at: int, ys: list[float], *axes: list[float]) -> bool:
    """Whether the point is far from both neighbours, on the same side, and they are close."""
    if at + 1 >= len(ys):
        return False
    away, back = ys[at] - ys[at - 1], ys[at] - ys[at + 1]
    size = min(abs(away), abs(back))
    if away * back <= 0 or size < LEAST:
        return False
    over = abs(ys[at + 1] - ys[at - 1])
    rest = [ys[:at] + ys[at + 1 :], *[axis[:at] + axis[at + 1 :] for axis in axes]]
    return size > SPIKE * max(over, *[_usual(at, rest[0], axis) for axis in rest[1:]])


def _steps(at: int, ys: list[float], *axes: list[float]) -> bool:
    """Whether the change to the point is far larger than those before it and after it."""
    size = abs(ys[at] - ys[at - 1])
    if size < LEAST or at < NEEDED - 1:
        return False
    return size > STEP * max(_usual(at, ys, axis) for axis in axes)


def _usual(at: int, ys: list[float], axis: list[float]) -> float:
    """The expected change from ``at - 1`` to ``at`` at the fastest neighboring rate."""
    distance = axis[at] - axis[at - 1]
    beside = [*range(max(1, at - BESIDE), at), *range(at + 1, min(len(ys), at + 1 + BESIDE))]
    rates = [
        abs(ys[i] - ys[i - 1]) / (axis[i] - axis[i - 1]) for i in beside if axis[i] > axis[i - 1]
    ]
    return max(rates, default=math.inf) * max(distance, 0.0)
