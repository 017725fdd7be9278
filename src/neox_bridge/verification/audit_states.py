"""Finds optimizer states that are broken, from another step, or do not match the weights."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.states import STATE_OF, tensor_of
from neox_bridge.verification.audit_identity import identity_faults
from neox_bridge.verification.audit_norms import broken_faults, jump_faults
from neox_bridge.verification.runs import Fault
from neox_bridge.verification.steps import Step
from neox_bridge.wording import plural, some

_ROUNDED = 0.01  # relative to the norm: more than rounding to 16 bits causes
_MASTERS = f"{MASTER}{STATE_OF}"


def state_faults(steps: Sequence[Step], known: Iterable[Fault]) -> Iterator[Fault]:
    """Faults of one run's steps, in order. known: faults of their weights.

    Moments may jump, like gradients. Master weights may jump only if the weights do.
    """
    part = f"{steps[0].run}: the optimizer" if steps else ""
    with_states = [replace(step, run=part, tensors=step.states) for step in steps if step.states]
    faults = [*identity_faults(with_states), *broken_faults(with_states)]
    explained = {
        (label, f"{_MASTERS}{name}") for f in known for label in f.steps for name in f.tensors
    }
    explained |= {(label, name) for f in faults for label in f.steps for name in f.tensors}
    masters = [
        replace(s, tensors={n: p for n, p in s.tensors.items() if n.startswith(_MASTERS)})
        for s in with_states
    ]
    faults += jump_faults(masters, frozenset(explained))
    for fault in faults:
        yield replace(fault, run=steps[0].run)
    for step in steps:
        yield from _other_weights(step)
    yield from _counts([step for step in steps if step.updates])


def _other_weights(step: Step) -> Iterator[Fault]:
    """Master weights that do not match the weights after rounding."""
    apart = []
    for name, state in step.states.items():
        weight = step.tensors.get(tensor_of(name))
        if not name.startswith(_MASTERS) or weight is None or state.bad or weight.bad:
            continue
        same = state.hash == weight.hash
        if weight.dtype != state.dtype and state.norm is not None and weight.norm is not None:
            same = abs(state.norm - weight.norm) <= _ROUNDED * state.norm
        if not same:
            apart.append(tensor_of(name))
    if apart:
        message = (
            f"{step.run}: at step {step.label} the optimizer's master weights do not match the "
            "weights in "
        )
        remedy = "the optimizer files are from another step; copy them again"
        yield step.fault("other-masters", "error", f"{message}{some(apart, 3)}", remedy, apart)


def _counts(steps: Sequence[Step]) -> Iterator[Fault]:
    """Optimizers whose step count does not fit the folder, unlike other steps of the run.

    A run that restarted its optimizer at some step always lags behind by that step.
    """
    behind = {s.label: s.number - max(s.updates) for s in steps if s.number is not None}
    usual = Counter(behind.values()).most_common(1)
    for step in steps:
        why = ""
        if len(set(step.updates)) > 1:
            why = f"its parameter groups count {' and '.join(map(str, step.updates))} steps"
        elif step.label in behind and behind[step.label] != usual[0][0]:
            want = (step.number or 0) - usual[0][0]
            why = (
                f"it counts {plural(step.updates[0], 'step')}, but by the other steps of the run "
                f"it should be {want}"
            )
        if why:
            message = f"{step.run}: at step {step.label} the optimizer is from another step: {why}"
            remedy = "the optimizer files are from another step, or the run was restarted"
            yield step.fault("other-count", "warning", message, remedy)
