"""Writes a target atomically: into a folder next to it, which is flushed and then renamed."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator

from neox_bridge.errors import (
    BridgeError,
    DiskFull,
    Refused,
    TargetUnusable,
    Unreachable,
    Unverified,
)
from neox_bridge.execution.flushing import flush
from neox_bridge.execution.install import LATEST, clear, is_begun, settle
from neox_bridge.execution.journal import finished
from neox_bridge.execution.work import Work, locked, remove, work_of
from neox_bridge.findings import Finding
from neox_bridge.layouts.known_files import foreign
from neox_bridge.layouts.record_file import recorded_files
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.stores.fetched import kept_bytes
from neox_bridge.wording import plural, some

_FULL = {errno.ENOSPC: "No space left", errno.EDQUOT: "The quota is exceeded"}
_MAKE_ROOM = "Free some space, or choose another target."


def check_target(
    target: str, sources: Iterable[str], step: str | None, *, in_place: bool = False
) -> None:
    """Raise BridgeError, before anything is written, if the target cannot be created.

    Args:
        sources: Files that are read.
        step: As in ``replaced_by``.
        in_place: Whether the target contains the sources and is replaced by the finished files.
    """
    real = os.path.realpath(target)
    replaced = replaced_by(real, step)
    for source in () if in_place else sources:
        # both a link and the file it points to, because a Hugging Face cache is a folder of links
        link = os.path.join(os.path.realpath(os.path.dirname(source)), os.path.basename(source))
        if any(_holds(replaced, path) for path in (link, os.path.realpath(source))):
            raise contains_source(target, source)
    if os.path.lexists(real):
        if not os.path.isdir(real):
            raise target_is_file(target)
        if os.path.ismount(real) and replaced == real:
            raise TargetUnusable(
                f"{target} is a mount point, which cannot be replaced. Choose a folder inside it."
            )
    parent = _nearest(os.path.dirname(real))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BridgeError(f"{parent} is not writable. Choose another target, or ask for access.")


def contains_source(target: str, source: str) -> TargetUnusable:
    """The error if a target would replace a file that is read."""
    return TargetUnusable(
        f"{target} contains the source {source}, which would be overwritten while it is read. "
        "Choose another target."
    )


def target_is_file(target: str) -> TargetUnusable:
    """The error if a target is a file."""
    return TargetUnusable(f"{target} is a file. Choose a folder that does not exist yet.")


def check_free(target: str, step: str | None) -> None:
    """Raise BridgeError if the target exists. step: as in ``replaced_by``."""
    real = os.path.realpath(target)
    replaced = replaced_by(real, step)
    if replaced != real and os.path.lexists(replaced):
        raise _exists(replaced)
    if replaced == real and os.path.isdir(real) and list_folder(real):
        raise _exists(target)


def check_replaceable(target: str, step: str | None, planned: Collection[str]) -> None:
    """Raise Refused if a folder would be deleted that contains more than a checkpoint.

    Args:
        planned: The paths of the new files, which replace others of the same name.
        step: As in ``replaced_by``.
    """
    real = os.path.realpath(target)
    replaced = replaced_by(real, step)
    if not os.path.isdir(replaced):
        return
    if replaced != real:
        planned = {path[len(f"{step}/") :] for path in planned if path.startswith(f"{step}/")}
    names = list(foreign(replaced, {*planned, *recorded_files(replaced)}))
    if names:
        raise holds_others(target if replaced == real else replaced, names)


def holds_others(target: str, names: list[str]) -> Refused:
    """The error if --overwrite would delete files that are not part of a checkpoint."""
    return Refused(
        f"{target} contains files that are not part of a checkpoint, and `overwrite=True` would "
        f"delete them: {some(names, 5)}. Nothing was deleted. Move them away, or choose another "
        "target."
    )


def check_room(target: str, size: int, shared: Callable[[], int]) -> None:
    """Raise DiskFull if the disk does not have enough free space.

    shared: called only in this case. Returns how many of these bytes need no space, because they
    share blocks with a source.
    """
    parent = _nearest(os.path.dirname(os.path.realpath(target)))
    free = shutil.disk_usage(parent).free
    if free < size and free < (size := size - shared()):
        raise DiskFull(
            f"No space left for {target}: {size:,} bytes are needed and {free:,} are free in "
            f"{parent}.",
            _MAKE_ROOM,
            size,
        )


def is_run(folder: str) -> bool:
    """Whether a folder is the root of a GPT-NeoX run, to which a step can be added."""
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
        return any(name in LATEST or name.startswith("global_step") for name in names)
    return False


@contextlib.contextmanager
def staged(target: str, size: int) -> Iterator[Work]:
    """A locked work folder next to the target. The block writes and installs the files.

    After an interrupt, a disk error or an unreachable store, the finished files are kept for the
    next run. After any other error, nothing is kept. Errors of the file system become a
    BridgeError. size: total bytes, for the message. Raises BridgeError if another process is
    writing the same target.
    """
    real = os.path.realpath(target)
    work = work_of(real)
    new_folders: list[str] = []
    try:
        _make(os.path.dirname(real), new_folders)
        with locked(work, target):
            try:
                yield work
                for path in new_folders:
                    flush(os.path.dirname(path))
            except Unverified as error:
                aside = set_aside(work.files, real, "unverified")
                remove(work)
                raise Unverified(
                    f"{error} The result is kept as {aside}, and {target} is unchanged."
                ) from None
            except (Unreachable, Refused) as error:
                raise type(error)(f"{error} {_keep(work)}".rstrip()) from None
            except (KeyboardInterrupt, OSError) as error:
                kept = _keep(work)
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(kept) from None
                if isinstance(error, BrokenPipeError):
                    raise
                raise _explained(error, target, size, kept) from error
            except BaseException:
                if not is_begun(work):
                    remove(work)
                raise
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise _explained(error, target, size, "") from error
    finally:
        for path in reversed(new_folders):  # folders that are still empty
            with contextlib.suppress(OSError):
                os.rmdir(path)


def sweep(target: str) -> Finding | None:
    """Clean up after a run that was killed while it moved its files into place.

    Returns a finding if something cannot be deleted.
    """
    real = os.path.realpath(target)
    work = work_of(real)
    if os.path.isdir(work.folder) and (is_begun(work) or not os.path.isdir(work.files)):
        # suppressed: another process is already cleaning up
        with contextlib.suppress(BridgeError), locked(work, target):
            try:
                settle(work, real)
            except OSError as error:
                return left_over(work.folder, str(error.strerror or error))
            if reason := clear(work):
                return left_over(work.folder, reason)
    return None


def left_over(folder: str, reason: str) -> Finding:
    """The finding for replaced files that cannot be deleted."""
    return Finding(
        "left-over",
        "warning",
        f"the target is complete, but the old version could not be deleted from {folder}: {reason}",
        "delete that folder, or run into the same target again, which tries to delete it",
    )


def _explained(error: OSError, target: str, size: int, kept: str) -> BridgeError:
    kept = kept or "The partial output was deleted."
    if error.errno in _FULL:
        return DiskFull(
            f"{_FULL[error.errno]} while writing {target}: {size:,} bytes are needed in total.",
            f"{_MAKE_ROOM} {kept}",
            size,
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return BridgeError(f"{_exists(target)} {kept}")
    return BridgeError(
        f"{target} cannot be written: {error.strerror or error}. Check the disk and the "
        f"permissions, or choose another target. {kept}"
    )


def _keep(work: Work) -> str:
    """The note about finished files. Deletes the work folder if there are none."""
    count, fetched = finished(work), kept_bytes(work.folder)
    if not count and not fetched and not is_begun(work):
        remove(work)
    if fetched and not count:
        return (
            f"{fetched:,} downloaded bytes are kept in {work.folder}. Run the same command again "
            "to continue."
        )
    return kept_files(work.folder, count) if count else ""


def kept_files(where: str, count: int) -> str:
    """The note about the files that an earlier run finished."""
    files = f"{plural(count, 'finished file')} {'is' if count == 1 else 'are'}"
    return (
        f"{files} kept in {where}. Run the same command again to continue, or delete that folder "
        "to start over."
    )


def _exists(target: str) -> BridgeError:
    return BridgeError(
        f"{target} exists and is not empty. Choose another target, or use `overwrite=True` to "
        "replace it."
    )


def set_aside(folder: str, target: str, word: str) -> str:
    """Rename a folder to ``target.word``, or to the next free name."""
    aside, number = f"{target}.{word}", 1
    while os.path.lexists(aside):
        number += 1
        aside = f"{target}.{word}-{number}"
    os.rename(folder, aside)
    return aside


def replaced_by(real: str, step: str | None) -> str:
    """The folder that the new files replace: the target, or one step of an existing run.

    step: a folder among the files that is added to the target if that is an existing run, before
        its ``latest`` is replaced.
    """
    return os.path.join(real, step) if step is not None and is_run(real) else real


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _nearest(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    while not os.path.isdir(path):
        if os.path.lexists(path):
            raise BridgeError(f"{path} is a file, but must be a folder.")
        path = os.path.dirname(path)
    return path


def _make(path: str, new_folders: list[str]) -> None:
    """Create the missing folders, from the top, and add each to ``new_folders``."""
    lacking = []
    while not os.path.isdir(path):
        lacking.append(path)
        path = os.path.dirname(path)
    for folder in reversed(lacking):
        with contextlib.suppress(FileExistsError):  # created by another process in the meantime
            os.mkdir(folder)
            new_folders.append(folder)
