"""Whether bytes of two files lie in the same blocks of a disk, of which the file system tells."""

import fcntl
import os
import struct
import sys
from collections.abc import Iterator

_FIEMAP = 0xC020660B  # linux/fs.h, Documentation/filesystems/fiemap.rst
_QUERY = struct.Struct("QQIIII")  # struct fiemap: start, length, flags, found, room
_EXTENT = struct.Struct("QQQ16xI12x")  # struct fiemap_extent: in the file, on the disk, length
_ROOM = 128  # extents that are asked for at once
_SYNC = 1  # what is in memory only is written first, and so has its own place where it differs
_PLAIN = 0x1 | 0x1000  # LAST, MERGED: flags that say nothing of where bytes lie
SHARED = 0x2000  # with another file
_XFS = 0x8100587E  # XFS_IOC_FSGEOMETRY
_ATTRIBUTES, _ATTRIBUTES_SIZE, _REALTIME = 0x801C581F, 28, 0x1  # FS_IOC_FSGETXATTR
_BTRFS = 0x8400941F  # BTRFS_IOC_FS_INFO
_ARGUMENT_BYTES = 1024  # the most of the structures that these three fill

Extent = tuple[int, int, int, int]  # from where in the file, place on the disk, bytes, flags
BlockRun = tuple[int, int, int]  # from where in the range, place on the disk, bytes


def same_blocks(one: int, start: int, other: int, to: int, size: int) -> bool:
    """Whether ``size`` bytes of two files (descriptors) at these offsets are the same blocks.

    They are equal then, whatever they are, and needn't be read. False says nothing: other file
    systems don't say it, or not so that it can be relied on (of bcachefs's several disks each
    counts its blocks from 0), and of compressed and encrypted blocks it isn't known.
    """
    if sys.platform != "linux" or not size:
        return False
    try:
        disk = _disk(one)
        if disk is None or disk != _disk(other):
            return False
        first = _runs(one, start, size)
        return first is not None and first == _runs(other, to, size)
    except OSError:
        return False


def _disk(fd: int) -> object:
    """What counts the blocks of a file: two files' numbers mean the same where this is the same."""
    argument = bytearray(_ARGUMENT_BYTES)
    try:
        fcntl.ioctl(fd, _XFS, argument)
    except OSError:
        fcntl.ioctl(fd, _BTRFS, argument)
        return bytes(
            argument[16:32]
        )  # fsid: of all its disks, and of subvolumes, whose st_dev differs
    argument = bytearray(_ATTRIBUTES_SIZE)
    fcntl.ioctl(fd, _ATTRIBUTES, argument)
    realtime = int.from_bytes(argument[:4], sys.byteorder) & _REALTIME  # a second disk of its own
    return None if realtime else os.fstat(fd).st_dev


def extents(fd: int, start: int, size: int) -> Iterator[Extent]:
    """A file's extents that touch a range, holes left out. Raises OSError where nobody can say."""
    at, end = start, start + size
    while at < end:
        answer = bytearray(_QUERY.size + _ROOM * _EXTENT.size)
        _QUERY.pack_into(answer, 0, at, end - at, _SYNC, 0, _ROOM, 0)
        fcntl.ioctl(fd, _FIEMAP, answer)
        count = _QUERY.unpack_from(answer)[3]
        if not count:
            return
        for number in range(count):
            extent = _EXTENT.unpack_from(answer, _QUERY.size + number * _EXTENT.size)
            yield extent
            at = extent[0] + extent[2]


def _runs(fd: int, start: int, size: int) -> list[BlockRun] | None:
    """Where a range lies, what follows on the disk in one; None where a part has no such place."""
    runs: list[BlockRun] = []
    at, end = start, start + size
    for low, place, length, flags in extents(fd, start, size):
        if flags & ~_PLAIN != SHARED or low > at or low + length <= at:
            return None
        place, length = place + at - low, min(low + length, end) - at
        if runs and runs[-1][1] + runs[-1][2] == place:
            before, place, more = runs.pop()
            runs.append((before, place, more + length))
        else:
            runs.append((at - start, place, length))
        at += length
        if at == end:
            return runs
    return None
