"""The directory of a zip file, read within bounds: none of what it says of itself is trusted."""

import struct
import zipfile
from collections.abc import Sequence
from typing import BinaryIO, cast

_MOST = 8 << 20  # bytes: some 100,000 records, where GPT-NeoX's files have hundreds
_LOCAL, _EXTRA, _DESCRIPTOR = 30, 4, 16  # bytes; APPNOTE 4.3.7, 4.5.1, 4.3.9
_ENCRYPTED, _HAS_DESCRIPTOR = 1, 8  # flags, 4.4.4
_ALIGNMENT = 64
_U32 = 0xFFFFFFFF  # beyond, headers have other sizes
_BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error)


def data_starts(infos: Sequence[zipfile.ZipInfo], end: int) -> dict[int, tuple[int, bool]]:
    """Where records' bytes seem to begin, and if two ways agree, by where their headers do.

    Only the headers themselves say it, which for a file in a store is a request each. But torch
    puts nothing between records and starts each at the first multiple of 64 that it can
    (caffe2/serialize/inline_container.cc, getPadding): the place is counted back from the next
    record, and forward from the header. Records that are too large for that, or packed, aren't in
    the result. infos: in the order of their headers. end: where the directory begins.
    """
    found = {}
    ends = [*(info.header_offset for info in infos[1:]), end]
    for info, then in zip(infos, ends, strict=True):
        plain = info.compress_size == info.file_size and not info.flag_bits & _ENCRYPTED
        if not plain or not info.filename.isascii() or then >= _U32:
            continue
        descriptor = _DESCRIPTOR if info.flag_bits & _HAS_DESCRIPTOR and info.file_size else 0
        start = then - descriptor - info.file_size
        least = info.header_offset + _LOCAL + len(info.orig_filename) + _EXTRA
        forward = (least + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        found[info.header_offset] = start, start == forward
    return found


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
