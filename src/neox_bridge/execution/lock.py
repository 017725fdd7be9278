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
    fd = _take(path, target)
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


def _lock(fd: int, target: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BridgeError(
                f"Another neox-bridge is writing {target}. Wait for it, or choose another target."
            ) from None


def _take(path: str, target: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(fd, target)
        except BaseException:
            os.close(fd)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):  # not replaced meanwhile
                return fd
        os.close(fd)
