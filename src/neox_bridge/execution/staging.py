"""A target that appears whole or not at all: written beside it, flushed, renamed."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator

from neox_bridge.errors import BridgeError

_FULL = {errno.ENOSPC, errno.EDQUOT}


def check_target(target: str, sources: Iterable[str], size: int, overwrite: bool) -> None:
    """Raise BridgeError, before anything is written, where the target can't be made.

    sources: files that are read. size: bytes that will be written.
    """
    real = os.path.realpath(target)
    for source in sources:
        folder = os.path.realpath(source)
        if folder == real or folder.startswith(real + os.sep):
            raise BridgeError(
                f"{target} holds the source {source}, which would be replaced while it is read. "
                "Choose another target."
            )
    if os.path.lexists(target):
        if not os.path.isdir(target):
            raise BridgeError(f"{target} is a file. Name a folder that doesn't exist yet.")
        if os.listdir(target) and not overwrite:
            raise BridgeError(
                f"{target} exists and isn't empty. Name another target, or say --overwrite to "
                "replace it."
            )
    parent = _nearest(os.path.dirname(os.path.abspath(target)))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BridgeError(f"{parent} can't be written to. Choose another place or ask for access.")
    free = shutil.disk_usage(parent).free
    if free < size:
        raise BridgeError(
            f"No space left for {target}: {size:,} bytes are needed and {free:,} are free in "
            f"{parent}. Make room or choose another place."
        )


@contextlib.contextmanager
def staged(target: str) -> Iterator[str]:
    """A folder beside the target that becomes the target when the block ends without an error.

    On any error, interruption included, the folder is removed, and folders made for it.
    """
    target = os.path.abspath(target)
    parent, name = os.path.split(target)
    made = _make(parent)
    folder = os.path.join(parent, f".{name}.neox-bridge-{secrets.token_hex(4)}.tmp")
    try:
        os.mkdir(folder)
        yield folder
        _replace(folder, target)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for path in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise BridgeError(
                f"No space left while writing {target}; what was written is removed again. Make "
                "room or choose another place."
            ) from None
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


def _replace(folder: str, target: str) -> None:
    """One rename; an old target is moved aside before and removed after."""
    parent = os.path.dirname(target)
    old = None
    if os.path.isdir(target) and os.listdir(target):
        old = f"{folder}.old"
        os.rename(target, old)
    try:
        os.rename(folder, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    flush(parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _nearest(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    while not os.path.isdir(path):
        if os.path.lexists(path):
            raise BridgeError(f"{path} is a file, and a folder is needed there.")
        path = os.path.dirname(path)
    return path


def _make(path: str) -> list[str]:
    """Make the folders that lack, and say which."""
    made: list[str] = []
    while not os.path.isdir(path):
        made.append(path)
        path = os.path.dirname(path)
    made.reverse()
    for folder in made:
        os.mkdir(folder)
    return made
