"""Compares two runs that should have equal weights at each step, such as a suite and its twin.

A published suite exists twice: as GPT-NeoX wrote it, and converted for transformers, a branch for
each step. Branches of such suites have been mixed up (issues 195, 205 and 206 of
https://github.com/EleutherAI/pythia). So each step of one run is compared with the same step of the
other, tensor by tensor under Hugging Face's names. If they differ, the weights are searched at the
other steps.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.head import as_stored
from neox_bridge.layouts.open_stored import read_alike
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.verification.compare import common_dtype
from neox_bridge.verification.hashes import Fingerprint
from neox_bridge.verification.opened import Opened, open_places, read_by_names, unreadable
from neox_bridge.verification.run_pairs import SIDES, OpenedPair, Side
from neox_bridge.verification.runs import Fault, StepLocation, TrainingRun
from neox_bridge.verification.steps import ReadBy, Step, read_step
from neox_bridge.wording import plural, some, verb

Model = Checkpoint | StoredModel
StepStatus = Literal["same", "differs", "no counterpart", "unreadable"]
TensorDifferenceKind = Literal["values", "shape", "dtype", "only in source", "only in twin"]
_CAST = "cast"  # a folder in the cache: fingerprints after a cast


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that differs, with its Hugging Face name."""

    name: str
    kind: TensorDifferenceKind


@dataclass(frozen=True, slots=True)
class Origin:
    """Another step at which the differing weights were found.

    Attributes:
        side: The run that has them there.
        step: The label of its step.
        tensors: How many of the tensors that differ in this row.
    """

    side: Side
    step: str
    tensors: int


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of the two runs.

    Attributes:
        step: Its number; None if unknown.
        label: As the place names it, ``1000`` or ``main``.
        status: "no counterpart" where only one run has the step; it is not read then.
        side: The run that has no such step, or that cannot be read; None otherwise.
        source: The place of the source's checkpoint; "" where there is none.
        twin: The same of the twin.
        tensors: How many were compared.
        differences: Those that differ.
        casts: Pairs of dtypes, source and twin, that were compared after an exact cast.
        origins: Other steps that have the differing weights, the one with most tensors first.
        saved: The step in the source's files, if it differs from that of the place.
        reason: Why a side cannot be read.
        read_by: Whether a family or only the names in the files say which tensors there are; None
            if they were not compared.
    """

    step: int | None
    label: str
    status: StepStatus
    side: Side | None = None
    source: str = ""
    twin: str = ""
    tensors: int = 0
    differences: tuple[TensorDifference, ...] = ()
    casts: tuple[tuple[str, str], ...] = ()
    origins: tuple[Origin, ...] = ()
    saved: int | None = None
    reason: str = ""
    read_by: ReadBy | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, compared step by step.

    Attributes:
        source: The name of the run that was audited.
        twin: The name of the run that it was compared with.
        rows: By step.
        settings: The config keys, in neutral words, in which the two sides differ.
    """

    source: str
    twin: str
    rows: tuple[StepRow, ...]
    settings: tuple[str, ...] = ()

    def count(self, status: StepStatus) -> int:
        return sum(row.status == status for row in self.rows)

    @property
    def compared(self) -> int:
        """The steps of which both sides were read."""
        return self.count("same") + self.count("differs")

    @property
    def holds(self) -> bool:
        """Whether every step that both runs have could be read and is the same."""
        return not (self.count("differs") or self.count("unreadable"))


