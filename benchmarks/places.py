"""Where conversions are measured: an ordinary file system, and loop-mounted ones."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neox_bridge.execution.extents import SHARED, extents

MAKE = {
    "xfs": (("mkfs.xfs", "-q", "-m", "reflink=1"), "xfsprogs"),
    "btrfs": (("mkfs.btrfs", "-q"), "btrfs-progs"),
}


class Skipped(Exception):
    """A part can't be measured here; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Place:
    """name: of its file system. alone: nothing else writes there, so its free space tells."""

    name: str
    folder: Path
    alone: bool = False

    def free(self) -> int:
        """Bytes."""
        found = os.statvfs(self.folder)
        return found.f_bfree * found.f_frsize

    def taken(self, before: int, target: Path) -> int:
        """Bytes of disk that ``target`` took, and shares with no other file."""
        return before - self.free() if self.alone else own_blocks(target)


def settle(folder: Path) -> None:
    """Flush a whole file system, so that no run pays for the one before."""
    subprocess.run(["sync", "-f", str(folder)], check=True)


def ordinary(folder: Path) -> Place:
    """The file system that a folder lies on."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point, kind = line.split()[1:3]
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return Place(best[1], folder)


@contextlib.contextmanager
def mounted(kind: str, folder: Path, size: int) -> Iterator[Place]:
    """An empty file system of ``size`` bytes, "xfs" or "btrfs", in a sparse file in ``folder``.

    The loop device reads and writes the file directly, so that nothing is cached twice.
    Raises Skipped where that can't be done here.
    """
    (program, *arguments), package = MAKE[kind]
    if os.geteuid() != 0:
        raise Skipped(f"{kind}: mounting one needs root")
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    tool = shutil.which(program, path=search)
    if tool is None:
        raise Skipped(f"{kind}: there is no {program} (package {package})")
    if (room := shutil.disk_usage(folder).free) < size:
        raise Skipped(f"{kind}: needs {size / 1e9:.0f} GB free, there are {room / 1e9:.0f}")
    image, point = folder / f"{kind}.img", folder / kind
    point.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    try:
        _must(kind, tool, *arguments, str(image))
        loop = _must(kind, "losetup", "--find", "--show", "--direct-io=on", str(image))
        try:
            _must(kind, "mount", loop, str(point))
            try:
                yield Place(f"{kind}, loop-mounted", point, alone=True)
            finally:
                subprocess.run(["umount", str(point)], check=True)
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True)
    finally:
        image.unlink()
        point.rmdir()


def own_blocks(target: Path) -> int:
    """Bytes of disk under the files of a folder, less those that they share with other files."""
    total = 0
    for path in target.rglob("*"):
        if path.is_file():
            total += path.stat().st_blocks * 512 - _shared(path)
    return total


def _must(kind: str, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing said"]
        raise Skipped(f"{kind}: {command[0]}: {lines[-1]}")
    return done.stdout.strip()


def _shared(path: Path) -> int:
    """Bytes of a file whose blocks another file has too; 0 where the file system can't say."""
    fd = os.open(path, os.O_RDONLY)
    try:
        own = extents(fd, 0, os.fstat(fd).st_size)
        return sum(length for _, _, length, flags in own if flags & SHARED)
    except OSError:
        return 0
    finally:
        os.close(fd)
