"""A target that appears whole or not at all: made beside it, flushed, renamed."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator

from neox_bridge.errors import BridgeError, Unreachable, Unverified
from neox_bridge.execution.exchange import swap
from neox_bridge.execution.journal import finished
from neox_bridge.execution.work import Work, locked, remove, work_of

_FULL = {errno.ENOSPC: "No space left", errno.EDQUOT: "The quota is used up"}
LATEST = ("latest", "latest_universal")  # of a run: which of its steps is the newest


def check_target(target: str, sources: Iterable[str], step: str | None) -> None:
    """Raise BridgeError, before anything is written, where the target can't be made.

    sources: files that are read. step: as in ``staged``.
    """
    real = os.path.realpath(target)
    replaced = _replaced(real, step)
    for source in sources:
        # the link as well as the file: a Hugging Face cache is a folder of links
        link = os.path.join(os.path.realpath(os.path.dirname(source)), os.path.basename(source))
        if any(_holds(replaced, path) for path in (link, os.path.realpath(source))):
            raise BridgeError(
                f"{target} holds the source {source}, which would be replaced while it is read. "
                "Choose another target."
            )
    if os.path.lexists(real):
        if not os.path.isdir(real):
            raise BridgeError(f"{target} is a file. Name a folder that doesn't exist yet.")
        if os.path.ismount(real) and replaced == real:
            raise BridgeError(
                f"{target} is a mount point, which can't be replaced. Name a folder below it."
            )
    parent = _nearest(os.path.dirname(real))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BridgeError(f"{parent} can't be written to. Choose another place or ask for access.")


def check_free(target: str, step: str | None) -> None:
    """Raise BridgeError where the target is there already. step: as in ``staged``."""
    real = os.path.realpath(target)
    replaced = _replaced(real, step)
    if replaced != real and os.path.lexists(replaced):
        raise _exists(replaced)
    if replaced == real and os.path.isdir(real) and _listed(real):
        raise _exists(target)


def check_room(target: str, size: int, shared: Callable[[], int]) -> None:
    """Raise BridgeError where the disk hasn't so many bytes left.

    shared: asked only then: how many of them need no room, since they share blocks with a source.
    """
    parent = _nearest(os.path.dirname(os.path.realpath(target)))
    free = shutil.disk_usage(parent).free
    if free < size and free < (size := size - shared()):
        raise BridgeError(
            f"No space left for {target}: {size:,} bytes are needed and {free:,} are free in "
            f"{parent}. Make room or choose another place."
        )


def is_run(folder: str) -> bool:
    """Whether it is the root of a GPT-NeoX run, into which a step can be put beside others."""
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
        return any(name in LATEST or name.startswith("global_step") for name in names)
    return False


@contextlib.contextmanager
def staged(target: str, size: int, overwrite: bool, step: str | None) -> Iterator[Work]:
    """A place beside the target, whose ``files`` become it when the block ends without an error.

    step: a folder among the files that is put into the target where that is a run already, before
        its ``latest`` is replaced; what else a run has stays.
    An interruption, a disk that fails or a store that doesn't answer leaves the files that are
    finished for the next run; any other error leaves nothing. Errors of the file system become a
    BridgeError. size: bytes needed in all, for its words. Raises BridgeError where another process
    makes the same target.
    """
    real = os.path.realpath(target)
    work = work_of(real)
    made: list[str] = []
    try:
        _make(os.path.dirname(real), made)
        with locked(work, target):
            try:
                _recover(work, real, step)
                yield work
                _place(work, real, overwrite, step)
                for path in made:
                    flush(os.path.dirname(path))
                remove(work)
            except Unverified as error:
                aside = set_aside(work.files, real, "unverified")
                remove(work)
                raise Unverified(
                    f"{error} It is kept as {aside}, and {target} is untouched."
                ) from None
            except Unreachable as error:
                kept = finished(work)
                if not kept:
                    remove(work)
                raise Unreachable(f"{error} {_kept(work, kept)}".rstrip()) from None
            except (KeyboardInterrupt, OSError) as error:
                kept = finished(work)
                if not kept:
                    remove(work)
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(_kept(work, kept)) from None
                if isinstance(error, BrokenPipeError):
                    raise
                raise _explained(error, target, size, _kept(work, kept)) from error
            except BaseException:
                remove(work)
                raise
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise _explained(error, target, size, "") from error
    finally:
        for path in reversed(made):  # those that are still empty
            with contextlib.suppress(OSError):
                os.rmdir(path)


def sweep(target: str) -> None:
    """Remove what a run left that was killed when the target had its name already."""
    work = work_of(os.path.realpath(target))
    if os.path.isdir(work.folder) and not os.path.isdir(work.files):
        with contextlib.suppress(BridgeError), locked(work, target):  # or somebody is at it
            remove(work)


def flush(path: str) -> None:
    """fsync of a file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_folders(folder: str) -> None:
    """fsync of every folder below and including ``folder``, the deepest first."""
    for path, _, _ in os.walk(folder, topdown=False):
        flush(path)


