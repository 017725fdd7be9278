"""Folders on the disks of this machine."""

import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, ClassVar

from neox_bridge.errors import BridgeError
from neox_bridge.stores.store import FileState

_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # no system has all of them
    _FLAGS |= getattr(os, _name, 0)
# a snapshot in Hugging Face's cache (huggingface_hub, file_download.py)
_CACHED = re.compile(r".*/models--([^/]+)/snapshots/([0-9a-f]{7,40})", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class LocalFolder:
    """A folder of this machine."""

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
        except (OSError, ValueError):  # a name that contains NUL
            return None
        return {stat.S_IFREG: "file", stat.S_IFDIR: "directory"}.get(stat.S_IFMT(mode), "special")

    def states(self, paths: Iterable[str]) -> dict[str, FileState]:
        states = {}
        for path in paths:
            try:
                seen = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise _unreadable(path, error) from None
            states[path] = FileState(
                seen.st_size, modified_ns=seen.st_mtime_ns, inode=seen.st_ino, device=seen.st_dev
            )
        return states

    def walk(self, path: str) -> Iterator[tuple[str, int | None]]:
        def fail(error: OSError) -> None:
            raise unlisted(str(error.filename), error) from None

        for parent, folders, names in os.walk(path, onerror=fail):
            folders.sort()
            for file in (os.path.join(parent, name) for name in sorted(names)):
                if (kind := self.kind(file)) not in (None, "directory"):
                    yield file, os.path.getsize(file) if kind == "file" else None

    def open(self, path: str) -> BinaryIO:
        """Open a file. Pipes and devices are refused, because opening a pipe could block."""
        try:
            _refuse(path, os.stat(path).st_mode)  # opening a device may have side effects
            file = open(os.open(path, _FLAGS), "rb")  # noqa: SIM115 (it is what is returned)
        except (FileNotFoundError, ValueError):  # a name that contains NUL or an unpaired surrogate
            raise BridgeError(missing_message(path)) from None
        except OSError as error:
            raise _unreadable(path, error) from None
        try:
            _refuse(path, os.fstat(file.fileno()).st_mode)  # the path may lead to another file now
        except BridgeError:
            file.close()
            raise
        return file

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


def missing_message(path: str) -> str:
    """The message for a missing file. For a broken link, it names the target of the link."""
    if "\0" in path or not os.path.islink(path):
        return f"{path} cannot be read: it does not exist."
    folder = os.path.dirname(os.path.abspath(path))
    way = (
        "The folder was copied without the targets of its links (in a Hugging Face cache, the "
        "blobs). Copy it again and follow links: cp -RL ORIGINAL " + shlex.quote(folder)
    )
    if cached := _CACHED.fullmatch(folder):
        repo = cached[1].replace("--", "/", 1)
        way = (
            "The blobs of this Hugging Face cache are incomplete. Download the model again: "
            f"hf download {shlex.quote(repo)} --revision {cached[2]}"
        )
    return f"{path} is a link to {os.readlink(path)}, which does not exist. {way}"


def unlisted(path: str, error: OSError) -> BridgeError:
    """The error for a folder whose names cannot be read."""
    return BridgeError(
        f"{path} cannot be listed: {error.strerror}. Check the folder and its permissions."
    )


def _unreadable(path: str, error: OSError) -> BridgeError:
    return BridgeError(
        f"{path} cannot be read: {error.strerror}. Check the file, its permissions and its disk."
    )


def _refuse(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise BridgeError(f"{path} cannot be read: it is {what}, not a file. Copy it again.")
