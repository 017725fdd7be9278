"""Finds the checkpoints of a run, or of a suite of runs, below a folder."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.layouts.file_names import HF_WEIGHTS, STEP
from neox_bridge.layouts.near_names import check_not_local, not_local_either, suggestions
from neox_bridge.layouts.text_files import read_text
from neox_bridge.stores.folder import HUB, is_hub
from neox_bridge.stores.paths import (
    absolute,
    afresh,
    exists,
    isdir,
    isfile,
    lexists,
    listdir,
    normal,
)
from neox_bridge.stores.step_names import NUMBERED, step_of
from neox_bridge.wording import natural, some

_MARKS = ("config.json", "adapter_config.json", "model_index.json", "modules.json", "latest")
_WEIGHTS = ("model_states.pt", ".safetensors")
_DEPTH = 4  # levels of folders to search; deeper ones are probably not a suite but a whole disk


@dataclass(frozen=True, slots=True)
class Fault(Finding):
    """A finding of an audit, with its run, steps and tensors (Hugging Face names).

    Attributes:
        run: "" if it concerns several runs or none.
        steps: The labels of the steps.
    """

    run: str = ""
    steps: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepLocation:
    """One checkpoint. number: its step, or None if unknown."""

    path: str
    label: str
    number: int | None = None


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The checkpoints of one training run, by step. name: its folder, for display."""

    name: str
    places: tuple[StepLocation, ...]


def known_runs(paths: Iterable[str]) -> tuple[list[TrainingRun], list[Fault]]:
    """``find_runs``, but raises BridgeError with the faults if there is no run."""
    runs, faults = find_runs(paths)
    if not runs:
        reasons = "; ".join(f"{fault.message} ({fault.remedy})" for fault in faults)
        raise BridgeError(reasons or "No sources.")
    return runs, faults


def find_runs(paths: Iterable[str]) -> tuple[list[TrainingRun], list[Fault]]:
    """Every run in these places, and findings about the places.

    ``org/name`` is a Hub model if no such folder exists. Its branches and tags ``stepN`` are the
    steps of the run. A folder may be a GPT-NeoX root with many ``global_stepN``, one that holds
    folders ``stepN`` or ``checkpoint-N``, a model in Hugging Face's cache with a revision for each
    step, a single checkpoint, or a parent of several of those. Links that point to the same folder
    count once. Never raises because of the content of a folder; raises BridgeError if the Hub does
    not answer.
    """
    by_run: dict[str, dict[str, StepLocation]] = {}
    faults: list[Fault] = []
    for path in paths:
        if (model := model_on_hub(path)) is not None:
            if not is_hub(path):
                check_not_local(path)
            try:
                run, places = _hub_places(*model)
            except BridgeError as error:
                if is_hub(path):
                    raise
                raise not_local_either(error, path) from None
            by_run.setdefault(run, {}).update({place.path: place for place in places})
            continue
        any_found = False
        for run, place in _explore(normal(afresh(path)), faults, 0):
            by_run.setdefault(run, {}).setdefault(absolute(place.path), place)
            any_found = True
        if not any_found and not any(fault.run == normal(path) for fault in faults):
            remedy = "give the folder of a run, or a folder that contains runs"
            message = f"{path} contains no checkpoint"
            faults.append(Fault("no-checkpoint", "error", message, remedy, normal(path)))
    runs = [
        TrainingRun(name, tuple(sorted(places.values(), key=_order)))
        for name, places in by_run.items()
    ]
    return sorted(runs, key=lambda run: natural(run.name)), faults


def model_on_hub(path: str) -> tuple[str, str] | None:
    """``org/name`` and the revision, "" for all, of a model of the Hub; None for other places."""
    from neox_bridge.stores.hub_names import model_id

    if not is_hub(path) and (path.startswith((".", "/", "~")) or exists(path)):
        return None
    return model_id(unquote(path.removeprefix(HUB).rstrip("/")))


def _hub_places(repo: str, revision: str) -> tuple[str, tuple[StepLocation, ...]]:
    """The run's name and its steps (``main`` if it has none), as URLs that are read in ranges."""
    from neox_bridge.layouts.hub_download import cached_repo
    from neox_bridge.layouts.hub_source import is_offline
    from neox_bridge.stores.hub_names import MAIN
    from neox_bridge.stores.hub_revisions import revisions

    def place(name: str, number: int | None) -> StepLocation:
        label = name if number is None else str(number)
        return StepLocation(f"hf://{repo}@{quote(name, safe='')}", label, number)

    if revision:
        return repo, (place(revision, step_of(revision)),)
    if is_offline():
        return repo, tuple(one for _, one in _revisions(cached_repo(repo), []))
    known = revisions(repo)
    steps = {one.step: one for one in reversed(known) if one.step is not None}  # branch, or tag
    named = [steps[number] for number in sorted(steps)]
    named = named or [one for one in known if one.name == MAIN]
    return repo, tuple(place(one.name, one.step) for one in named)


