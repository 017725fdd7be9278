"""``neox-bridge audit``: compares all checkpoints of a run or a suite with each other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.documents import document, plain_data
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Severity
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.head import ambiguity, as_stored
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.planning.weight_dtypes import odd_dtypes
from neox_bridge.verification.audit_blobs import blob_faults
from neox_bridge.verification.audit_identity import across_runs, identity_faults
from neox_bridge.verification.audit_norms import broken_faults, jump_faults
from neox_bridge.verification.audit_settings import init_faults, missing_faults, setting_faults
from neox_bridge.verification.audit_states import state_faults
from neox_bridge.verification.opened import Opened, unreadable
from neox_bridge.verification.runs import Fault
from neox_bridge.verification.steps import Step, read_step
from neox_bridge.wording import some

_ONE_FORMAT = "convert the run to one format, and audit it there"
_ORDER = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit.

    Attributes:
        steps: By run and step.
        faults: The faults, most severe first.
        sources: The folders, URLs or models as the caller named them.
    """

    steps: tuple[Step, ...]
    faults: tuple[Fault, ...]
    sources: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether there are no warnings and errors."""
        return all(fault.severity == "info" for fault in self.faults)

    def to_json(self) -> dict[str, Any]:
        """The document that ``audit --json`` prints."""
        findings = [plain_data(fault) for fault in self.faults]
        for finding in findings:
            del finding["subject"], finding["details"]  # audit does not show it
        return document(
            sources=self.sources,
            holds=self.holds,
            findings=findings,
            steps=[_step_json(step, self.faults) for step in self.steps],
        )


def _step_json(step: Step, faults: Sequence[Fault]) -> dict[str, Any]:
    states = {
        name: {"hash": p.hash, "norm": p.norm, "bad": p.bad} for name, p in step.states.items()
    }
    return {
        "run": step.run,
        "step": step.number,
        "label": step.label,
        "path": step.path,
        "kind": step.kind,
        "read_by": step.read_by,
        "tensor_parallel": step.tp,
        "dtype": step.dtype,
        "bytes": step.size,
        "hash": step.hash,
        "norm": step.norm,
        "read": step.read,
        **({"optimizer": {"updates": step.updates, "states": states}} if states else {}),
        "verdict": verdict(step, faults),
        "tensors": {
            name: {"hash": p.hash, "norm": p.norm, "shape": p.shape, "bad": p.bad}
            for name, p in step.tensors.items()
        },
    }


def audit(
    opened: Iterable[Opened],
    *,
    faults: Iterable[Fault] = (),
    same_init: bool = False,
    optimizer: bool = False,
    blobs: bool = False,
    cache: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Read the weights of every checkpoint, unless cached, and compare them.

    A fault in one checkpoint does not stop the audit of the others.

    Args:
        optimizer: Also audit optimizer states.
        faults: Already known faults.
        blobs: Read every blob of a Hugging Face cache, to compare it with the hash in its name.
        same_init: Runs of the same shape must have equal initial weights.
        cache: The folder of the cache (``hash_cache``), or None.
    """
    runs: dict[str, list[Step]] = {}
    numbers: dict[str, list[int]] = {}
    all_faults = list(faults)
    opened_runs: dict[str, list[Opened]] = {}
    for one in opened:
        runs.setdefault(one.run, [])
        opened_runs.setdefault(one.run, []).append(one)
        if one.place.number is not None:
            numbers.setdefault(one.run, []).append(one.place.number)
        if one.checkpoint is None:
            all_faults += [one.fault] if one.fault is not None else []
            continue
        states = None
        if optimizer and isinstance(one.checkpoint, Checkpoint) and one.checkpoint.has_optimizer:
            try:
                states = read_optimizer(one.checkpoint)
            except (BridgeError, OSError) as error:
                all_faults.append(replace(unreadable(one.run, one.place, error), code="no-states"))
        family = one.family if isinstance(one.checkpoint, StoredModel) else one.checkpoint
        model, checked = one.checkpoint, None
        try:
            if family is not None:
                checked = as_stored(check_copies(family))
        except (BridgeError, OSError) as error:
            all_faults.append(unreadable(one.run, one.place, error))
            if one.family is None:
                continue
        try:
            step = read_step(
                one.run,
                one.place,
                model if isinstance(model, StoredModel) or checked is None else checked,
                family=checked,
                optimizer=states,
                cache=cache,
                workers=workers,
                progress=progress,
            )
        except (BridgeError, OSError) as error:
            all_faults.append(unreadable(one.run, one.place, error))
        else:
            runs[one.run].append(step)
            all_faults += _index_faults(step, one.checkpoint)
            if family is not None and checked is not None:
                all_faults += _weight_faults(step, family, checked)
    for run, steps in runs.items():
        all_faults += blob_faults(opened_runs[run], blobs, workers=workers, progress=progress)
        all_faults += _reading_faults(steps)
        for way in ("family", "names"):
            all_faults += judge([step for step in steps if step.read_by == way])
        all_faults += missing_faults(run, sorted(set(numbers.get(run, ()))))
    all_faults += across_runs(runs)
    all_faults += init_faults(runs, same_init)
    ordered = sorted(all_faults, key=lambda fault: _ORDER.index(fault.severity))
    return Audit(tuple(step for steps in runs.values() for step in steps), tuple(ordered))


