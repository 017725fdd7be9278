"""Moves finished files into place, by one rename or by a few that the next run can complete.

From before the first rename until everything is cleaned up, ``moves`` in the work folder records
where files belong. A run that finds it completes the moves and deletes the replaced files.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from neox_bridge.execution.exchange import swap
from neox_bridge.execution.flushing import flush
from neox_bridge.execution.work import Work
from neox_bridge.findings import Finding
from neox_bridge.layouts.record_file import STEP_FOLDER

LATEST = ("latest", "latest_universal")  # the file in a run's root that names its newest step


@dataclass(frozen=True, slots=True)
class Moves:
    """Which files move where.

    Attributes:
        step: The folder that is added to a run; None if the files become the target itself.
        replace: Whether an existing folder is replaced.
        folder: Device and inode of the folder that is moved, to distinguish it from the folder
            that it replaces.
        beside: Files that are written into the root of the run, next to the step.
        retired: Files in the root of the run that are replaced or obsolete.
    """

    step: str | None
    replace: bool
    folder: tuple[int, int]
    beside: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()


@dataclass(frozen=True)
class RootFiles:
    """The files and folders in the root of a run: which are written, and which are removed.

    Attributes:
        step: The step of the plan.
        names: The names that files and folders of the plan get; files without a name are not
            written.
        retired: Files of the run that are removed.
    """

    step: str
    names: Mapping[str, str] = field(default_factory=dict)
    retired: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def install(work: Work, target: str, beside: RootFiles | None, *, replace: bool) -> None:
    """Move finished files into place. target: a real path. beside: set for an existing run.

    replace: whether an existing folder is replaced. While ``latest`` and the step change, the root
    has no start-up yml, so that it never contradicts them. If the folder cannot be moved,
    everything is restored.
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
    """Whether a move into place has begun and is not cleaned up."""
    return os.path.lexists(work.moves)


def settle(work: Work, target: str) -> bool:
    """Complete the moves of a killed run, and delete the replaced files.

    Returns whether anything was left to move. Raises OSError on failure.
    """
    moves = _read(work)
    if moves is None:
        return False
    moved = _complete_or_undo(work, target, moves)
    flush(os.path.dirname(target))
    _remove_left(work)
    return moved


def clear(work: Work) -> str:
    """Delete a work folder after its files were moved. Returns why that failed, or ""."""
    try:
        _remove_left(work)
        shutil.rmtree(work.folder)
    except FileNotFoundError:  # another run into the same target waits for the lock
        return ""
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _remove_left(work: Work) -> None:
    """Delete the replaced files first, then the record that the next run would need."""
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
    """Do the remaining moves, in an order in which the root is consistent at every moment."""
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
    """Whether a name is a start-up yml of a run, and not a copy written next to an edited one."""
    return name.endswith(".yml") and ".new" not in name


def _retire(work: Work, target: str, name: str) -> bool:
    old, aside = os.path.join(target, name), os.path.join(work.retired, name)
    if not os.path.lexists(old) or os.path.lexists(aside):
        return False
    os.makedirs(work.retired, exist_ok=True)
    os.rename(old, aside)
    return True


def _put(work: Work, target: str, names: list[str]) -> bool:
    """Move files to free names. Files that appeared there in the meantime are kept."""
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
        os.rename(source, place)  # fails if a file has appeared there in the meantime
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
    """Whether the folder to move is still at ``path``."""
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
    """Read what ``_write`` wrote, ignoring names that lead outside."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        with open(work.moves, encoding="utf-8") as file:
            entry: dict[str, Any] = json.load(file)
        beside, retired = tuple(map(str, entry["beside"])), tuple(map(str, entry["retired"]))
        step = entry["step"]
        names = (*beside, *retired)
        fits = step is None or STEP_FOLDER.fullmatch(step)
        if fits and all(os.path.basename(name) == name not in ("", ".", "..") for name in names):
            device, inode = map(int, entry["folder"])
            return Moves(step, bool(entry["replace"]), (device, inode), beside, retired)
    return None
