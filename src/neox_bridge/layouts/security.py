"""Looks through a checkpoint for pickles, and says what they would run: ``inspect --security``."""

import os
from collections.abc import Iterator

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import is_apple_double
from neox_bridge.formats.pickle_security import Report, is_candidate, scan
from neox_bridge.stores import paths

SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def scan_path(path: str) -> list[Report]:
    """The reports of a file, or of every file below a folder that may hold pickles.

    Links to files are followed, as in the Hub's cache; links to folders aren't. Raises BridgeError
    where there is nothing at the path or it can't be read.
    """
    path = paths.afresh(path)
    if not paths.exists(path):
        raise BridgeError(f"{path}: no such file or folder.")
    if not paths.isdir(path):
        return [_scan(path)]
    return [_scan(file) for file in _files(path)]


def _files(folder: str) -> Iterator[str]:
    if not paths.is_local(folder):
        yield from filter(_looks, paths.walk(folder))
        return

    def unreadable(error: OSError) -> None:
        raise error

    for below, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in sorted(names):
            if is_apple_double(name):
                continue
            file = os.path.join(below, name)
            if not os.path.exists(file) or not _looks(file):  # a dangling link loads nothing
                continue
            yield file


def _looks(file: str) -> bool:
    try:
        return not paths.isfile(file) or is_candidate(file, SUFFIXES)
    except OSError as error:
        raise BridgeError(f"{file} can't be read: {error.strerror}.") from None


def _scan(file: str) -> Report:
    try:
        return scan(file)
    except OSError as error:
        raise BridgeError(f"{file} can't be read: {error.strerror}.") from None
