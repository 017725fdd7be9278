"""The folder beside a target in which it is made: for one process at a time, to be gone on with.

``.NAME.neox-bridge/`` holds ``lock``, ``journal`` and ``files/``, which becomes the target; then
``moves``, and ``retired/`` with what of a run's root made room (see ``install``). ``fetched/`` has
what came from the Hub (see ``stores.fetched``).
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.interrupted import MOVES, SUFFIX

_LONGEST = 150  # bytes of a name that fits with ours around it


@dataclass(frozen=True, slots=True)
class Work:
    """Paths: of the folder, and of what is in it."""

    folder: str

    @property
    def files(self) -> str:
        return os.path.join(self.folder, "files")

    @property
    def journal(self) -> str:
        return os.path.join(self.folder, "journal")

    @property
    def moves(self) -> str:
        return os.path.join(self.folder, MOVES)

    @property
    def retired(self) -> str:
        return os.path.join(self.folder, "retired")

    @property
    def lock(self) -> str:
        return os.path.join(self.folder, "lock")


def work_of(real: str) -> Work:
    """Where a target, named by its real path, is made: the same for every run into it."""
    parent, name = os.path.split(real)
    if len(os.fsencode(name)) > _LONGEST:
        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return Work(os.path.join(parent, f".{name}{SUFFIX}"))


@contextlib.contextmanager
def locked(work: Work, target: str) -> Iterator[None]:
    """The folder is there, and this process's alone until the block ends, however it does.

    Raises BridgeError where another process has it. The lock is the kernel's (flock), so that one
    that is killed leaves none; where a file system has no locks there is none.
    """
    fd = _take(work, target)
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def held(work: Work, target: str) -> Iterator[None]:
    """``locked``, while ``files`` are made and then taken elsewhere.

    The folder is removed at the end, and on an error where nothing in it is worth keeping.
    """
    with locked(work, target):
        try:
            yield
        except BaseException:
            if os.listdir(work.folder) == [os.path.basename(work.lock)]:
                remove(work)
            raise
        remove(work)


def remove(work: Work) -> None:
    """All of it, the lock last: another run may take it at once."""
    shutil.rmtree(work.files, ignore_errors=True)
    shutil.rmtree(work.folder, ignore_errors=True)


def _take(work: Work, target: str) -> int:
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(work.folder)
        try:
            fd = os.open(work.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # a run that ended just now removed the folder
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "process unknown"
                os.close(fd)
                raise BridgeError(
                    f"Another neox-bridge ({holder}) is writing {target}. Wait for it, or choose "
                    "another target."
                ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(work.lock)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                return fd
        os.close(fd)
