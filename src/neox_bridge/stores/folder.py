"""Where files are: on a disk, in an object store, or on the Hub. Chosen by the path, once.

A ``Folder`` answers what ``os.path`` answers of a local path. Nobody else asks whether a path is a
URL: who needs to know asks what the folder can do.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import BinaryIO, ClassVar, Protocol

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FILE = "file://"
_HUB = "hf://"


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
        """ "file", "directory", or None where there is nothing; links are followed."""

    def is_there(self, path: str) -> bool:
        """``os.path.lexists``."""

    def names(self, path: str) -> list[str]:
        """``os.listdir``; of a store as it is now, in one request a thousand objects."""

    def size(self, path: str) -> int:
        """Bytes of a file."""

    def open(self, path: str) -> BinaryIO:
        """A file, for reading. Of an object only what is read is fetched, and some more."""

    def read(self, places: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes at (path, offset, count), fewer only at a file's end."""

    def ahead(self, paths: Iterator[str]) -> Iterator[str]:
        """The paths as they are, while the starts of the next ones may be fetched."""

    def forget(self, path: str) -> None:
        """Believe nothing anymore that was seen there before."""


class LocalFolder:
    """Of this machine."""

    is_local: ClassVar[bool] = True
    is_writable: ClassVar[bool] = True

    def plain(self, path: str) -> str:
        return path

    def absolute(self, path: str) -> str:
        return os.path.abspath(path)

    def normal(self, path: str) -> str:
        return os.path.normpath(path)

    def real(self, path: str) -> str:
        return os.path.realpath(path)

    def is_there(self, path: str) -> bool:
        return os.path.lexists(path)

    def names(self, path: str) -> list[str]:
        return os.listdir(path)

    def size(self, path: str) -> int:
        return os.path.getsize(path)

    def kind(self, path: str) -> str | None:
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError):  # a name with NUL
            return None
        return "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else None

    def open(self, path: str) -> BinaryIO:
        return open(path, "rb")

    def read(self, places: Sequence[tuple[str, int, int]]) -> list[bytes]:
        pieces = []
        for path, offset, count in places:
            with self.open(path) as file:
                file.seek(offset)
                pieces.append(file.read(count))
        return pieces

    def ahead(self, paths: Iterator[str]) -> Iterator[str]:
        return paths

    def forget(self, path: str) -> None:
        pass


class StoreFolder:
    """Of an object store, by URL. A folder there is what has objects below it."""

    is_local: ClassVar[bool] = False
    is_writable: ClassVar[bool] = True

    def plain(self, path: str) -> str:
        return path if path.endswith("://") else path.rstrip("/")

    absolute = normal = real = plain  # stores have neither relative paths nor links

    def kind(self, path: str) -> str | None:
        from neox_bridge.stores.objects import kind

        return kind(path)

    def is_there(self, path: str) -> bool:
        return self.kind(path) is not None

    def names(self, path: str) -> list[str]:
        from neox_bridge.stores.objects import names

        return names(path)

    def size(self, path: str) -> int:
        from neox_bridge.stores.objects import look

        return look(path).size

    def open(self, path: str) -> BinaryIO:
        from neox_bridge.stores.object_file import open_object

        return open_object(path)

    def read(self, places: Sequence[tuple[str, int, int]]) -> list[bytes]:
        from neox_bridge.stores.object_file import fetch_pieces

        return fetch_pieces(places)

    def ahead(self, paths: Iterator[str]) -> Iterator[str]:
        from neox_bridge.stores.object_file import started

        return started(paths)

    def forget(self, path: str) -> None:
        from neox_bridge.stores.objects import forget

        forget(path)


class HubFolder(StoreFolder):
    """Of a revision on the Hub, read by ranges. It takes commits, not files."""

    is_writable: ClassVar[bool] = False


_LOCAL, _STORE, _ON_HUB = LocalFolder(), StoreFolder(), HubFolder()


def without_scheme(path: str) -> str:
    """The path of a ``file://`` URL; another path as it is."""
    return path.removeprefix(_FILE)


def folder_of(path: str) -> Folder:
    """Where a path leads. A ``file://`` URL is one of a store until ``plain`` made a path of it."""
    if _URL.match(path) is None:
        return _LOCAL
    return _ON_HUB if path.startswith(_HUB) else _STORE
