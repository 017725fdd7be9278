"""Reads the directory of a zip file if every reader would read the same one.

Programs find the records of a zip file in different ways. PyTorch's miniz reads the directory at
the offset in the end record, and ignores the case of names. CPython's zipfile reads the directory
right before the end record. Others walk from one local header to the next. If two programs
disagree, a file can show one content to an inspection and another to a loader. So here all
redundant fields must agree, and the records must fill the file without gaps, as in files of
torch.save, Python's zipfile and Info-ZIP.

Source: PKWARE's APPNOTE 6.3; torch's third_party/miniz-3.0.2/miniz.c (older releases: 2.0.8, 2.1.0)
and caffe2/serialize/inline_container.cc; CPython's Lib/zipfile.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from neox_bridge.stores.paths import fetch_places, is_here, is_remote

STORED, DEFLATED = 0, 8  # compression methods, APPNOTE 4.4.5; PyTorch knows no others
HAS_DESCRIPTOR, UTF8 = 0x8, 0x800  # flags, 4.4.4
LOCAL = struct.Struct("<4sHHHHHIIIHH")  # 4.3.7
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")  # 4.3.12
DESCRIPTOR = struct.Struct("<4sIII")  # 4.3.9
DESCRIPTOR64 = struct.Struct("<4sIQQ")
EXTRA = struct.Struct("<HH")  # 4.5.1
U32 = 0xFFFFFFFF  # in a classic field: the real number is in the zip64 field
ALIGNMENT = 64  # bytes, of records of PyTorch

_END = struct.Struct("<4sHHHHIIH")  # 4.3.16
_END64 = struct.Struct("<4sQHHIIQQQQ")  # 4.3.14
_LOCATOR = struct.Struct("<4sIQI")  # 4.3.15
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE = b"PK\x03\x04", b"PK\x01\x02"
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
_END_SIGNATURE, _END64_SIGNATURE, _LOCATOR_SIGNATURE = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_COMMENT_BYTES = 0xFFFF  # the longest comment that can follow an end record
_REMOTE_TAIL_BYTES = 16 << 10  # bytes at the end of an object that are fetched anyway
_MAX_DIRECTORY_BYTES = 8 << 20  # about 100,000 records; files of GPT-NeoX have hundreds
_HEADER_BYTES = 512  # a local header with its name and the padding of PyTorch
_STRANGE = re.compile(r"[\x00-\x1f\\\x7f]")  # in names: control characters and backslashes
_KNOWN_FLAGS = 0x6 | HAS_DESCRIPTOR | UTF8  # 0x6: the level of compression
_FOLDER = 0x10  # external attribute of folders; PyTorch reads such a record as empty
_MAX_NAME_BYTES = 511  # miniz truncates longer names
_ZIP64 = 1


class ZipError(Exception):
    """Two readers could read the zip file differently. The message is a clause that says why."""


class NoDirectory(ZipError):
    """A file has no directory at its end: it is not a zip file, or it is truncated."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in the directory. Sizes and places are in bytes.

    Attributes:
        packed: The size of the record in the file.
        header: Where its local header begins.
    """

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


def read_directory(file: BinaryIO) -> tuple[list[Entry], int]:
    """The records in their order in the file, and where the directory begins.

    Reads only the directory (see ``data_places``). Needs at most about 8 MiB of memory. Raises
    ZipError, or NoDirectory for a file without one.
    """
    count, start, size = _end(file)
    file.seek(start)
    entries = _parse(file.read(size), count, start)
    names: set[str] = set()
    for entry in entries:
        if (name := folded(entry.name)) in names:
            raise ZipError(f"the record {entry.name[:80]!r} appears twice")
        names.add(name)
    return sorted(entries, key=lambda entry: entry.header), start


def data_places(file: BinaryIO, entries: Sequence[Entry], end: int) -> list[int]:
    """Where the bytes of each record begin. Compares the local headers with the directory.

    In a store, each header would be a request, so headers are skipped if the directory gives the
    place in two ways. entries, end: from ``read_directory``.
    """
    counted = _counted(file, entries, end) if is_remote(file) else {}
    starts, free, before = list[int](), 0, None
    for entry in entries:
        if entry.header < free:
            raise ZipError(
                f"the record {entry.name[:80]!r} overlaps another record or extends past the end "
                "of the data"
            )
        if entry.header - free > (DESCRIPTOR64.size if before else 0):
            raise ZipError(f"unknown data precedes the record {entry.name[:80]!r}")
        start = counted.get(entry.header)
        if start is None:
            start = _check_header(file, entry, before, free)
        if start + entry.packed > end:
            raise ZipError(
                f"the record {entry.name[:80]!r} overlaps another record or extends past the end "
                "of the data"
            )
        starts.append(start)
        before, free = entry, start + entry.packed
    if before is None or before.header not in counted:
        file.seek(free)
        _check_gap(file.read(min(max(0, end - free), DESCRIPTOR64.size + 1)), before, free, end)
    return starts


def folded(name: str) -> str:
    """A name as miniz compares it, with ASCII letters in lower case."""
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


# --- the end --------------------------------------------------------------------------------


def _end(file: BinaryIO) -> tuple[int, int, int]:
    """The number of records, the start of the directory, and its size."""
    size = file.seek(0, 2)
    length = min(size, _REMOTE_TAIL_BYTES if is_remote(file) else _END.size + _COMMENT_BYTES)
    file.seek(size - length)
    tail = file.read(length)
    end_at = size - _END.size
    if tail[-_END.size :][:4] != _END_SIGNATURE:
        if _END_SIGNATURE in tail[: -_END.size + 4]:
            raise ZipError("data follows the end of its directory")
        raise NoDirectory("the zip directory at its end is missing")
    _, *disks, here, count, directory, start, comment = _END.unpack(tail[-_END.size :])
    if comment or _other_end(tail):
        raise ZipError("it has more than one end record, or a comment after it")
    wide = _end64(tail, size)
    if wide is not None:
        classic, here, count, directory, start = (here, count, directory, start), *wide
        for narrow, real, most in zip(classic, wide, (0xFFFF, 0xFFFF, U32, U32), strict=True):
            if narrow not in (real, most):
                raise ZipError("its two end records contradict each other")
        end_at -= _LOCATOR.size + _END64.size
    if any(disks) or here != count:
        raise ZipError("it claims to be one part of a multi-part archive")
    if directory > _MAX_DIRECTORY_BYTES:
        raise ZipError("its directory is larger than 8 MiB")
    if start + directory != end_at:
        raise ZipError("its end record does not point to the directory before it")
    return count, start, directory


def _end64(tail: bytes, size: int) -> tuple[int, int, int, int] | None:
    """The end record of zip64: records on this disk, all records, size and place of the directory.

    None if its locator is missing, without which no reader reads it. tail: the last bytes of the
    file.
    """
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if not locator.startswith(_LOCATOR_SIGNATURE):
        return None
    _, disk, place, disks = _LOCATOR.unpack(locator)
    if disk or disks != 1:
        raise ZipError("it claims to be one part of a multi-part archive")
    record = tail[-_END.size - _LOCATOR.size - _END64.size : -_END.size - _LOCATOR.size]
    right = size - _END.size - _LOCATOR.size - _END64.size
    if place != right or not record.startswith(_END64_SIGNATURE):
        raise ZipError("its zip64 locator does not point to the record before it")
    _, length, _, _, disk, first_disk, here, count, directory, start = _END64.unpack(record)
    if length != _END64.size - 12:
        raise ZipError("its zip64 end record has the wrong length")
    if disk or first_disk:
        raise ZipError("it claims to be one part of a multi-part archive")
    return here, count, directory, start


def _other_end(tail: bytes) -> bool:
    """Whether another end record is valid too, with the rest of the file as its comment."""
    at = tail.find(_END_SIGNATURE)
    while 0 <= at < len(tail) - _END.size:
        (comment,) = struct.unpack_from("<H", tail, at + _END.size - 2)
        if at + _END.size + comment == len(tail):
            return True
        at = tail.find(_END_SIGNATURE, at + 1)
    return False


# --- the directory --------------------------------------------------------------------------


def _parse(raw: bytes, count: int, start: int) -> list[Entry]:
    """The entries of the directory. start: its place, before which all headers must be."""
    entries, at = list[Entry](), 0
    while at < len(raw) and len(entries) < count:
        if len(raw) - at < CENTRAL.size or not raw.startswith(_CENTRAL_SIGNATURE, at):
            raise ZipError("its directory is damaged")
        fields = CENTRAL.unpack_from(raw, at)
        _, _, _, flags, method, _, _, crc, packed, size, *lengths = fields[:13]
        disk, _, attributes, header = fields[13:]
        name_size, extra_size, comment_size = lengths
        at += CENTRAL.size
        end = at + name_size + extra_size + comment_size
        if end > len(raw):
            raise ZipError("its directory is damaged")
        name = _name(raw[at : at + name_size], flags)
        extra = raw[at + name_size : at + name_size + extra_size]
        size, packed, header = _widened(name, extra, size, packed, header)
        _check_entry(name, flags, comment_size, disk)
        if (method == STORED and packed != size) or (size and not packed):
            raise ZipError(f"the record {name[:80]!r} has contradictory sizes")
        if (attributes & _FOLDER or name.endswith("/")) and size:
            raise ZipError(f"the record {name[:80]!r} contains data but is marked as a folder")
        if header + LOCAL.size > start:
            raise ZipError(
                f"the record {name[:80]!r} overlaps another record or extends past the end of "
                "the data"
            )
        entries.append(Entry(name, flags, method, crc, packed, size, header))
        at = end
    if at != len(raw) or len(entries) != count:
        raise ZipError("its directory does not have the number of records that it announces")
    return entries


def _name(raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & UTF8 else "ascii")
    except UnicodeDecodeError:
        raise ZipError(f"the name {raw[:80]!r} is not text") from None
    # miniz ends a name at a NUL, and other readers take a backslash as a slash
    if len(raw) > _MAX_NAME_BYTES or _STRANGE.search(name):
        raise ZipError(f"the name {name[:80]!r} is not a name that PyTorch writes")
    return name


def _check_entry(name: str, flags: int, comment_size: int, disk: int) -> None:
    if flags & ~_KNOWN_FLAGS:
        raise ZipError(f"the record {name[:80]!r} is encrypted or has an unknown flag")
    if comment_size:
        raise ZipError(f"the record {name[:80]!r} has a comment")
    if disk:
        raise ZipError("it claims to be one part of a multi-part archive")


def _widened(name: str, extra: bytes, *classic: int) -> tuple[int, ...]:
    """The size, the packed size and the place of the header, with those in the zip64 field.

    The field has, in this order, only the numbers that exceed the classic fields (APPNOTE 4.5.3).
    """
    fields = [data for kind, data in _fields(extra, strict=True) if kind == _ZIP64]
    wide = sum(value == U32 for value in classic)
    if len(fields) != (wide > 0) or (fields and len(fields[0]) != 8 * wide):
        raise ZipError(f"the record {name[:80]!r} has zip64 fields that do not match its sizes")
    if not fields:
        return classic
    numbers = iter(struct.unpack(f"<{wide}Q", fields[0]))
    return tuple(next(numbers) if value == U32 else value for value in classic)


def _fields(extra: bytes, strict: bool = False) -> Iterator[tuple[int, bytes]]:
    """The extra fields. strict: whether other bytes are an error; otherwise they are padding."""
    at = 0
    while len(extra) - at >= EXTRA.size:
        kind, size = EXTRA.unpack_from(extra, at)
        at += EXTRA.size
        if at + size > len(extra):
            break
        yield kind, extra[at : at + size]
        at += size
    else:
        if at == len(extra):
            return
    if strict:
        raise ZipError("its directory is damaged")


# --- local headers --------------------------------------------------------------------------


def _check_header(file: BinaryIO, entry: Entry, before: Entry | None, free: int) -> int:
    """Where the bytes of a record begin, according to its local header.

    before: the record before it. free: where the bytes of that record end.
    """
    gap = entry.header - free
    file.seek(free)
    raw = file.read(gap + LOCAL.size)
    _check_gap(raw[:gap], before, free, entry.header)
    raw = raw[gap:]
    if len(raw) < LOCAL.size or not raw.startswith(_LOCAL_SIGNATURE):
        raise ZipError(f"the record {entry.name[:80]!r} has no local header")
    _, _, flags, method, _, _, crc, packed, size, name_size, extra_size = LOCAL.unpack(raw)
    name, extra = file.read(name_size), file.read(extra_size)
    later = bool(flags & HAS_DESCRIPTOR)  # the numbers may be 0 here
    numbers = _local_numbers(extra, size, packed)
    right = (
        name == entry.name.encode()
        and (flags, method) == (entry.flags, entry.method)
        and (crc == entry.crc or (later and not crc))
        and all(
            here == there or (later and not here)
            for here, there in zip(numbers, (entry.size, entry.packed), strict=True)
        )
    )
    if not right or len(extra) < extra_size:
        raise ZipError(f"the record {entry.name[:80]!r} does not match the directory")
    return entry.header + LOCAL.size + len(name) + len(extra)


def _local_numbers(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    """The size and the packed size in a local header."""
    for kind, data in _fields(extra):
        if kind == _ZIP64 and len(data) >= 16 and U32 in (size, packed):
            size, packed = struct.unpack_from("<2Q", data)
    return size, packed


def _check_gap(raw: bytes, before: Entry | None, start: int, end: int) -> None:
    """Raise ZipError unless only a data descriptor follows the bytes of a record."""
    if start == end and (before is None or not before.flags & HAS_DESCRIPTOR or not before.size):
        return
    if before is not None and before.flags & HAS_DESCRIPTOR and len(raw) == end - start:
        layout = {DESCRIPTOR.size: DESCRIPTOR, DESCRIPTOR64.size: DESCRIPTOR64}.get(len(raw))
        right = (_DESCRIPTOR_SIGNATURE, before.crc, before.packed, before.size)
        if layout is not None and layout.unpack(raw) == right:
            return
    behind = f"the record {before.name[:80]!r}" if before else "its start"
    raise ZipError(f"the data after {behind} does not match the directory")


def _counted(file: BinaryIO, entries: Sequence[Entry], end: int) -> dict[int, int]:
    """Where the bytes of an object's records begin, if that follows from the places of headers.

    Only the local headers contain it, and reading one is a request. But PyTorch leaves no gaps
    between records and starts each at the first possible multiple of 64
    (caffe2/serialize/inline_container.cc, getPadding). So the place is computed backward from the
    next record and forward from the header. If both agree, the header is not read.
    """
    places = {}
    ends = [*(entry.header for entry in entries[1:]), end]
    for entry, then in zip(entries, ends, strict=True):
        if then >= U32 or is_here(file, entry.header, _HEADER_BYTES):
            continue
        descriptor = DESCRIPTOR.size if entry.flags & HAS_DESCRIPTOR and entry.size else 0
        start = then - descriptor - entry.packed
        least = entry.header + LOCAL.size + len(entry.name.encode()) + EXTRA.size
        if start == (least + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT:
            places[entry.header] = start
    unsure = [max(0, e.header - DESCRIPTOR64.size) for e in entries if e.header not in places]
    fetch_places(file, unsure, _HEADER_BYTES)
    return places