def _explained(error: OSError, target: str, size: int, kept: str) -> BridgeError:
    kept = kept or "What was written is removed again."
    if error.errno in _FULL:
        return BridgeError(
            f"{_FULL[error.errno]} while writing {target}: {size:,} bytes are needed in all. "
            f"Make room or choose another place. {kept}"
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return BridgeError(f"{_exists(target)} {kept}")
    return BridgeError(
        f"{target} can't be written: {error.strerror or error}. Check the disk and the "
        f"permissions, or choose another place. {kept}"
    )


def _kept(work: Work, count: int) -> str:
    if not count:
        return ""
    return kept_files(work.folder, count)


def kept_files(where: str, count: int) -> str:
    """What to say of the files that an earlier run finished."""
    files = "1 finished file is" if count == 1 else f"{count} finished files are"
    return (
        f"{files} kept in {where}: the same command goes on from there; remove that folder to give "
        "up."
    )


def _exists(target: str) -> BridgeError:
    return BridgeError(
        f"{target} exists and isn't empty. Name another target, or say --overwrite to replace it."
    )


def _place(work: Work, target: str, overwrite: bool, step: str | None) -> None:
    """Give the files their name: one rename, or one exchange with what is there.

    Without ``overwrite`` the rename itself fails where something has appeared meanwhile.
    """
    if step is not None and is_run(target):
        _add_step(work.files, target, overwrite, step)
    elif overwrite and os.path.isdir(target) and os.listdir(target):
        swap(work.files, target)
    else:
        os.rename(work.files, target)
    os.unlink(work.journal)
    flush(os.path.dirname(target))


def _add_step(files: str, run: str, overwrite: bool, step: str) -> None:
    """The step first, ``latest`` last, so that it never names what isn't there."""
    new, place = os.path.join(files, step), os.path.join(run, step)
    if overwrite and os.path.isdir(place):
        swap(new, place)
    else:
        os.rename(new, place)
    for name in sorted(os.listdir(files)):
        if name not in LATEST and not os.path.lexists(os.path.join(run, name)):
            os.rename(os.path.join(files, name), os.path.join(run, name))
    flush(run)
    for name in LATEST:
        if os.path.lexists(os.path.join(files, name)):
            os.replace(os.path.join(files, name), os.path.join(run, name))
    flush(run)


def _recover(work: Work, target: str, step: str | None) -> None:
    """What ``swap`` had moved aside when it was killed, in a kernel without exchanges."""
    pairs = [(work.files, target)]
    if step is not None:
        pairs.append((os.path.join(work.files, step), os.path.join(target, step)))
    for new, place in pairs:
        aside = f"{new}.old"
        if os.path.lexists(place):
            shutil.rmtree(aside, ignore_errors=True)
        elif os.path.lexists(aside):
            os.rename(aside, place)


def take_back(work: Work, target: str, step: str | None) -> None:
    """A step that a killed run had put into its place, but not yet ``latest``: unfinished again."""
    named = any(os.path.isfile(os.path.join(work.files, name)) for name in LATEST)
    if step is None or not named:
        return
    new, place = os.path.join(work.files, step), os.path.join(os.path.realpath(target), step)
    if os.path.isdir(place) and not os.path.lexists(new):
        os.rename(place, new)


def set_aside(folder: str, target: str, word: str) -> str:
    """Keep a folder beside the target as ``target.word``, or under the next name that is free."""
    aside, number = f"{target}.{word}", 1
    while os.path.lexists(aside):
        number += 1
        aside = f"{target}.{word}-{number}"
    os.rename(folder, aside)
    return aside


def _replaced(real: str, step: str | None) -> str:
    """What the new files will stand for: the target, or one step of the run that it is."""
    return os.path.join(real, step) if step is not None and is_run(real) else real


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise BridgeError(f"{folder} can't be listed: {error.strerror}.") from None


def _nearest(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    while not os.path.isdir(path):
        if os.path.lexists(path):
            raise BridgeError(f"{path} is a file, and a folder is needed there.")
        path = os.path.dirname(path)
    return path


def _make(path: str, made: list[str]) -> None:
    """Make the folders that lack, from the top, and add each to ``made``."""
    lacking = []
    while not os.path.isdir(path):
        lacking.append(path)
        path = os.path.dirname(path)
    for folder in reversed(lacking):
        with contextlib.suppress(FileExistsError):  # somebody else's, made meanwhile
            os.mkdir(folder)
            made.append(folder)
