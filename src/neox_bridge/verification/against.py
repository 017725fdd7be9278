"""Two runs that should hold the same weights at each step, such as raw checkpoints and their twin.

A published suite exists twice: as GPT-NeoX wrote it, and converted for transformers, a branch for
each step. Branches of such suites have been mixed up (issues 195, 205 and 206 of
https://github.com/EleutherAI/pythia). So each step of one run is compared with the same step of the
other, tensor by tensor under Hugging Face's names. Where they differ, the weights are looked for at
the other steps.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.head import as_stored
from neox_bridge.verification.compare import common_dtype
from neox_bridge.verification.hashes import Fingerprint
from neox_bridge.verification.opened import Opened, open_places, unreadable
from neox_bridge.verification.run_pairs import SIDES, OpenedPair, Side
from neox_bridge.verification.runs import Fault, StepLocation, TrainingRun
from neox_bridge.verification.steps import Step, read_step
from neox_bridge.wording import some

SCHEMA_VERSION = 1
StepStatus = Literal["same", "differs", "no counterpart", "unreadable"]
TensorDifferenceKind = Literal["values", "shape", "dtype", "only in source", "only in twin"]
_CAST = "cast"  # a folder in the cache: fingerprints after a cast


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that is not the same on both sides, under its Hugging Face name."""

    name: str
    kind: TensorDifferenceKind


@dataclass(frozen=True, slots=True)
class Origin:
    """Another step of the other run at which differing weights were found.

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
        step: Its number; None where nothing tells it.
        label: As the place names it, ``1000`` or ``main``.
        status: "no counterpart" where only one run has the step; it is not read then.
        side: The run that has no such step, or that cannot be read; None otherwise.
        source: The place of the source's checkpoint; "" where there is none.
        twin: The same of the twin.
        tensors: How many were compared.
        differences: Those that differ.
        casts: Pairs of dtypes, source and twin, that were compared after an exact cast.
        origins: Where else the differing weights are, the most tensors first.
        saved: The step that the source's own files tell, where it is not the place's.
        reason: Why a side cannot be read.
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


@dataclass(frozen=True, slots=True)
class _Compared:
    """A row of two steps that were read, and the labels of both."""

    row: StepRow
    source: str
    twin: str


@dataclass
class _Hashes:
    """The fingerprints of one side's steps, by label."""

    steps: dict[str, Mapping[str, Fingerprint]] = field(default_factory=dict)

    def having(self, name: str, fingerprint: Fingerprint) -> Iterator[str]:
        """The steps with these values; a tensor of one value throughout tells nothing."""
        for label, tensors in self.steps.items():
            if (
                not fingerprint.constant
                and name in tensors
                and tensors[name].hash == fingerprint.hash
            ):
                yield label


@dataclass(frozen=True)
class _Reader:
    """dtypes: those in which tensors are read that the two runs have in different ones, by name."""

    dtypes: Mapping[str, str]
    cache: str | None
    workers: int | None
    progress: Callable[[int], None] | None

    def read(self, step: Opened) -> Step | Fault:
        """The step, or why it cannot be opened or read."""
        if step.checkpoint is None:
            assert step.fault is not None
            return step.fault
        try:
            return self._read(step, as_stored(check_copies(step.checkpoint)))
        except (BridgeError, OSError) as error:
            return unreadable(step.run, step.place, error)

    def _read(self, step: Opened, checkpoint: Checkpoint) -> Step:
        cast = {
            name: replace(whole, dtype=self.dtypes[name])
            for name, whole in checkpoint.tensors.items()
            if self.dtypes.get(name, whole.dtype) != whole.dtype
        }
        cache = self.cache
        if cast:
            checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **cast})
            cache = None if cache is None else os.path.join(cache, _CAST)
        return read_step(
            step.run,
            step.place,
            checkpoint,
            cache=cache,
            workers=self.workers,
            progress=self.progress,
        )


