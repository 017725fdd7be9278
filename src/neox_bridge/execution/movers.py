"""Moves bytes that stay as they are: through the kernel where it can, else through a buffer."""

import errno
import os
import zlib

from neox_bridge.execution.context import Context
from neox_bridge.execution.files import ended_early, unreadable

CHUNK = 64 << 20  # of one kernel copy, so that progress moves and Ctrl-C is heard
BUFFER = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def move(
    source: str, start: int, target: int, to: int, size: int, context: Context, crc: int | None
) -> int | None:
    """Copy ``size`` bytes of a file to an open one; all numbers are bytes.

    crc: the CRC-32 of what precedes them in the record, or None where nobody asks for it. Returns
    it with these bytes added, or None where the kernel moved bytes that this process didn't see.
    Raises BridgeError, naming the source, where it is too short or can't be read.
    """
    # room for a reflink (FICLONERANGE): one more way to be tried first, like _kernel
    with context.files.reading(source) as fd:
        done = _kernel(fd, start, target, to, size, context)
        if done:
            crc = None
        span = (start + done, to + done, size - done)
        return _buffered(fd, source, span, target, context, crc)


def write(target: int, data: "bytes | memoryview", to: int) -> None:
    """pwrite until all is written."""
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, to)
        view, to = view[count:], to + count


def read(fd: int, path: str, buffer: memoryview, start: int) -> None:
    """Fill a buffer from a place in a file. Raises BridgeError, naming it, where that fails."""
    while buffer:
        try:
            count = os.preadv(fd, [buffer], start)
        except OSError as error:
            raise unreadable(path, error) from None
        if not count:
            raise ended_early(path, len(buffer))
        buffer, start = buffer[count:], start + count


def _kernel(fd: int, start: int, target: int, to: int, size: int, context: Context) -> int:
    """How many bytes the kernel moved: all, or those before it said that it can't.

    Besides EXDEV, ENOSYS, EINVAL, EOPNOTSUPP and EPERM that may be a broken disk (EIO), of which
    the buffered way finds out whether it is the source's or the target's.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < size:
        context.check()
        step = min(CHUNK, size - done)
        try:
            count = os.copy_file_range(fd, target, step, start + done, to + done)
        except OSError as error:
            if error.errno in _FULL:
                raise
            return done
        if count == 0:  # end of the source, or a file system that answers so for special files
            return done
        done += count
        context.wrote(count, changed=False)
    return done


def _buffered(
    fd: int,
    source: str,
    span: tuple[int, int, int],
    target: int,
    context: Context,
    crc: int | None,
) -> int | None:
    start, to, size = span
    buffer = memoryview(bytearray(min(BUFFER, size)))
    while size:
        context.check()
        data = buffer[: min(BUFFER, size)]
        read(fd, source, data, start)
        write(target, data, to)
        if crc is not None:
            crc = zlib.crc32(data, crc)
        context.wrote(len(data), changed=False)
        start, to, size = start + len(data), to + len(data), size - len(data)
    return crc
