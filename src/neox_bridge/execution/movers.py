"""Copies unchanged bytes: by sharing blocks, through the kernel, or else through a buffer."""

import errno
import fcntl
import os
import struct
import sys
from typing import TYPE_CHECKING, TypeAlias

from zlib_ng.zlib_ng import crc32

from neox_bridge.execution import buffers
from neox_bridge.execution.context import Context, Disks, Shared
from neox_bridge.execution.files import ended_early, unreadable
from neox_bridge.tensors.sharing import BLOCK_BYTES, LEAST_SHARED_BYTES, whole_blocks

if TYPE_CHECKING:
    from neox_bridge.execution.streams import Stream
    from neox_bridge.stores.ranges import Remote

CHUNK_BYTES = 16 << 20  # per kernel copy, so that progress is updated and Ctrl-C works
BUFFER_BYTES = 1 << 20
# a file descriptor, all bytes of a small file, or an object of a store
Target: TypeAlias = "int | memoryview | Stream"
SEND_BYTES = 1 << 20  # smaller amounts wait until more is written
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLONE = getattr(fcntl, "FICLONERANGE", 0x4020940D)  # linux/fs.h; in fcntl since Python 3.12
_RANGE = struct.Struct("qQQQ")  # struct file_clone_range: fd, offset, length, offset in the target
_NEVER = {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


def move(
    source: str, start: int, target: Target, to: int, size: int, context: Context, crc: int | None
) -> int | None:
    """Copy ``size`` bytes of a file to a target; all numbers are bytes.

    crc: the CRC-32 of the preceding bytes of the record, or None if not needed. Returns the CRC-32
    including these bytes, or None if the kernel copied bytes without reading them; with
    ``every_crc``, all bytes are read. Raises BridgeError if the source is too short or cannot be
    read.
    """
    see = crc is not None and context.every_crc
    with context.files.reading(source) as fd:
        if not isinstance(target, int) or not isinstance(fd, int) or size < LEAST_SHARED_BYTES:
            return _buffered(fd, source, (start, to, size), target, context, crc)
        low, high = _clone(fd, source, start, target, to, size, context)
        for begin, end, shared in ((0, low, False), (low, high, True), (high, size, False)):
            at, count = start + begin, end - begin
            if shared and count:
                crc = _sum(fd, source, (at, count), context, crc) if see else None
                continue
            done = 0 if see else _kernel(fd, at, target, to + begin, count, context)
            crc = None if done else crc
            span = (at + done, to + begin + done, count - done)
            crc = _buffered(fd, source, span, target, context, crc)
    return crc


def can_share(source: str, folder: str, context: Context) -> bool:
    """Whether new files in a folder can share blocks with a file; tried once per pair of disks."""
    import tempfile

    if sys.platform != "linux":
        return False
    try:
        disks = os.stat(source).st_dev, os.stat(folder).st_dev
        if disks in context.sharing:
            return context.sharing[disks]
        with open(source, "rb") as file, tempfile.TemporaryFile(dir=folder) as trial:
            argument = _RANGE.pack(file.fileno(), 0, BLOCK_BYTES, 0)
            if _ask_to_clone(trial.fileno(), argument, disks, context):
                context.sharing[disks] = True
    except OSError:
        return False
    return context.sharing.get(disks, False)


def write(target: Target, data: "bytes | memoryview", to: int) -> None:
    """pwrite until all is written. Large data is sent to the disk soon."""
    if isinstance(target, memoryview):
        target[to : to + len(data)] = data
        return
    if not isinstance(target, int):
        target.write(data, to)
        return
    view, at = memoryview(data), to
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count
    send(target, to, at - to)


def send(target: int, to: int, size: int, least: int = SEND_BYTES) -> None:
    """Start writing these bytes to disk, so that fsync waits less.

    POSIX_FADV_DONTNEED does this for dirty pages, which stay in memory for the next reader (Linux's
    mm/fadvise.c; a third of the time of a copy, measured).
    """
    if size >= least and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target, to, size, os.POSIX_FADV_DONTNEED)


