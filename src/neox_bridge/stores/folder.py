"""The interface of local folders, object stores and the Hub. The path selects the implementation.

A ``Folder`` offers the operations of ``os.path``. Other code does not check whether a path is a
URL, but uses the properties of the folder.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import BinaryIO, ClassVar, Protocol

from neox_bridge.stores.local_folder import LocalFolder
from neox_bridge.stores.store import FileState

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FILE = "file://"
HUB = "hf://"
_LOCAL = LocalFolder()


class Folder(Protocol):
    """A file system. Paths are as the user writes them.

    Attributes:
        is_local: Files are on this machine: they can be mapped, linked and locked, can share
            blocks, and are cheap to inspect.
        is_writable: Files can be written into it one by one.
    """

    is_local: ClassVar[bool]
    is_writable: ClassVar[bool]

    def plain(self, path: str) -> str:
        """A path without ``file://``, and a URL without a slash at its end."""

    def absolute(self, path: str) -> str:
        """``os.path.abspath``."""

    def normal(self, path: str) -> str:
        """``os.path.normpath``."""

    def real(self, path: str) -> str:
        """``os.path.realpath``."""

    def kind(self, path: str) -> str | None:
        """ "file", "directory", "special" (a pipe, a device), or None if nothing exists.

        Links are followed.
        """

    def is_there(self, path: str) -> bool:
        """``os.path.lexists``."""

    def names(self, path: str) -> list[str]:
        """``os.listdir``; for a store the current state, in one request per thousand objects."""

    def size(self, path: str) -> int:
        """Bytes of a file."""

    def states(self, paths: Iterable[str]) -> dict[str, FileState]:
        """The state of each file, to detect changes; missing files are left out."""

    def walk(self, path: str) -> Iterator[tuple[str, int | None]]:
        """(path, bytes) of every file below a folder, sorted; None for special files.

        Links to files are followed unless they are broken; links to folders are not. Raises
        BridgeError for a folder that cannot be listed.
        """

    def open(self, path: str) -> BinaryIO:
        """Open a regular file for reading. Of an object, only what is read is fetched.

        Raises BridgeError if it is missing or cannot be read, and for folders, pipes and devices,
        without blocking.
        """

    def read(self, places: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes at (path, offset, count); fewer only at the end of a file."""

    def ahead(self, paths: Iterator[str]) -> Iterator[str]:
        """Yields the paths, while the starts of the next files are prefetched."""

    def forget(self, path: str) -> None:
        """Drop everything that is cached about a path."""


def without_scheme(path: str) -> str:
    """The path of a ``file://`` URL; other paths unchanged."""
    return path.removeprefix(_FILE)


def folder_of(path: str) -> Folder:
    """The folder of a path. A ``file://`` URL counts as a store until ``plain`` converts it."""
    if _URL.match(path) is None:
        return _LOCAL
    return _remote_folder(on_hub=is_hub(path))


def is_hub(path: str) -> bool:
    """Whether a path is on the Hub."""
    return path.startswith(HUB)


@lru_cache
def _remote_folder(on_hub: bool) -> Folder:
    """Store libraries are imported when a URL is first used, so that local paths stay fast."""
    from neox_bridge.stores.store_folder import HubFolder, StoreFolder

    return HubFolder() if on_hub else StoreFolder()
