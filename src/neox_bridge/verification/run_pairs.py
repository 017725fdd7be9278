"""Pairs the steps of two runs, and opens them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neox_bridge.errors import UsageError
from neox_bridge.frameworks.suites import twin_of
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.verification.opened import Opened, open_places, read_in_one_way
from neox_bridge.verification.runs import StepLocation, TrainingRun
from neox_bridge.wording import some

Side = Literal["source", "twin"]
SIDES: tuple[Side, Side] = ("source", "twin")


@dataclass(frozen=True)
class OpenedPair:
    """The steps of two runs.

    Attributes:
        source: The name of the run that is audited.
        twin: The name of the run that it is compared with.
        both: The steps that both have, opened, source first.
        alone: The others, not opened, with the side that has them.
        configs: As of ``open_pair``.
    """

    source: str
    twin: str
    both: tuple[tuple[Opened, Opened], ...] = ()
    alone: tuple[tuple[Side, StepLocation], ...] = ()
    configs: tuple[str, ...] = ()

    @property
    def by_names(self) -> bool:
        """Whether steps of Hugging Face are read by the names in their files."""
        opened = [step.checkpoint for pair in self.both for step in pair]
        return any(isinstance(checkpoint, StoredModel) for checkpoint in opened)

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(step.size for pair in self.both for step in pair)

    def name(self, side: Side) -> str:
        return self.source if side == "source" else self.twin


def pair_runs(
    sources: Sequence[TrainingRun], twins: Sequence[TrainingRun]
) -> list[tuple[TrainingRun, TrainingRun]]:
    """Pair the runs: the only two, or those with equal names.

    A published suite is also paired with its twin in ``frameworks.suites``. Raises UsageError if a
    run has no partner.
    """
    if len(sources) == len(twins) == 1:
        return [(sources[0], twins[0])]
    by_name = {_base(run.name): run for run in twins}
    pairs = []
    for run in sources:
        twin = by_name.get(_base(run.name)) or by_name.get(_base(twin_of(run.name) or ""))
        if twin is None:
            raise UsageError(
                ["against"],
                f"it contains {some(sorted(by_name))}, but no counterpart of the run {run.name}",
                "Audit one run at a time, and give its counterpart.",
            )
        pairs.append((run, twin))
    return pairs


def open_pair(source: TrainingRun, twin: TrainingRun, configs: Sequence[str] = ()) -> OpenedPair:
    """Open the steps that both runs have; reads headers only.

    Steps that only one run has are not opened, unless their number is known only from their files.
    A single checkpoint of an unknown step is paired with the single one of the other run. If a
    checkpoint cannot be opened, ``Opened.fault`` says why.
    """
    here, there = _opened(source, twin, configs), _opened(twin, source, configs)
    read = read_in_one_way([*here, *there])  # also if only one run is of a known family
    source_steps = {step.number: step for step in read[: len(here)]}
    twin_steps = {step.number: step for step in read[len(here) :]}
    both = [
        (step, twin_steps[number]) for number, step in source_steps.items() if number in twin_steps
    ]
    if len(source.places) == len(twin.places) == 1 and None in {*source_steps, *twin_steps}:
        both = list(zip(source_steps.values(), twin_steps.values(), strict=True))
    paired = {step.place.path for pair in both for step in pair}
    alone = [
        (side, place)
        for side, run in zip(SIDES, (source, twin), strict=True)
        for place in run.places
        if place.path not in paired
    ]
    return OpenedPair(source.name, twin.name, tuple(both), tuple(alone), tuple(configs))


def _opened(run: TrainingRun, other: TrainingRun, configs: Sequence[str]) -> list[Opened]:
    """The steps of a run that the other run can have."""
    numbers = {place.number for place in other.places}
    places = [
        place
        for place in run.places
        if place.number is None or place.number in numbers or None in numbers
    ]
    return open_places([TrainingRun(run.name, tuple(places))], configs)


def _base(name: str) -> str:
    return os.path.basename(name.rstrip("/"))
