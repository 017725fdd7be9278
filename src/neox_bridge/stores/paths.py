"""Functions of ``os.path`` that also accept URLs (``s3://bucket/folder``)."""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.stores.folder import Folder, folder_of, without_scheme
from neox_bridge.stores.store import FileState


def is_local(path: str) -> bool:
    """Whether a path is on this machine: see ``Folder``."""
    return folder_of(path).is_local


def is_writable(path: str) -> bool:
    """Whether files can be written there one by one."""
    return folder_of(path).is_writable


def plain(path: str) -> str:
    """Normalize user input: the path of a ``file://`` URL, or a URL without its trailing slash."""
    path = without_scheme(path)
    return folder_of(path).plain(path)


def afresh(path: str) -> str:
    """``plain``, which also drops cached information about a URL."""
    path = plain(path)
    folder_of(path).forget(path)
    return path


def absolute(path: str) -> str:
    """``os.path.abspath``; a URL is absolute."""
    return folder_of(path).absolute(without_scheme(path))


def normal(path: str) -> str:
    """``os.path.normpath``; of a URL ``plain``."""
    return folder_of(path).normal(without_scheme(path))


def real(path: str) -> str:
    """``os.path.realpath``; stores have no links."""
    return folder_of(path).real(path)


def exists(path: str) -> bool:
    """``os.path.exists``."""
    return folder_of(path).kind(path) is not None


def lexists(path: str) -> bool:
    """``os.path.lexists``."""
    return folder_of(path).is_there(path)


def isfile(path: str) -> bool:
    """``os.path.isfile``."""
    return folder_of(path).kind(path) == "file"


def isdir(path: str) -> bool:
    """``os.path.isdir``; in a store, a folder exists if there are objects below it."""
    return folder_of(path).kind(path) == "directory"


def listdir(path: str) -> list[str]:
    """``os.listdir``; for a URL the current state, in one request per thousand objects."""
    return folder_of(path).names(path)


def size(path: str) -> int:
    """``os.path.getsize``, in bytes."""
    return folder_of(path).size(path)


def open_file(path: str) -> BinaryIO:
    """Open a regular file for reading; see ``Folder.open``."""
    return folder_of(path).open(path)


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file of ``open_file``."""
    from_store = getattr(getattr(file, "raw", None), "size", None)
    if isinstance(from_store, int):
        return from_store
    return os.fstat(file.fileno()).st_size


def is_remote(file: BinaryIO) -> bool:
    """Whether unread parts of a file must be fetched from a store."""
    return hasattr(getattr(file, "raw", None), "url")


def is_here(file: BinaryIO, offset: int, count: int) -> bool:
    """Whether these bytes can be read without a request."""
    holds = getattr(getattr(file, "raw", None), "holds", None)
    return bool(holds(offset, count)) if holds else True


def fetch_places(file: BinaryIO, offsets: Sequence[int], count: int) -> None:
    """For an object, prefetch ``count`` bytes at each offset in parallel."""
    if is_remote(file):
        from neox_bridge.stores.object_file import fetch_chunks

        fetch_chunks(file, offsets, count)


def read_at(path: str, offset: int, count: int) -> bytes:
    """``count`` bytes from an offset in a file; fewer only at its end."""
    with open_file(path) as file:
        file.seek(offset)
        return file.read(count)


def read_pieces(places: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes at (path, offset, count) of one checkpoint; from stores in parallel."""
    return folder_of(places[0][0]).read(places) if places else []


def ahead(paths: Iterable[str]) -> Iterator[str]:
    """Yields the paths; for stores, the starts of the next files are prefetched."""
    rest = iter(paths)
    for first in rest:
        yield from folder_of(first).ahead(chain((first,), rest))


def walk(folder: str) -> Iterator[tuple[str, int | None]]:
    """(path, bytes) of every file below a folder; see ``Folder.walk``."""
    return folder_of(folder).walk(folder)


def states(paths: Collection[str], *, missing_ok: bool = False) -> dict[str, FileState]:
    """The state of each file, to detect changes.

    missing_ok: leave out missing files instead of raising BridgeError.
    """
    by_folder: dict[Folder, list[str]] = {}
    for path in paths:
        by_folder.setdefault(folder_of(path), []).append(path)
    known: dict[str, FileState] = {}
    for folder, group in by_folder.items():
        known |= folder.states(group)
    if not missing_ok and (gone := next((path for path in paths if path not in known), None)):
        raise BridgeError(
            f"{gone} was deleted during the run. Convert again when no other process changes it."
        )
    return {path: known[path] for path in paths if path in known}
