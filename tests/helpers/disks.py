"""Real disks that are full, slow or hang, for tests that run as root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")  # of cgroup v1's root


def _must(*command: str | Path) -> str:
    """What a command prints. Skips the test if this machine cannot run it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"needs {command[0]}")
    if done.returncode:
        pytest.skip(f"{command[0]} fails here: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def small_disk(point: Path, size: int) -> Iterator[Path]:
    """A file system of this many bytes, in memory."""
    if os.geteuid():
        pytest.skip("mounting a disk needs root")
    point.mkdir()
    _must("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)


def enlarge(point: Path, size: int) -> None:
    """Give a ``small_disk`` more bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", point], check=True)


@contextmanager
def disk(point: Path, size: int) -> Iterator[Path]:
    """An ext4 of about this size on a loop device."""
    if os.geteuid():
        pytest.skip("mounting a disk needs root")
    point.mkdir()
    image = point.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(size)
    _must("mkfs.ext4", "-q", "-F", "-m", "0", image)
    _must("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)
        image.unlink()


def fill(disk: Path, left: int = 0) -> Path:
    """A file that leaves so many bytes of a disk free."""
    path = disk / "filler"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)
    return path


@contextmanager
def slowed(point: Path, bytes_per_second: int) -> Iterator[None]:
    """Let the device of a mounted disk write no faster than this."""
    number = os.stat(point).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    if not _THROTTLE.exists():
        pytest.skip(f"there is no {_THROTTLE}")
    _THROTTLE.write_text(f"{device} {bytes_per_second}")
    try:
        yield
    finally:
        _THROTTLE.write_text(f"{device} 0")


@contextmanager
def hanging(point: Path) -> Iterator[None]:
    """Let every write to a mounted disk wait, as if the disk had stopped to answer."""
    _must("fsfreeze", "--freeze", point)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", point], check=True)