def compare_runs(
    pair: OpenedPair,
    *,
    cache: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Read both runs and compare them step by step.

    Different dtypes are compared after a lossless cast. If a step differs, the steps that only one
    run has are read as well, to find out which weights it has.
    """
    dtypes = _common_dtypes(pair)

    def read(opened: Opened) -> Step | Fault:
        """The step, or why it cannot be opened or read."""
        if opened.checkpoint is None:
            assert opened.fault is not None
            return opened.fault
        try:
            checkpoint = opened.checkpoint
            if isinstance(checkpoint, Checkpoint):
                checkpoint = as_stored(check_copies(checkpoint))
            checkpoint, is_cast = _in_dtypes(checkpoint, dtypes)
            folder = os.path.join(cache, _CAST) if cache is not None and is_cast else cache
            step = read_step(
                opened.run,
                opened.place,
                checkpoint,
                cache=folder,
                workers=workers,
                progress=progress,
            )
        except (BridgeError, OSError) as error:
            return unreadable(opened.run, opened.place, error)
        return step

    known: dict[Side, dict[str, Step]] = {side: {} for side in SIDES}  # steps by label
    compared, rows, settings = list[tuple[StepRow, Step, Step]](), list[StepRow](), list[str]()
    for both in pair.both:
        source, twin = both
        row = StepRow(
            source.number,
            source.place.label,
            "same",
            source=source.place.path,
            twin=twin.place.path,
            casts=_casts(source.checkpoint, twin.checkpoint),
        )
        if reason := _not_comparable(source, twin):
            rows.append(replace(row, status="unreadable", side="source", reason=reason))
            continue
        steps = list[Step]()
        for side, opened in zip(SIDES, both, strict=True):
            step = read(opened)
            if isinstance(step, Fault):
                rows.append(replace(row, status="unreadable", side=side, reason=step.message))
                break
            known[side][step.label] = step
            steps.append(step)
        else:
            compared.append((_compare(row, *steps), steps[0], steps[1]))
            settings += _differing_settings(*steps)
    if any(row.status == "differs" for row, _, _ in compared):
        for side, place in pair.alone:
            for opened in open_places([TrainingRun(pair.name(side), (place,))], pair.configs):
                step = read(read_by_names(opened) if pair.by_names else opened)
                if isinstance(step, Step):  # else its row says that it has no counterpart
                    known[side][step.label] = step
    for row, in_source, in_twin in compared:
        origins = [
            *_origins(row, in_source, "twin", known["twin"].values()),
            *_origins(row, in_twin, "source", known["source"].values()),
        ]
        rows.append(replace(row, origins=tuple(sorted(origins, key=lambda one: -one.tensors))))
    rows += [_lonely(side, place) for side, place in pair.alone]
    ordered = sorted(rows, key=lambda row: (-1 if row.step is None else row.step, row.label))
    return Comparison(pair.source, pair.twin, tuple(ordered), tuple(dict.fromkeys(settings)))


def faults_of(comparison: Comparison) -> list[Fault]:
    """The findings of a comparison: one per row that is not equal."""
    rows = (_fault(comparison, row) for row in comparison.rows)
    return [*filter(None, rows), *settings_faults(comparison)]


def settings_faults(comparison: Comparison) -> list[Fault]:
    """The finding for settings that differ between the two runs, if any do."""
    if not comparison.settings:
        return []
    names = some(list(comparison.settings))
    message = f"the settings of {comparison.source} and {comparison.twin} differ: {names}"
    remedy = "compare the yml with config.json; this audit compares only weights"
    return [Fault("settings-differ", "warning", message, remedy, comparison.source)]


def origin_words(row: StepRow, comparison: Comparison) -> str:
    """The other steps that have the differing weights of a row, as a clause; "" if none has."""
    words = []
    for origin in row.origins:
        here, there = comparison.source, comparison.twin
        if origin.side == "source":
            here, there = there, here
        count = "all" if origin.tensors == len(row.differences) else f"{origin.tensors}"
        words.append(f"{count} of these tensors in {here} equal step {origin.step} of {there}")
    return "; ".join(words)


def compared_dtypes(rows: Iterable[StepRow]) -> list[tuple[str, str]]:
    """The pairs of dtypes, source and twin, that were compared after a cast, each once."""
    return sorted({pair for row in rows if row.status != "unreadable" for pair in row.casts})


def _fault(comparison: Comparison, row: StepRow) -> Fault | None:
    run, labels = comparison.source, (row.label,)
    if row.status == "differs":
        names = tuple(difference.name for difference in row.differences)
        message = (
            f"step {row.label}: {len(names)} of {plural(row.tensors, 'tensor')} "
            f"{verb(len(names), 'differ')} between {comparison.source} and {comparison.twin}"
        )
        if where := origin_words(row, comparison):
            message += f": {where}"
        remedy = "one of the two runs has wrong weights at this step; copy or convert it again"
        return Fault("weights-differ", "error", message, remedy, run, labels, names)
    if row.status == "unreadable":
        return Fault("unreadable", "error", f"step {row.label}: {row.reason}", "", run, labels)
    if row.status == "no counterpart":
        without = comparison.twin if row.side == "twin" else comparison.source
        message = f"step {row.label} has no counterpart: {without} has no such step"
        return Fault("no-counterpart", "info", message, "", run, labels)
    return None


def _common_dtypes(pair: OpenedPair) -> dict[str, str]:
    """The common dtype of each tensor that the runs have in different dtypes."""
    seen: dict[str, set[str]] = {}
    for step in (step for both in pair.both for step in both):
        if step.checkpoint is not None:
            for name, whole in step.checkpoint.tensors.items():
                seen.setdefault(name, set()).add(whole.dtype)
    common = {name: common_dtype(kinds) for name, kinds in seen.items() if len(kinds) > 1}
    return {name: dtype for name, dtype in common.items() if dtype is not None}


def _casts(source: Model | None, twin: Model | None) -> tuple[tuple[str, str], ...]:
    if source is None or twin is None:
        return ()
    pairs = {
        (whole.dtype, twin.tensors[name].dtype)
        for name, whole in source.tensors.items()
        if name in twin.tensors and twin.tensors[name].dtype != whole.dtype
    }
    return tuple(sorted(pairs))


def _compare(row: StepRow, source: Step, twin: Step) -> StepRow:
    names = sorted({*source.tensors, *twin.tensors})
    kinds = {name: _kind(source.tensors.get(name), twin.tensors.get(name)) for name in names}
    differences = tuple(TensorDifference(n, kind) for n, kind in kinds.items() if kind is not None)
    return replace(
        row,
        status="differs" if differences else "same",
        tensors=len(names),
        differences=differences,
        saved=source.iteration,
        read_by=source.read_by,
    )


def _not_comparable(source: Opened, twin: Opened) -> str:
    """Why two steps have no tensors in common, if only one of them has a family; or ""."""
    if source.checkpoint is None or twin.checkpoint is None:
        return ""
    try:
        read_alike(source.checkpoint, twin.checkpoint)
    except Refused as error:
        return str(error)
    return ""


def _kind(source: Fingerprint | None, twin: Fingerprint | None) -> TensorDifferenceKind | None:
    if source is None or twin is None:
        return "only in twin" if source is None else "only in source"
    if source.shape != twin.shape:
        return "shape"
    if source.dtype != twin.dtype:
        return "dtype"
    return None if source.hash == twin.hash else "values"


def _differing_settings(source: Step, twin: Step) -> list[str]:
    if source.read_by == "names":
        both = source.config.keys() & twin.config.keys()
        return sorted(key for key in both if source.config[key] != twin.config[key])
    keys = sorted({*source.meaning, *twin.meaning} - {"dtype"})
    return [key for key in keys if source.meaning.get(key) != twin.meaning.get(key)]


def _in_dtypes(checkpoint: Model, dtypes: Mapping[str, str]) -> tuple[Model, bool]:
    """The checkpoint with these tensors in these dtypes, and whether any is cast."""
    cast = {
        name: replace(whole, dtype=dtypes[name])
        for name, whole in checkpoint.tensors.items()
        if dtypes.get(name, whole.dtype) != whole.dtype
    }
    if isinstance(checkpoint, StoredModel):
        return replace(checkpoint, casts={n: w.dtype for n, w in cast.items()}), bool(cast)
    return replace(checkpoint, tensors={**checkpoint.tensors, **cast}), bool(cast)


def _origins(row: StepRow, here: Step, other: Side, steps: Collection[Step]) -> Iterator[Origin]:
    """The step of the other run that has most of the weights that differ here."""
    counts = Counter[str]()
    for name in (difference.name for difference in row.differences):
        fingerprint = here.tensors.get(name)
        if fingerprint is None or fingerprint.constant:
            continue  # a constant tensor does not identify a step
        for step in steps:
            if name in step.tensors and step.tensors[name].hash == fingerprint.hash:
                counts[step.label] += 1
    for label, count in counts.most_common(1):
        yield Origin(other, label, count)


def _lonely(side: Side, place: StepLocation) -> StepRow:
    row = StepRow(place.number, place.label, "no counterpart")
    if side == "source":
        return replace(row, side="twin", source=place.path)
    return replace(row, side="source", twin=place.path)
