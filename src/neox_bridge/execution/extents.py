"""Finds out whether two files share disk blocks, by asking the file system."""

import fcntl
import os
import struct
import sys
from collections.abc import Iterator

_FIEMAP = 0xC020660B  # linux/fs.h, Documentation/filesystems/fiemap.rst
_QUERY = struct.Struct("QQIIII")  # struct fiemap: start, length, flags, found, room
_EXTENT = struct.Struct("QQQ16xI12x")  # struct fiemap_extent: in the file, on the disk, length
_ROOM = 128  # extents per request
_SYNC = 1  # flush first, so that data that exists only in memory gets its own blocks
_PLAIN = 0x1 | 0x1000  # LAST, MERGED: flags that do not concern the location of bytes
SHARED = 0x2000  # shared with another file
_XFS = 0x8100587E  # XFS_IOC_FSGEOMETRY
_ATTRIBUTES, _ATTRIBUTES_SIZE, _REALTIME = 0x801C581F, 28, 0x1  # FS_IOC_FSGETXATTR
_BTRFS = 0x8400941F  # BTRFS_IOC_FS_INFO
_ARGUMENT_BYTES = 1024  # the size of the largest structure that these three fill

Extent = tuple[int, int, int, int]  # offset in the file, place on the disk, bytes, flags
BlockRun = tuple[int, int, int]  # offset in the range, place on the disk, bytes


def same_blocks(one: int, start: int, other: int, to: int, size: int) -> bool:
    """Whether ``size`` bytes of two files (descriptors) at these offsets are the same blocks.

    If so, the bytes are equal and need not be read. False means unknown: other file systems do not
    report it reliably (on bcachefs, each of several disks counts its blocks from 0), and compressed
    or encrypted blocks are not comparable.
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
    """Identify the block numbering of a file. Block numbers are comparable only if it is equal."""
    argument = bytearray(_ARGUMENT_BYTES)
    try:
        fcntl.ioctl(fd, _XFS, argument)
    except OSError:
        fcntl.ioctl(fd, _BTRFS, argument)
        return bytes(
            argument[16:32]
        )  # the fsid covers all disks and subvolumes, whose st_dev differ
    argument = bytearray(_ATTRIBUTES_SIZE)
    fcntl.ioctl(fd, _ATTRIBUTES, argument)
    realtime = int.from_bytes(argument[:4], sys.byteorder) & _REALTIME  # XFS realtime device
    return None if realtime else os.fstat(fd).st_dev


def extents(fd: int, start: int, size: int) -> Iterator[Extent]:
    """The extents of a file that touch a range, without holes. Raises OSError if unknown."""
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
    """The places of a range on disk, adjacent ones merged; None if any place is unknown."""
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
