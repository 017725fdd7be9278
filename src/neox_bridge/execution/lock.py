"""A file that one process at a time has, until it ends, however it does."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from neox_bridge.errors import BridgeError


@contextlib.contextmanager
def locked(path: str, target: str) -> Iterator[int]:
    """A descriptor of a file, made where it is missing, that is this process's alone in the block.

    target: what it stands for, for messages. Raises BridgeError where another process has it. A
    process that is killed leaves no lock; where a file system has no locks there is none.
    """
    fd = take(path, target)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked_folder(path: str) -> Iterator[None]:
    """The same of a folder, without a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(fd, path)
        yield
    finally:
        os.close(fd)


def take(path: str, target: str, *, names_holder: bool = False) -> int:
    """The descriptor of ``locked``: the lock is released when it is closed.

    names_holder: whether the file says which process has it, for the message to others.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(fd, target, names_holder=names_holder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):  # not replaced meanwhile
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
