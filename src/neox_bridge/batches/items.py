"""Finds the checkpoints of a batch: steps of runs in folders, or revisions of a model."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from neox_bridge.batches.on_hub import HubModel, work_place
from neox_bridge.conversion import open_checkpoint
from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.option_checks import check_options, check_outside
from neox_bridge.planning.options import Options
from neox_bridge.tensors.fused import GqaOrder
from neox_bridge.verification.runs import StepLocation, TrainingRun, known_runs
from neox_bridge.verification.step_choice import check_ranges, check_steps, with_steps
from neox_bridge.wording import some


@dataclass(frozen=True, slots=True)
class Source:
    """How to open a checkpoint, in any process. path: a folder, or its URL."""

    path: str
    configs: tuple[str, ...] = ()
    gqa_order: GqaOrder | None = None
    masters: bool = False

    def open(self) -> Checkpoint:
        """Raises BridgeError or Refused."""
        return open_checkpoint(
            self.path, configs=self.configs, gqa_order=self.gqa_order, masters=self.masters
        )


@dataclass(frozen=True, slots=True)
class Item:
    """One checkpoint to convert. name: its folder below the batch's target, ``step1000``."""

    name: str
    run: str
    number: int | None
    source: Source


def find_items(
    sources: Iterable[str],
    steps: str = "all",
    *,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
    masters: bool = False,
) -> tuple[list[Item], list[Finding]]:
    """The chosen checkpoints by run and step, and findings about the folders.

    steps: see ``step_choice.chosen``. Names are ``stepN``, below the name of their run if there are
    several runs. Raises BridgeError if there are none, or two would get the same name.
    """
    check_steps(steps)
    runs, faults = known_runs(sources)
    items: list[Item] = []
    for run in runs:
        for place in with_steps(run, steps).places:
            source = Source(place.path, tuple(configs), gqa_order, masters)
            name = _name(run, place, len(runs) > 1)
            items.append(Item(name, run.name, place.number, source))
    check_ranges(steps, runs)
    if not items:
        raise UsageError(["steps"], f"{steps} matches no step")
    if twice := [name for name, count in Counter(i.name for i in items).items() if count > 1]:
        raise BridgeError(
            f"{some(twice)}: several checkpoints would get this name in the target. Convert each "
            "run into its own folder."
        )
    return items, list(faults)


def check_places(sources: Iterable[str], target: str, hub: HubModel | None) -> None:
    """Raise UsageError if a batch would write inside one of its sources."""
    if hub is None:
        check_outside(sources, target)
    else:
        check_outside(sources, work_place(hub, "main").folder, "work")


def check_first(items: Iterable[Item], options: Options, given: Collection[str] = ()) -> None:
    """Raise UsageError if options do not apply to the first checkpoint of a run.

    Other errors are reported in its row. given: see ``check_options``.
    """
    for item in {item.run: item for item in reversed(list(items))}.values():
        try:
            check_options(item.source.open(), options, given)
        except UsageError:  # noqa: PERF203
            raise
        except (BridgeError, OSError):
            continue


def _name(run: TrainingRun, place: StepLocation, several: bool) -> str:
    label = f"step{place.number}" if place.number is not None else place.label
    return os.path.join(os.path.basename(os.path.abspath(run.name)), label) if several else label
