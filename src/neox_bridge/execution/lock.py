"""Locks files for one process. The lock ends with the process, even if it is killed."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from neox_bridge.errors import BridgeError


@contextlib.contextmanager
def locked(path: str, target: str) -> Iterator[int]:
    """Lock a file for this process during the block; creates it if missing.

    target: what the lock protects, for messages. Raises BridgeError if another process has the
    lock. A killed process leaves no lock. On file systems without locks, nothing is locked.
    """
    fd = take(path, target)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked_folder(path: str) -> Iterator[None]:
    """Lock a folder, without a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(fd, path)
        yield
    finally:
        os.close(fd)


def take(path: str, target: str, *, names_holder: bool = False) -> int:
    """Take the lock of ``locked``. It is released when the returned descriptor is closed.

    names_holder: whether to write the process into the file, for the error of other processes.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(fd, target, names_holder=names_holder)
            with contextlib.suppress(FileNotFoundError):
                # the file was not replaced in the meantime
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    if names_holder:
                        os.ftruncate(fd, 0)
                        os.pwrite(
                            fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0
                        )
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, target: str, *, names_holder: bool = False) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return
        holder = ""
        if names_holder:
            process = os.pread(fd, 200, 0).decode(errors="replace").strip() or "process unknown"
            holder = f" ({process})"
        raise BridgeError(
            f"Another neox-bridge{holder} is writing {target}. Wait until it ends, or choose "
            "another target."
        ) from None
