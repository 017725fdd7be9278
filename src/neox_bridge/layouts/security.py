"""Looks through a checkpoint for pickles, and says what they would run: ``inspect --security``."""

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import is_apple_double
from neox_bridge.formats.pickle_security import Report, is_candidate, scan
from neox_bridge.stores.folder import folder_of
from neox_bridge.stores.paths import afresh, walk

SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def scan_path(path: str) -> list[Report]:
    """The reports of a file, or of every file below a folder that may hold pickles.

    Links to files are followed, as in the Hub's cache; links to folders aren't. Raises BridgeError
    where there is nothing at the path or it can't be read.
    """
    path = afresh(path)
    kind = folder_of(path).kind(path)
    if kind is None:
        raise BridgeError(f"{path}: no such file or folder.")
    if kind != "directory":
        return [scan(path) if kind == "file" else _special(path)]
    return [
        _special(file) if size is None else scan(file)
        for file, size in walk(path)
        if not is_apple_double(file) and (size is None or is_candidate(file, SUFFIXES))
    ]


def _special(path: str) -> Report:
    return Report(path, "none", 0, problem="it isn't a regular file")
