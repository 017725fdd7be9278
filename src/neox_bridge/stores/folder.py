"""Where files are: on a disk, in an object store, or on the Hub. Chosen by the path, once.

A ``Folder`` answers what ``os.path`` answers of a local path. Nobody else asks whether a path is a
URL: who needs to know asks what the folder can do.
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
    """Every path is one in it, as the user writes it.

    Attributes:
        is_local: Its files are of this machine: they can be mapped, linked and locked, share
            blocks with others, and cost nothing to look at.
        is_writable: Files can be written into it one by one.
    """

    is_local: ClassVar[bool]
    is_writable: ClassVar[bool]

    def plain(self, path: str) -> str:
        """A path as it is used: no ``file://``, and no slash at the end of a URL."""

    def absolute(self, path: str) -> str:
        """``os.path.abspath``."""

    def normal(self, path: str) -> str:
        """``os.path.normpath``."""

    def real(self, path: str) -> str:
        """``os.path.realpath``."""

    def kind(self, path: str) -> str | None:
        """ "file", "directory", "special" (a pipe, a device), or None where there is nothing.

        Links are followed.
        """

    def is_there(self, path: str) -> bool:
        """``os.path.lexists``."""

    def names(self, path: str) -> list[str]:
        """``os.listdir``; of a store as it is now, in one request a thousand objects."""

    def size(self, path: str) -> int:
        """Bytes of a file."""

    def states(self, paths: Iterable[str]) -> dict[str, FileState]:
        """What tells whether each file has changed; those that are missing are left out."""

    def walk(self, path: str) -> Iterator[tuple[str, int | None]]:
        """(path, bytes) of every file below a folder, sorted; None for what is no regular file.

        Links to files are followed, unless they lead nowhere; links to folders are not. Raises
        BridgeError for a folder that cannot be listed.
        """

    def open(self, path: str) -> BinaryIO:
        """A regular file, for reading. Of an object little more than what is read is fetched.

        Raises BridgeError, naming it, for one that is missing or cannot be read, and for folders,
        pipes and devices, without waiting for any of them.
        """

    def read(self, places: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes at (path, offset, count), fewer only at a file's end."""

    def ahead(self, paths: Iterator[str]) -> Iterator[str]:
        """The paths as they are, while the starts of the next ones may be fetched."""

    def forget(self, path: str) -> None:
        """Believe nothing anymore that was seen there before."""


def without_scheme(path: str) -> str:
    """The path of a ``file://`` URL; another path as it is."""
    return path.removeprefix(_FILE)


def folder_of(path: str) -> Folder:
    """Where a path leads. A ``file://`` URL is one of a store until ``plain`` made a path of it."""
    if _URL.match(path) is None:
        return _LOCAL
    return _remote_folder(on_hub=is_hub(path))


def is_hub(path: str) -> bool:
    """Whether a path is a place on the Hub."""
    return path.startswith(HUB)


@lru_cache
def _remote_folder(on_hub: bool) -> Folder:
    """What a store needs is imported when a URL is first used, so that local paths cost nothing."""
    from neox_bridge.stores.store_folder import HubFolder, StoreFolder

    return HubFolder() if on_hub else StoreFolder()
