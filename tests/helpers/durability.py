"""What a power cut would leave: a record of the calls that change a disk, and of what is flushed.

SIGKILL does not lose the page cache, so a test that kills the process passes without any fsync.
``recording`` notes for each file whether its bytes were flushed after the last write, and for each
folder whether its entries were flushed after the last change. A rename may reach the disk as soon
as it is made, so what it names must be flushed before. It may not reach the disk before its folder
is flushed, so that must follow.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox_bridge.execution import exchange
from neox_bridge.execution.staging import LATEST


@dataclass
class Disk:
    """The state of the files and folders that a process changed, by device and inode.

    Attributes:
        unflushed: Files and folders whose last change is not flushed, with their last path.
        seen: All files that were created or written.
        problems: What a power cut could have broken, in words.
        renames: The last two parts of each path that something was renamed to.
        journaled: How many lines of a journal named a file, each of which was flushed.
    """

    unflushed: dict[tuple[int, int], str] = field(default_factory=dict)
    seen: set[tuple[int, int]] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    renames: list[str] = field(default_factory=list)
    journaled: int = 0

    def changed(self, path: str) -> None:
        """A file's bytes or a folder's entries are in memory only."""
        status = os.stat(path)
        self.unflushed[status.st_dev, status.st_ino] = path
        self.seen.add((status.st_dev, status.st_ino))

    def entry(self, path: str) -> None:
        """The folder of this path has another entry."""
        with contextlib.suppress(FileNotFoundError):  # of a folder that is gone as well
            self.changed(os.path.dirname(os.path.abspath(path)))

    def flushed(self, fd: int) -> None:
        """What this descriptor is open on is on the disk."""
        status = os.fstat(fd)
        self.unflushed.pop((status.st_dev, status.st_ino), None)
        self.seen.add((status.st_dev, status.st_ino))

    def named(self, path: str) -> None:
        """A path appears by a rename: all that it holds must be flushed, and be known."""
        self.renames.append("/".join(path.split("/")[-2:]))
        inside = [path]
        for folder, folders, files in os.walk(path):
            inside += [os.path.join(folder, name) for name in (*folders, *files)]
        for one in inside:
            status = os.lstat(one)
            key = (status.st_dev, status.st_ino)
            if os.path.basename(one) == "journal.new":
                continue  # a lost journal costs time only
            if key not in self.seen and os.path.isfile(one):
                self.problems.append(f"{one} was written by a call that is not recorded")
            if key in self.unflushed:
                self.problems.append(f"{one} is not flushed when {path} gets its name")

    def pointed(self, path: str) -> None:
        """A ``latest`` is about to appear: the entry of the step that it names must be flushed."""
        status = os.stat(os.path.dirname(path))
        if (status.st_dev, status.st_ino) in self.unflushed:
            self.problems.append(f"{path} may be on the disk before the step that it names")

    def entered(self, journal: str, data: bytes) -> None:
        """A journal says that files are finished: their bytes must be on the disk."""
        files = os.path.join(os.path.dirname(journal), "files")
        for line in data.decode().splitlines():
            status = os.stat(os.path.join(files, json.loads(line)["path"]))
            self.journaled += 1
            if (status.st_dev, status.st_ino) in self.unflushed:
                self.problems.append(f"{line} is in the journal before the file is flushed")

    def check(self, target: Path) -> None:
        """Fail where a power cut during or right after the run could have broken the target."""
        assert not self.problems, self.problems
        for path in (*target.parents, target, *target.rglob("*")):
            status = os.lstat(path)
            assert (status.st_dev, status.st_ino) not in self.unflushed, f"{path} is not flushed"


@contextlib.contextmanager
def recording(monkeypatch: Any, disk: Disk | None = None) -> Iterator[Disk]:
    """Records what this process does to the disk until the block ends, from the state ``disk``."""
    disk = Disk() if disk is None else disk
    with monkeypatch.context() as patch:

        def around(module: Any, name: str, after: Callable[..., None], first: Any = None) -> None:
            real = getattr(module, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                if first is not None:
                    first(*args)
                result = real(*args, **kwargs)
                after(result, *args, **(kwargs if after is removed else {}))
                return result

            patch.setattr(module, name, call)

        def path_of(fd: int) -> str:
            return os.readlink(f"/proc/self/fd/{fd}")

        def opened(_: int, path: Any, flags: int, *_more: Any) -> None:
            if flags & (os.O_CREAT | os.O_TRUNC) and isinstance(path, str):
                disk.changed(path)
                disk.entry(path)

        def wrote(_: Any, fd: int, *args: Any) -> None:
            path = path_of(fd)
            if path.endswith("/journal"):
                disk.entered(path, args[0])
            elif not path.endswith("/lock") and os.path.exists(path):
                disk.changed(path)

        def received(_: Any, _source: int, target: int, *_more: Any) -> None:
            disk.changed(path_of(target))

        def cloned(_: Any, fd: int, *_more: Any) -> None:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                disk.changed(path_of(fd))

        def removed(_: None, path: str, *, dir_fd: int | None = None) -> None:
            disk.entry(path if dir_fd is None else os.path.join(path_of(dir_fd), path))

        def renaming(old: str, new: str) -> None:
            disk.named(old)
            if os.path.basename(new) in LATEST and "/files/" not in new:
                disk.pointed(new)

        def moved(_: None, old: str, new: str) -> None:
            disk.entry(old)
            disk.entry(new)

        def exchanged(was: bool, first: str, second: str) -> None:
            if was:
                disk.entry(first)
                disk.entry(second)

        around(os, "open", opened)
        for name in ("write", "pwrite", "ftruncate", "posix_fallocate"):
            around(os, name, wrote)
        around(os, "copy_file_range", received)
        around(fcntl, "ioctl", cloned)
        around(os, "fsync", lambda _, fd: disk.flushed(fd))
        around(os, "mkdir", lambda _, path, *_more: disk.entry(path))
        around(os, "unlink", removed)
        around(os, "rename", moved, renaming)
        around(os, "replace", moved, renaming)
        around(exchange, "_exchange", exchanged, lambda new, old: disk.named(new))
        yield disk
