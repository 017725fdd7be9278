"""Opens what should be a file, and only if it is one: a pipe keeps its reader waiting for ever."""

import os
import stat
from typing import BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.stores.paths import is_url, open_file

_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # each system lacks one of them
    _FLAGS |= getattr(os, _name, 0)
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
    if is_url(path):
        return open_file(path)
    try:
        _refuse(path, os.stat(path).st_mode)  # to open a device may already do something
        file = open(os.open(path, _FLAGS), "rb")  # noqa: SIM115 (it is what is returned)
    except (FileNotFoundError, ValueError):  # a name with NUL or half a surrogate pair
        raise BridgeError(f"{path} can't be read: it is missing.") from None
    except OSError as error:
        raise BridgeError(f"{path} can't be read: {error.strerror}.") from None
    try:
        _refuse(path, os.fstat(file.fileno()).st_mode)  # it may be another by now
    except BridgeError:
        file.close()
        raise
    return file


def _refuse(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise BridgeError(f"{path} can't be read: it is {what}, not a file. Copy it again.")
