"""A target that appears whole or not at all: written beside it, flushed, renamed."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator

from neox_bridge.errors import BridgeError, Unverified

_FULL = {errno.ENOSPC: "No space left", errno.EDQUOT: "The quota is used up"}


def check_target(target: str, sources: Iterable[str], size: int, overwrite: bool) -> None:
    """Raise BridgeError, before anything is written, where the target can't be made.

    sources: files that are read. size: bytes that will be written.
    """
    real = os.path.realpath(target)
    for source in sources:
        # the link as well as the file: a Hugging Face cache is a folder of links
        link = os.path.join(os.path.realpath(os.path.dirname(source)), os.path.basename(source))
        if any(_holds(real, path) for path in (link, os.path.realpath(source))):
            raise BridgeError(
                f"{target} holds the source {source}, which would be replaced while it is read. "
                "Choose another target."
            )
    if os.path.lexists(real):
        if not os.path.isdir(real):
            raise BridgeError(f"{target} is a file. Name a folder that doesn't exist yet.")
        if os.path.ismount(real):
            raise BridgeError(
                f"{target} is a mount point, which can't be replaced. Name a folder below it."
            )
        if _listed(real) and not overwrite:
            raise _exists(target)
    parent = _nearest(os.path.dirname(real))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BridgeError(f"{parent} can't be written to. Choose another place or ask for access.")
    free = shutil.disk_usage(parent).free
    if free < size:
        raise BridgeError(
            f"No space left for {target}: {size:,} bytes are needed and {free:,} are free in "
            f"{parent}. Make room or choose another place."
        )


@contextlib.contextmanager
def staged(target: str, size: int, overwrite: bool) -> Iterator[str]:
    """A folder beside the target that becomes the target when the block ends without an error.

    On any error, interruption included, the folder is removed, and folders made for it. Errors of
    the file system become a BridgeError. size: bytes needed in all, for its words.
    """
    real = os.path.realpath(target)
    parent, name = os.path.split(real)
    folder = os.path.join(parent, f".{name[:64]}.neox-bridge-{secrets.token_hex(4)}.tmp")
    made: list[str] = []
    try:
        _make(parent, made)
        os.mkdir(folder)
        yield folder
        _replace(folder, real, overwrite)
        for path in made:
            flush(os.path.dirname(path))
    except BaseException as error:
        if isinstance(error, Unverified):
            aside = _aside(folder, real)
            raise Unverified(f"{error} It is kept as {aside}, and {target} is untouched.") from None
        shutil.rmtree(folder, ignore_errors=True)
        for path in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise _explained(error, target, size) from error
        raise


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


def _explained(error: OSError, target: str, size: int) -> BridgeError:
    gone = "What was written is removed again."
    if error.errno in _FULL:
        return BridgeError(
            f"{_FULL[error.errno]} while writing {target}: {size:,} bytes are needed in all. "
            f"{gone} Make room or choose another place."
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return _exists(target)
    return BridgeError(
        f"{target} can't be written: {error.strerror or error}. {gone} Check the disk and the "
        "permissions, or choose another place."
    )


def _exists(target: str) -> BridgeError:
    return BridgeError(
        f"{target} exists and isn't empty. Name another target, or say --overwrite to replace it."
    )


def _replace(folder: str, target: str, overwrite: bool) -> None:
    """One rename; with ``overwrite`` an old target is moved aside before and removed after.

    Without it the rename itself fails where something has appeared in the target meanwhile.
    """
    old = f"{folder}.old"
    try:
        if overwrite and os.path.isdir(target) and os.listdir(target):
            os.rename(target, old)
        os.rename(folder, target)
        flush(os.path.dirname(target))
    finally:  # an interruption may come between any two steps
        if os.path.lexists(old):
            if os.path.lexists(target):
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(old, target)


def _aside(folder: str, target: str) -> str:
    """Keep a folder that failed its verification beside the target, under a name that is free."""
    aside, number = f"{target}.unverified", 1
    while os.path.lexists(aside):
        number += 1
        aside = f"{target}.unverified-{number}"
    os.rename(folder, aside)
    return aside


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
        os.mkdir(folder)
        made.append(folder)