def judge(steps: Sequence[Step]) -> list[Fault]:
    """All faults of one run's steps, in order."""
    same = list(identity_faults(steps))
    explained = frozenset(
        (label, name)
        for fault in same
        if fault.severity != "info"
        for label in fault.steps
        for name in fault.tensors or (steps[0].tensors if steps else ())
    )
    norms = [*broken_faults(steps), *jump_faults(steps, explained)]
    return [*same, *setting_faults(steps), *norms, *state_faults(steps, [*same, *norms])]


def verdict(step: Step, faults: Iterable[Fault]) -> str:
    """The worst severity of a step: error, warning or ok."""
    worst = {f.severity for f in faults if f.run == step.run and step.label in f.steps}
    return next((word for word in _ORDER[:2] if word in worst), "ok")


def _index_faults(step: Step, model: Checkpoint | StoredModel) -> Iterator[Fault]:
    """An index that contradicts the files."""
    for finding in model.index_findings:
        message = f"{step.run}: step {step.label}: {finding.message}"
        yield step.fault(finding.code, finding.severity, message, finding.remedy)


def _reading_faults(steps: Sequence[Step]) -> Iterator[Fault]:
    """A run of which some steps are of a known family, and others are not."""
    unknown = [step for step in steps if step.reason]
    if not unknown or len(unknown) == len(steps):
        return
    run, labels = unknown[0].run, tuple(step.label for step in unknown)
    which = f"{run}: step {some(list(labels))} cannot be read by a family ({unknown[0].reason})"
    by_family = [step.label for step in steps if step.read_by == "family"]
    if len(by_family) + len(unknown) < len(steps):
        message = f"{which}. So the steps are compared by the names in their files"
        yield Fault("read-by-names", "info", message, "", run, labels)
    if by_family:
        message = (
            f"{which}. Its tensors are not compared with those of step {some(by_family)}, because "
            "GPT-NeoX stores other tensors"
        )
        yield Fault("not-comparable", "warning", message, _ONE_FORMAT, run, labels)


def _weight_faults(step: Step, stored: Checkpoint, read: Checkpoint) -> Iterator[Fault]:
    """Weights of unusual dtypes, and tied configs with a separate head, as in the files."""
    for odd in odd_dtypes(read):
        severity: Severity = "warning" if odd.castable else "error"
        message = f"{step.label}: {odd.reason}"
        yield step.fault("weight-dtype", severity, message, odd.way_out, odd.names)
    if stored.tied_head is not None and not read.config.tied_embeddings:
        message, remedy = ambiguity(stored)
        yield step.fault("head-differs", "warning", f"{step.label}: {message}", remedy)