def _order(place: StepLocation) -> tuple[int, str]:
    return (-1 if place.number is None else place.number), place.path


def _explore(path: str, faults: list[Fault], depth: int) -> Iterator[tuple[str, StepLocation]]:
    try:
        names = sorted(listdir(path))
        folders = [n for n in names if n[0] != "." and isdir(os.path.join(path, n))]
    except OSError as error:
        faults.append(_unreadable(path, error))
        return
    own_number = NUMBERED.fullmatch(os.path.basename(absolute(path)))
    steps = [name for name in folders if STEP.fullmatch(name)]
    if STEP.fullmatch(os.path.basename(absolute(path))):
        yield _single(path, own_number)
    elif steps:
        faults += _check_latest(path, steps)
        if own_number and len(steps) == 1:  # a step that was converted to a separate root
            yield _single(path, own_number)
            return
        for name in steps:
            yield path, StepLocation(os.path.join(path, name), name[11:], int(name[11:]))
    elif "refs" in folders and "snapshots" in folders:
        yield from _revisions(path, faults)
    elif numbered := [(name, m) for name in folders if (m := NUMBERED.fullmatch(name))]:
        if "config.json" in names:
            faults.append(_left_out(path, "the final model beside its steps"))
        yield from (_single(os.path.join(path, name), match) for name, match in numbered)
        others = [name for name in folders if not NUMBERED.fullmatch(name)]
        yield from _below(path, others, faults, depth)
    elif any(map(_is_of_checkpoint, names)):
        yield _single(path, own_number)
    else:
        yield from _below(path, folders, faults, depth)


def _is_of_checkpoint(name: str) -> bool:
    """Whether a file of this name makes its folder a checkpoint."""
    return name in _MARKS or name.endswith(_WEIGHTS) or HF_WEIGHTS.fullmatch(name) is not None


def _below(
    path: str, folders: list[str], faults: list[Fault], depth: int
) -> Iterator[tuple[str, StepLocation]]:
    """The runs in the folders. Folders without runs are reported if others have some."""
    before, empty = len(faults), []
    entered = folders if depth < _DEPTH else []
    for name in entered:
        inside = list(_explore(os.path.join(path, name), faults, depth + 1))
        yield from inside
        if not inside:
            empty.append(name)
    if 0 < len(empty) < len(entered) and len(faults) == before:
        faults.append(_left_out(path, some(empty)))


def _left_out(path: str, what: str) -> Fault:
    return Fault(
        "left-out", "info", f"{path}: skipped, not a checkpoint of a run: {what}", run=path
    )


def _single(path: str, match: "re.Match[str] | None") -> tuple[str, StepLocation]:
    """A checkpoint; one in a numbered folder is a step of the run above it."""
    if match is None:
        return path, StepLocation(path, os.path.basename(absolute(path)))
    parent = os.path.dirname(path) or "."
    run = os.path.join(parent, match["run"]) if match["run"] else parent
    return run, StepLocation(path, str(int(match["number"])), int(match["number"]))


def _check_latest(path: str, steps: list[str]) -> list[Fault]:
    latest = os.path.join(path, "latest")
    if not lexists(latest):
        return []  # a root may hold copies of some steps
    try:
        tag = read_text(latest).strip()
    except (BridgeError, OSError) as error:
        return [_unreadable(latest, error)]
    if tag in steps:
        return []
    message = f"{latest} names {tag!r}, and there is no such folder"
    newest = max(steps, key=lambda name: int(name[11:]))
    remedy = f"write the newest complete step into it: {newest}"
    return [Fault("latest-missing", "error", message, remedy, path)]


def _revisions(path: str, faults: list[Fault]) -> Iterator[tuple[str, StepLocation]]:
    """A model in Hugging Face's cache: ``refs/step1000`` holds the name of a snapshot."""
    refs = os.path.join(path, "refs")
    try:
        names = sorted(listdir(refs))
    except OSError as error:
        faults.append(_unreadable(refs, error))
        return
    numbered = any(NUMBERED.fullmatch(name) for name in names)
    for name in names:
        match = NUMBERED.fullmatch(name)
        if not isfile(file := os.path.join(refs, name)) or (numbered and match is None):
            continue  # `main` is one of the steps
        try:
            commit = os.path.basename(read_text(file).strip())
        except (BridgeError, OSError) as error:
            faults.append(_unreadable(file, error))
            continue
        number = int(match["number"]) if match else None
        label = str(number) if match else name
        yield path, StepLocation(os.path.join(path, "snapshots", commit), label, number)


def _unreadable(path: str, error: Exception) -> Fault:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    message = why if path in why else f"{path} cannot be read: {why}"
    remedy = suggestions(path) if isinstance(error, FileNotFoundError) else ""
    return Fault(
        "unreadable", "error", message, remedy or "check the path and its permissions", path
    )
