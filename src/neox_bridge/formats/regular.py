"""Opens what should be a file, and only if it is one: a pipe keeps its reader waiting for ever."""

import os
import re
import shlex
import stat
from typing import BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.stores.paths import is_local, open_file

_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # each system lacks one of them
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


def open_regular(path: str) -> BinaryIO:
    """The file, for reading. Raises BridgeError, naming it, for one that is missing or can't be
    read, and for folders, pipes, sockets and devices, without waiting for any of them.
    """
    if not is_local(path):
        return open_file(path)
    try:
        _refuse(path, os.stat(path).st_mode)  # to open a device may already do something
        file = open(os.open(path, _FLAGS), "rb")  # noqa: SIM115 (it is what is returned)
    except (FileNotFoundError, ValueError):  # a name with NUL or half a surrogate pair
        raise BridgeError(missing_message(path)) from None
    except OSError as error:
        raise BridgeError(f"{path} can't be read: {error.strerror}.") from None
    try:
        _refuse(path, os.fstat(file.fileno()).st_mode)  # it may be another by now
    except BridgeError:
        file.close()
        raise
    return file


def missing_message(path: str) -> str:
    """The message for a file that is not there; a link that leads nowhere says where it leads."""
    if "\0" in path or not os.path.islink(path):
        return f"{path} can't be read: it is missing."
    folder = os.path.dirname(os.path.abspath(path))
    way = (
        "The folder was copied without the files that its links lead to (in a Hugging Face cache, "
        "the blobs). Copy it again with its links followed: cp -RL ORIGINAL " + shlex.quote(folder)
    )
    if cached := _CACHED.fullmatch(folder):
        repo = cached[1].replace("--", "/", 1)
        way = (
            "The blobs of this Hugging Face cache are incomplete. Download the model again: hf "
            f"download {shlex.quote(repo)} --revision {cached[2]}"
        )
    return f"{path} is a link to {os.readlink(path)}, which does not exist. {way}"


def _refuse(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise BridgeError(f"{path} can't be read: it is {what}, not a file. Copy it again.")
