"""Finished files get their place: by one rename, or by a few that the next run completes.

From before the first rename until nothing is left over, ``moves`` in the work folder says what
belongs where. A run that finds it completes the moves and removes what the new files replaced.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from neox_bridge.execution.exchange import swap
from neox_bridge.execution.flushing import flush
from neox_bridge.execution.work import Work
from neox_bridge.findings import Finding

LATEST = ("latest", "latest_universal")  # of a run: which of its steps is the newest
_STEP = re.compile(r"global_step\d+(_universal)?")


@dataclass(frozen=True, slots=True)
class Moves:
    """What belongs where.

    step: the folder that is added to a run; None where the files become the target itself.
    replace: whether a folder that is there makes room.
    folder: device and inode of the folder that is moved, which tell it from the one that it
        changed places with.
    beside: what is put beside the step, in the run's root.
    retired: what of the run's root makes room, or has no place there any more.
    """

    step: str | None
    replace: bool
    folder: tuple[int, int]
    beside: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()


@dataclass(frozen=True)
class RootFiles:
    """What becomes of the files and folders beside a step.

    step: the plan's. names: the names that the plan's files and folders get; those that are missing
    here aren't put there. retired: those of the run that go.
    """

    step: str
    names: Mapping[str, str] = field(default_factory=dict)
    retired: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def install(work: Work, target: str, beside: RootFiles | None, *, replace: bool) -> None:
    """Give the finished files their names. target: a real path. beside: where it is a run already.

    replace: whether a folder that is there makes room. A start-up yml is absent from the root while
    ``latest`` and the step change, so that it never contradicts them. Where the folder can't be
    moved all is as it was before.
    """
    step = beside.step if beside else None
    names = tuple(beside.names.values()) if beside else ()
    folder = _identity(_source(work, step))
    moves = Moves(step, replace, folder, names, beside.retired if beside else ())
    _write(work, moves)
    _complete_or_undo(work, target, moves)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(work.journal)
    flush(os.path.dirname(target))


def is_begun(work: Work) -> bool:
    """Whether files are on their way to their places, or what they replaced is being removed."""
    return os.path.lexists(work.moves)


def settle(work: Work, target: str) -> bool:
    """Complete what a killed run had begun to install, and remove what it replaced.

    Returns whether something was still to be moved. Raises OSError where that fails.
    """
    moves = _read(work)
    if moves is None:
        return False
    moved = _complete_or_undo(work, target, moves)
    flush(os.path.dirname(target))
    _remove_left(work)
    return moved


def clear(work: Work) -> str:
    """Remove a work folder whose files have their places; why that failed, or nothing."""
    try:
        _remove_left(work)
        shutil.rmtree(work.folder)
    except FileNotFoundError:  # another run into the same target was waiting for the lock
        return ""
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _remove_left(work: Work) -> None:
    """Remove what was replaced, and then what the next run must know until there."""
    for folder in (work.files, f"{work.files}.old", work.retired):
        if os.path.lexists(folder):
            shutil.rmtree(folder)
    for file in (work.journal, work.moves):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def _source(work: Work, step: str | None) -> str:
    """The folder that is moved."""
    return os.path.join(work.files, step) if step else work.files


def _complete_or_undo(work: Work, target: str, moves: Moves) -> bool:
    try:
        return _complete(work, target, moves)
    except BaseException:
        if _is_moved(_source(work, moves.step), moves.folder):
            _undo(work, target, moves)
        raise


def _complete(work: Work, target: str, moves: Moves) -> bool:
    """Whatever of the moves isn't done yet, in an order in which the root never contradicts."""
    if moves.step is None:
        return _move(work.files, target, moves)
    source, place = _source(work, moves.step), os.path.join(target, moves.step)
    moved = False
    if _is_moved(source, moves.folder):
        for name in sorted(moves.retired, key=lambda name: not name.endswith(".yml")):
            moved = _retire(work, target, name) or moved
        if moved:
            flush(target)
        moved = _move(source, place, moves) or moved
    last = [name for name in moves.beside if _starts(name)]
    moved = _put(work, target, [name for name in moves.beside if name not in last]) or moved
    flush(target)
    for name in LATEST:
        if os.path.lexists(os.path.join(work.files, name)):
            os.replace(os.path.join(work.files, name), os.path.join(target, name))
            moved = True
    flush(target)
    if _put(work, target, last):
        moved = True
        flush(target)
    return moved


def _starts(name: str) -> bool:
    """Whether it is a yml that a run is started with, and none that stands beside an edited one."""
    return name.endswith(".yml") and ".new" not in name


def _retire(work: Work, target: str, name: str) -> bool:
    old, aside = os.path.join(target, name), os.path.join(work.retired, name)
    if not os.path.lexists(old) or os.path.lexists(aside):
        return False
    os.makedirs(work.retired, exist_ok=True)
    os.rename(old, aside)
    return True


def _put(work: Work, target: str, names: list[str]) -> bool:
    """Names that are free are taken; what somebody put there meanwhile stays."""
    moved = False
    for name in names:
        new, place = os.path.join(work.files, name), os.path.join(target, name)
        if os.path.lexists(new) and not os.path.lexists(place):
            os.rename(new, place)
            moved = True
    return moved


def _move(source: str, place: str, moves: Moves) -> bool:
    between = os.path.lexists(f"{source}.old") and not os.path.lexists(place)
    if not os.path.lexists(source) or not (between or _is_moved(source, moves.folder)):
        return False
    if moves.replace and os.path.isdir(place) and os.listdir(place):
        swap(source, place)
    else:
        os.rename(source, place)  # fails where something has appeared meanwhile
    return True


def _undo(work: Work, target: str, moves: Moves) -> None:
    for name in moves.retired:
        aside, old = os.path.join(work.retired, name), os.path.join(target, name)
        if os.path.lexists(aside) and not os.path.lexists(old):
            os.rename(aside, old)
    shutil.rmtree(work.retired, ignore_errors=True)
    os.unlink(work.moves)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _is_moved(path: str, folder: tuple[int, int]) -> bool:
    """Whether the folder that is to be moved is still here."""
    with contextlib.suppress(FileNotFoundError):
        return _identity(path) == folder
    return False


def _write(work: Work, moves: Moves) -> None:
    fresh = f"{work.moves}.new"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(asdict(moves), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, work.moves)
    flush(work.folder)


def _read(work: Work) -> Moves | None:
    """What ``_write`` wrote; names that lead elsewhere don't count."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        with open(work.moves, encoding="utf-8") as file:
            entry: dict[str, Any] = json.load(file)
        beside, retired = tuple(map(str, entry["beside"])), tuple(map(str, entry["retired"]))
        step = entry["step"]
        names = (*beside, *retired)
        fits = step is None or _STEP.fullmatch(step)
        if fits and all(os.path.basename(name) == name not in ("", ".", "..") for name in names):
            device, inode = map(int, entry["folder"])
            return Moves(step, bool(entry["replace"]), (device, inode), beside, retired)
    return None
