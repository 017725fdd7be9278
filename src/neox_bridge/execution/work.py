"""The folder beside a target in which it is made: for one process at a time, to be gone on with.

``.NAME.neox-bridge/`` holds ``lock``, ``journal`` and ``files/``, which becomes the target; then
``moves``, and ``retired/`` with what of a run's root made room (see ``install``). ``fetched/`` has
what came from the Hub (see ``stores.fetched``).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from neox_bridge.execution.lock import take
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
    fd = -1
    while fd < 0:
        with contextlib.suppress(FileExistsError):
            os.mkdir(work.folder)
        with contextlib.suppress(FileNotFoundError):  # a run that ended just now removed the folder
            fd = take(work.lock, target, names_holder=True)
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