def read(fd: "int | Remote", path: str, buffer: memoryview, start: int) -> None:
    """Fill a buffer from an offset in a file. Raises BridgeError if that fails."""
    while buffer:
        try:
            count = (
                os.preadv(fd, [buffer], start)
                if isinstance(fd, int)
                else fd.read_into(buffer, start)
            )
        except OSError as error:
            raise unreadable(path, error) from None
        if not count:
            raise ended_early(path, len(buffer))
        buffer, start = buffer[count:], start + count


def _clone(
    fd: int, source: str, start: int, target: int, to: int, size: int, context: Context
) -> tuple[int, int]:
    """(begin, end) of the bytes, counted from ``start``, whose blocks both files now share.

    Only whole blocks can be shared, if both files have them at the same offset within a block.
    Otherwise returns (0, 0), and remembers refusals that would recur.
    """
    low, high = whole_blocks(start, to, size)
    if low == high or sys.platform != "linux":
        return 0, 0
    status = os.fstat(target)
    disks = os.fstat(fd).st_dev, status.st_dev
    if context.sharing.get(disks) is False:
        return 0, 0
    argument = _RANGE.pack(fd, start + low, high - low, to + low)
    if not _ask_to_clone(target, argument, disks, context):
        return 0, 0
    part = Shared(to + low, high - low, source, start + low)
    context.share((status.st_dev, status.st_ino), part)
    return low, high


def _ask_to_clone(target: int, argument: bytes, disks: Disks, context: Context) -> bool:
    """Whether the file system cloned the range. Raises OSError if the disk is full."""
    try:
        fcntl.ioctl(target, _CLONE, argument)
    except OSError as error:
        if error.errno in _FULL:
            raise
        if error.errno in _NEVER:
            context.sharing[disks] = False
        return False
    return True


def _kernel(fd: int, start: int, target: int, to: int, size: int, context: Context) -> int:
    """The number of bytes that the kernel copied: all, or those before it refused.

    It may refuse with EXDEV, ENOSYS, EINVAL, EOPNOTSUPP, EPERM, or EIO for a failing disk. In the
    last case, the buffered copy finds out whether the source or the target fails.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < size:
        context.check()
        step = min(CHUNK_BYTES, size - done)
        try:
            count = os.copy_file_range(fd, target, step, start + done, to + done)
        except OSError as error:
            if error.errno in _FULL:
                raise
            return done
        if count == 0:  # end of the source, or a special file
            return done
        send(target, to + done, count)
        done += count
        context.wrote(count, "copied")
    return done


def _buffered(
    fd: "int | Remote",
    source: str,
    span: tuple[int, int, int],
    target: Target,
    context: Context,
    crc: int | None,
) -> int | None:
    start, to, size = span
    if isinstance(target, memoryview):
        context.check()
        data = target[to : to + size]
        read(fd, source, data, start)
        context.wrote(size, "copied")
        return None if crc is None else crc32(data, crc)
    buffer = memoryview(buffers.buffer(3, BUFFER_BYTES))
    while size:
        context.check()
        data = buffer[: min(BUFFER_BYTES, size)]
        read(fd, source, data, start)
        write(target, data, to)
        if crc is not None:
            crc = crc32(data, crc)
        context.wrote(len(data), "copied")
        start, to, size = start + len(data), to + len(data), size - len(data)
    return crc


def _sum(
    fd: int, source: str, span: tuple[int, int], context: Context, crc: int | None
) -> int | None:
    """Read bytes of the source that were not read yet, and add them to a CRC-32."""
    start, size = span
    buffer = memoryview(buffers.buffer(3, BUFFER_BYTES))
    while crc is not None and size:
        context.check()
        data = buffer[: min(BUFFER_BYTES, size)]
        read(fd, source, data, start)
        crc, start, size = crc32(data, crc), start + len(data), size - len(data)
    return crc
