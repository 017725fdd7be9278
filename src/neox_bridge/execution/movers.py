"""Moves bytes that stay as they are: through the kernel where it can, else through a buffer."""

import errno
import os
import zlib

from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context

CHUNK = 64 << 20  # of one kernel copy, so that progress moves and Ctrl-C is heard
BUFFER = 4 << 20
# the kernel or the file systems can't do it for this pair of files: a buffer can
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def move(
    source: str, start: int, target: int, to: int, size: int, context: Context, crc: int | None
) -> int | None:
    """Copy ``size`` bytes of a file to an open one; all numbers are bytes.

    crc: the CRC-32 of what precedes them in the record. Returns it with these bytes added, or
    None where the kernel moved bytes that this process didn't see.
    """
    fd = os.open(source, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        done = _kernel(fd, start, target, to, size, context)
        if done == size:
            return None if size else crc
        if done:
            crc = None
        return _buffered(fd, source, (start + done, to + done, size - done), target, context, crc)
    finally:
        os.close(fd)


def write(target: int, data: "bytes | memoryview", to: int) -> None:
    """pwrite until all is written."""
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, to)
        view, to = view[count:], to + count


def _kernel(fd: int, start: int, target: int, to: int, size: int, context: Context) -> int:
    """How many bytes the kernel moved: all, or those before it said that it can't."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < size:
        context.check()
        step = min(CHUNK, size - done)
        try:
            count = os.copy_file_range(fd, target, step, start + done, to + done)
        except OSError as error:
            if error.errno in _CANNOT:
                return done
            raise
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
    while size:
        context.check()
        data = os.pread(fd, min(BUFFER, size), start)
        if not data:
            raise BridgeError(f"{source} ended {size} bytes early: it changed while it was read.")
        write(target, data, to)
        if crc is not None:
            crc = zlib.crc32(data, crc)
        context.wrote(len(data), changed=False)
        start, to, size = start + len(data), to + len(data), size - len(data)
    return crc
