"""The directory of a zip file, read within bounds: none of what it says of itself is trusted."""

import struct
import zipfile
from typing import BinaryIO, cast

_MOST = 8 << 20  # bytes: some 100,000 records, where GPT-NeoX's files have hundreds
_BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error)


class _Sipped:
    """A file of which nobody reads much at once, since zipfile reads as much as it is told."""

    def __init__(self, file: BinaryIO) -> None:
        self._read, self.seek, self.tell = file.read, file.seek, file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._read(_MOST + 1 if size < 0 else min(size, _MOST + 1))
        if len(data) > _MOST:
            raise zipfile.BadZipFile("too large")
        return data


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """The archive, its directory read. file: stays the caller's.

    Raises zipfile.BadZipFile, the only exception, for a directory that is damaged, absent or
    larger than 8 MiB.
    """
    try:
        return zipfile.ZipFile(cast(BinaryIO, _Sipped(file)))
    except _BROKEN as error:
        raise zipfile.BadZipFile(str(error)) from None
