"""Opens the checkpoints of runs, and continues if one cannot be read."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.open_stored import open_any, stored_model_of
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.stores.paths import is_local
from neox_bridge.verification.runs import Fault, StepLocation, TrainingRun

_OPENED_AT_ONCE = 4  # places in a store that are opened at a time


@dataclass(frozen=True, slots=True)
class Opened:
    """A place of a run, with its checkpoint or the reason why it cannot be opened.

    The checkpoint is read by its family, or by the names in its files.

    Attributes:
        family: The checkpoint as its family reads it, if it is read by names because another step
            of the run must be. Its settings and dtypes can be checked.
    """

    run: str
    place: StepLocation
    checkpoint: Checkpoint | StoredModel | None
    fault: Fault | None = None
    family: Checkpoint | None = None

    @property
    def number(self) -> int | None:
        """The step: from the name of the place, or else from the files of the checkpoint."""
        if self.place.number is not None or self.checkpoint is None:
            return self.place.number
        state = self.checkpoint.neox
        return None if state is None else state.iteration

    @property
    def size(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.size

    @property
    def states(self) -> int:
        """Bytes of the optimizer states, if they are those of Adam with masters."""
        if self.checkpoint is None or not self.checkpoint.has_optimizer:
            return 0
        return 12 * sum(prod(whole.shape) for whole in self.checkpoint.tensors.values())


def open_places(runs: Iterable[TrainingRun], configs: Sequence[str] = ()) -> list[Opened]:
    """Open every checkpoint without reading weights. Continues if one cannot be opened.

    configs: yml files for GPT-NeoX checkpoints that contain none.
    """

    def one(run: str, place: StepLocation) -> Opened:
        try:
            return Opened(run, place, open_any(place.path, configs=configs))
        except (BridgeError, OSError) as error:
            return Opened(run, place, None, unreadable(run, place, error))

    places = [(run.name, place) for run in runs for place in run.places]
    if all(is_local(place.path) for _, place in places):
        opened = [one(*place) for place in places]
    else:
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:  # most of the time it waits for a network
            opened = list(pool.map(lambda place: one(*place), places))
    by_run: dict[str, list[Opened]] = {}
    for step in opened:
        by_run.setdefault(step.run, []).append(step)
    return [step for steps in by_run.values() for step in read_in_one_way(steps)]


def read_in_one_way(opened: Iterable[Opened]) -> list[Opened]:
    """The same steps, all read by the names in their files if one of them is of no known family.

    GPT-NeoX checkpoints keep their family, because their files contain parts of tensors.
    """
    steps = list(opened)
    if not any(isinstance(step.checkpoint, StoredModel) for step in steps):
        return steps
    return [read_by_names(step) for step in steps]


def read_by_names(opened: Opened) -> Opened:
    """The same step, read by the names in its files, unless it is a GPT-NeoX checkpoint."""
    checkpoint = opened.checkpoint
    if not isinstance(checkpoint, Checkpoint) or checkpoint.kind != "hf":
        return opened
    try:
        return replace(opened, checkpoint=stored_model_of(checkpoint), family=checkpoint)
    except (BridgeError, OSError) as error:
        return replace(opened, checkpoint=None, fault=unreadable(opened.run, opened.place, error))


def unreadable(run: str, place: StepLocation, error: BridgeError | OSError) -> Fault:
    """The finding for a checkpoint that cannot be read, with its path."""
    message = str(error)
    if isinstance(error, OSError):
        where = os.fsdecode(error.filename) if error.filename is not None else place.path
        message = f"{where} cannot be read: {error.strerror or error}"
    return Fault("unreadable", "error", message, "", run, (place.label,))