def compare_runs(
    pair: OpenedPair,
    *,
    cache: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Read both runs and compare them step by step.

    Weights of other dtypes are compared after the cast that keeps every value. Where a step
    differs, the steps that only one run has are read as well, to find out whose weights it has.

    Args:
        cache: The folder of remembered fingerprints, see ``hash_cache``; None for none.
        workers: Threads that read.
        progress: Called with the bytes just read.
    """
    reader = _Reader(_common_dtypes(pair), cache, workers, progress)
    known: dict[Side, _Hashes] = {side: _Hashes() for side in SIDES}
    compared, rows, settings = list[_Compared](), list[StepRow](), list[str]()
    for source, twin in pair.both:
        row = StepRow(
            source.number,
            source.place.label,
            "same",
            source=source.place.path,
            twin=twin.place.path,
            casts=_casts(source.checkpoint, twin.checkpoint),
        )
        sides = list[Step]()
        for side, opened in zip(SIDES, (source, twin), strict=True):
            step = reader.read(opened)
            if isinstance(step, Fault):
                rows.append(replace(row, status="unreadable", side=side, reason=step.message))
                break
            known[side].steps[step.label] = step.tensors
            sides.append(step)
        else:
            row = _compare(row, *sides)
            compared.append(_Compared(row, source.place.label, twin.place.label))
            settings += _differing_settings(*sides)
    if any(one.row.status == "differs" for one in compared):
        for side, place in pair.alone:
            for opened in open_places([TrainingRun(pair.name(side), (place,))], pair.configs):
                step = reader.read(opened)
                if isinstance(step, Step):  # else its row says that it has no counterpart
                    known[side].steps[step.label] = step.tensors
    rows += [_with_origins(one, known) for one in compared]
    rows += [_lonely(side, place) for side, place in pair.alone]
    ordered = sorted(rows, key=lambda row: (-1 if row.step is None else row.step, row.label))
    return Comparison(pair.source, pair.twin, tuple(ordered), tuple(dict.fromkeys(settings)))


def faults_of(comparison: Comparison) -> list[Fault]:
    """What a comparison says, as findings: one for each row that is not the same."""
    rows = [fault for row in comparison.rows if (fault := _fault(comparison, row)) is not None]
    return [*rows, *settings_faults(comparison)]


def settings_faults(comparison: Comparison) -> list[Fault]:
    """The finding for settings that differ between the two runs, if any do."""
    if not comparison.settings:
        return []
    names = some(list(comparison.settings))
    message = f"{comparison.source} and {comparison.twin} differ in their settings: {names}"
    remedy = "compare the yml with config.json; only weights are compared here"
    return [Fault("settings-differ", "warning", message, remedy, comparison.source)]


def origin_words(row: StepRow, comparison: Comparison) -> str:
    """Where else the differing weights of a row are, as a clause; "" where nowhere."""
    words = []
    for origin in row.origins:
        here, there = comparison.source, comparison.twin
        if origin.side == "source":
            here, there = there, here
        count = "all" if origin.tensors == len(row.differences) else f"{origin.tensors}"
        words.append(f"{count} that {here} has here are those of step {origin.step} of {there}")
    return "; ".join(words)


def compared_dtypes(rows: Iterable[StepRow]) -> list[tuple[str, str]]:
    """The pairs of dtypes, source and twin, that were compared after a cast, each once."""
    return sorted({pair for row in rows if row.status != "unreadable" for pair in row.casts})


def _fault(comparison: Comparison, row: StepRow) -> Fault | None:
    run, labels = comparison.source, (row.label,)
    if row.status == "differs":
        names = tuple(difference.name for difference in row.differences)
        message = (
            f"step {row.label}: {len(names)} of {row.tensors} tensors differ between "
            f"{comparison.source} and {comparison.twin}"
        )
        if where := origin_words(row, comparison):
            message += f": {where}"
        remedy = "one of the two has other weights at this step; copy or convert that one again"
        return Fault("weights-differ", "error", message, remedy, run, labels, names)
    if row.status == "unreadable":
        return Fault("unreadable", "error", f"step {row.label}: {row.reason}", "", run, labels)
    if row.status == "no counterpart":
        without = comparison.twin if row.side == "twin" else comparison.source
        message = f"step {row.label} has no counterpart: {without} has no such step"
        return Fault("no-counterpart", "info", message, "", run, labels)
    return None


def _common_dtypes(pair: OpenedPair) -> dict[str, str]:
    """The dtype in which each tensor is compared that the runs have in several."""
    seen: dict[str, set[str]] = {}
    for step in (step for both in pair.both for step in both):
        if step.checkpoint is not None:
            for name, whole in step.checkpoint.tensors.items():
                seen.setdefault(name, set()).add(whole.dtype)
    common = {name: common_dtype(kinds) for name, kinds in seen.items() if len(kinds) > 1}
    return {name: dtype for name, dtype in common.items() if dtype is not None}


def _casts(source: Checkpoint | None, twin: Checkpoint | None) -> tuple[tuple[str, str], ...]:
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
    )


def _kind(source: Fingerprint | None, twin: Fingerprint | None) -> TensorDifferenceKind | None:
    if source is None or twin is None:
        return "only in twin" if source is None else "only in source"
    if source.shape != twin.shape:
        return "shape"
    if source.dtype != twin.dtype:
        return "dtype"
    return None if source.hash == twin.hash else "values"


def _differing_settings(source: Step, twin: Step) -> list[str]:
    keys = sorted({*source.meaning, *twin.meaning} - {"dtype"})
    return [key for key in keys if source.meaning.get(key) != twin.meaning.get(key)]


def _with_origins(one: _Compared, known: Mapping[Side, _Hashes]) -> StepRow:
    """The row with the steps at which the other run has the weights that differ here."""
    sides: tuple[tuple[Side, Side, str], ...] = (
        ("source", "twin", one.source),
        ("twin", "source", one.twin),
    )
    origins = []
    for side, other, label in sides:
        here, counts = known[side].steps[label], Counter[str]()
        for difference in one.row.differences:
            if difference.name in here:
                counts.update(known[other].having(difference.name, here[difference.name]))
        origins += [Origin(other, step, count) for step, count in counts.most_common(1)]
    return replace(one.row, origins=tuple(sorted(origins, key=lambda origin: -origin.tensors)))


def _lonely(side: Side, place: StepLocation) -> StepRow:
    if side == "source":
        return StepRow(place.number, place.label, "no counterpart", "twin", source=place.path)
    return StepRow(place.number, place.label, "no counterpart", "source", twin=place.path)
