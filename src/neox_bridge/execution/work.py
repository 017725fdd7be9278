"""The work folder next to a target, in which it is written. One process at a time; resumable.

``.NAME.neox-bridge/`` holds ``lock``, ``journal`` and ``files/``, which becomes the target. Later
it also holds ``moves``, and ``retired/`` with replaced files of a run's root (see ``install``).
``fetched/`` holds downloads from the Hub (see ``stores.fetched``).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from neox_bridge.execution.lock import take
from neox_bridge.layouts.interrupted import MOVES
from neox_bridge.stores.store import WORK

_LONGEST = 150  # bytes of a name that fits with our prefix and suffix


@dataclass(frozen=True, slots=True)
class Work:
    """The paths of the folder and its contents."""

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
    """The work folder of a target, given by its real path. It is the same for every run."""
    parent, name = os.path.split(real)
    if len(os.fsencode(name)) > _LONGEST:
        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return Work(os.path.join(parent, f".{name}{WORK}"))


@contextlib.contextmanager
def locked(work: Work, target: str) -> Iterator[None]:
    """Create the folder and lock it for this process until the block ends.

    Raises BridgeError if another process has the lock. It is a kernel lock (flock), so a killed
    process leaves none. On file systems without locks, nothing is locked.
    """
    fd = -1
    while fd < 0:
        with contextlib.suppress(FileExistsError):
            os.mkdir(work.folder)
        with contextlib.suppress(FileNotFoundError):  # a run that just ended deleted the folder
            fd = take(work.lock, target, names_holder=True)
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def held(work: Work, target: str) -> Iterator[None]:
    """``locked``, for files that are written here and then uploaded.

    The folder is deleted at the end. On an error, it is kept if it contains finished files.
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
    """Delete everything, the lock last, because another run may take it at once."""
    shutil.rmtree(work.files, ignore_errors=True)
    shutil.rmtree(work.folder, ignore_errors=True)
