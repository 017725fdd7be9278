"""Zips on which two readers disagree, each with its name; made field by field.

What runs under an ordinary unpickler is ``EVIL``: it makes an empty folder CANARY where it is run.
"""

import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attack_torch import PICKLE

CANARY = "canary"
EVIL = b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(CANARY)) + CANARY.encode() + b"\x85R."
U32 = 0xFFFFFFFF


@dataclass
class Part:
    """A record. local, central: fields that say something else than what is so.

    descriptor: bytes behind the data; None for none.
    """

    name: bytes
    data: bytes
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)
    flags: int = 0
    descriptor: bytes | None = None
    before: bytes = b""


def _fields(part: Part, header: int, changes: dict[str, Any]) -> dict[str, Any]:
    size = len(part.data)
    plain = {"name": part.name, "flags": part.flags, "method": 0, "crc": zlib.crc32(part.data)}
    plain |= {"packed": size, "size": size, "extra": b"", "comment": b"", "disk": 0}
    return plain | {"attributes": 0, "header": header} | changes


def local(part: Part) -> bytes:
    f = _fields(part, 0, part.local)
    numbers = (20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
    sizes = len(f["name"]), len(f["extra"])
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *numbers, *sizes) + f["name"] + f["extra"]


def central(part: Part, header: int) -> bytes:
    f = _fields(part, header, part.central)
    numbers = (20, 20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
    sizes = len(f["name"]), len(f["extra"]), len(f["comment"])
    rest = f["disk"], 0, f["attributes"], f["header"]
    head = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *numbers, *sizes, *rest)
    return bytes(head + f["name"] + f["extra"] + f["comment"])


def body(parts: Sequence[Part], start: int = 0) -> tuple[bytes, list[int]]:
    """The records, and where their headers lie. start: how much lies before them."""
    raw, places = b"", []
    for part in parts:
        raw += part.before
        places.append(start + len(raw))
        raw += local(part) + part.data + (part.descriptor or b"")
    return raw, places


def directory(parts: Sequence[Part], places: Sequence[int]) -> bytes:
    return b"".join(central(part, at) for part, at in zip(parts, places, strict=True))


def end(count: int, size: int, at: int, comment: bytes = b"", /, **changes: int) -> bytes:
    f = {"disk": 0, "first": 0, "here": count, "count": count, "size": size, "at": at} | changes
    length = changes.get("comment_size", len(comment))
    numbers = (f["disk"], f["first"], f["here"], f["count"], f["size"], f["at"], length)
    return struct.pack("<4sHHHHIIH", b"PK\5\6", *numbers) + comment


def end64(count: int, size: int, at: int, /, **changes: int) -> bytes:
    f = {"length": 44, "disk": 0, "first": 0, "here": count, "count": count} | changes
    f = {"size": size, "at": at} | f
    return struct.pack(
        "<4sQHHIIQQQQ", b"PK\6\6", f["length"], 45, 45, f["disk"], f["first"], f["here"],
        f["count"], f["size"], f["at"],
    )  # fmt: skip


def locator(at: int, disk: int = 0, disks: int = 1) -> bytes:
    return struct.pack("<4sIQI", b"PK\6\7", disk, at, disks)


def parts(pickled: bytes = PICKLE, **changes: Part) -> list[Part]:
    """The records of a small file of torch. changes: other ones in their places."""
    plain = {
        "pickle": Part(b"x/data.pkl", pickled),
        "order": Part(b"x/byteorder", b"little"),
        "tensor": Part(b"x/data/0", bytes(16)),
        "version": Part(b"x/version", b"3\n"),
    }
    return list((plain | changes).values())


def built(records: Sequence[Part], behind: bytes = b"", **changes: int) -> bytes:
    """A zip. behind: what lies between the directory and its end. changes: of the end record."""
    raw, places = body(records)
    entries = directory(records, places)
    return raw + entries + behind + end(len(records), len(entries), len(raw), **changes)


def _zip64(records: Sequence[Part], *, narrow: dict[str, int] | None = None, **wide: int) -> bytes:
    raw, places = body(records)
    entries = directory(records, places)
    numbers = len(records), len(entries), len(raw)
    at = len(raw + entries)
    return raw + entries + end64(*numbers, **wide) + locator(at) + end(*numbers, **(narrow or {}))


def two_directories(first: bytes, second: bytes) -> bytes:
    """The end record names the first directory, and the second lies right before the end."""
    both = [Part(b"x/data.pkl", first), Part(b"x/data.pkl", second), *parts()[1:]]
    raw, places = body([Part(b"x/.pad", bytes(1000)), *both])
    places = places[1:]
    one = directory([both[0], *both[2:]], [places[0], *places[2:]])
    shift = len(one)
    two = directory([both[1], *both[2:]], [at - shift for at in (places[1], *places[2:])])
    return raw + one + two + end(len(both) - 1, len(one), len(raw))


def two_ends64(first: bytes, second: bytes) -> bytes:
    """The locator names the first zip64 end record, and the second lies right before it."""
    both = [Part(b"x/data.pkl", first), Part(b"x/data.pkl", second), *parts()[1:]]
    raw, places = body(both)
    one = directory([both[0], *both[2:]], [places[0], *places[2:]])
    two = directory([both[1], *both[2:]], [places[1], *places[2:]])
    count = len(both) - 1
    head = raw + one + end64(count, len(one), len(raw))
    second_end = end64(count, len(two), len(head)) + locator(len(raw + one))
    return head + two + second_end + end(count, len(two), len(head))


def _extra(kind: int, data: bytes) -> bytes:
    return struct.pack("<HH", kind, len(data)) + data


def _wide(*numbers: int) -> bytes:
    return _extra(1, struct.pack(f"<{len(numbers)}Q", *numbers))


def _tensor(**changes: Any) -> bytes:
    """The tensor's record with other fields."""
    return built(parts(tensor=Part(b"x/data/0", bytes(16), **changes)))


def _with(*more: Part) -> bytes:
    return built([*parts(), *more])


def _descriptor(data: bytes, **changes: int) -> bytes:
    f = {"crc": zlib.crc32(data), "packed": len(data), "size": len(data)} | changes
    return b"PK\7\10" + struct.pack("<III", *f.values())


def _described(descriptor: bytes | None, flags: int = 8, **local_changes: int) -> bytes:
    zeros = {"crc": 0, "packed": 0, "size": 0} | local_changes
    data = bytes(range(16))
    return built(parts(tensor=Part(b"x/data/0", data, zeros, flags=flags, descriptor=descriptor)))


def _cut(raw: bytes, at: int, count: int) -> bytes:
    return raw[:at] + raw[at + count :]


def _fake_end_in_data() -> bytes:
    """An end record inside the last tensor whose comment is all that follows it."""
    inner = parts(EVIL)
    raw, places = body(inner)
    entries = directory(inner, places)
    fake = end(len(inner), len(entries), 0)
    tail = Part(b"x/zz", raw + entries + fake)
    whole = built([*parts(), tail])
    at = whole.index(fake)
    comment = len(whole) - at - 22
    return whole[: at + 20] + struct.pack("<H", comment) + whole[at + 22 :]


GOOD_PICKLE = pickle.dumps({"a": 1}, 2)
# what torch or another program writes, and everybody reads alike
SOUND: dict[str, Callable[[], bytes]] = {
    "plain": lambda: built(parts()),
    "zip64": lambda: _zip64(parts()),
    "zip64, saturated": lambda: _zip64(
        parts(), narrow={"here": 0xFFFF, "count": 0xFFFF, "size": U32, "at": U32}
    ),
    "a descriptor": lambda: _described(_descriptor(bytes(range(16)))),
    "a descriptor of 64 bits": lambda: _described(
        b"PK\7\10" + struct.pack("<IQQ", zlib.crc32(bytes(range(16))), 16, 16)
    ),
    "no descriptor of nothing": lambda: _with(Part(b"x/data/1", b"", flags=8)),
    "a descriptor of nothing": lambda: _with(
        Part(b"x/data/1", b"", flags=8, descriptor=_descriptor(b""))
    ),
    "padding": lambda: _tensor(local={"extra": _extra(0x4246, b"Z" * 40)}),
    "times": lambda: _tensor(
        local={"extra": _extra(0x5455, bytes(9))}, central={"extra": _extra(0x5455, bytes(5))}
    ),
    "zip64 in the local header": lambda: _tensor(
        local={"packed": U32, "size": U32, "extra": _wide(16, 16)}
    ),
    "zip64 in the directory": lambda: _tensor(
        central={"packed": U32, "size": U32, "extra": _wide(16, 16)}
    ),
    "a folder": lambda: built([Part(b"x/", b"", central={"attributes": 0x10}), *parts()]),
    "another order in the directory": lambda: _reordered(),
    "an end record in a tensor": lambda: built(
        parts(tensor=Part(b"x/data/0", bytes(10) + b"PK\5\6" + bytes(60)))
    ),
}


def _reordered() -> bytes:
    records = parts()
    raw, places = body(records)
    entries = directory(records[::-1], places[::-1])
    return raw + entries + end(len(records), len(entries), len(raw))


DISAGREED: dict[str, Callable[[], bytes]] = {
    "two directories, torch's runs": lambda: two_directories(EVIL, GOOD_PICKLE),
    "two directories, Python's runs": lambda: two_directories(GOOD_PICKLE, EVIL),
    "two zip64 ends, torch's runs": lambda: two_ends64(EVIL, GOOD_PICKLE),
    "two zip64 ends, Python's runs": lambda: two_ends64(GOOD_PICKLE, EVIL),
    "two tensors": lambda: _two_tensors(),
    "something before": lambda: _shifted(b"PK\3\4" + bytes(60)),
    "something behind the directory": lambda: built(parts(), b"\0"),
    "something behind the end": lambda: built(parts()) + b"\0" * 30,
    "a zip behind": lambda: built(parts()) + built(parts(EVIL)),
    "a comment": lambda: built(parts())[:-2] + b"\x05\0hello",
    "a comment that isn't there": lambda: built(parts(), comment_size=5),
    "a comment that is an end": lambda: _ended_twice(),
    "an end record in a record": _fake_end_in_data,
    "a record between": lambda: built([*parts(), Part(b"x/a", b"1", before=b"\0" * 8)]),
    "a record that only walking finds": lambda: _hidden(),
    "more entries than the end says": lambda: _counted(-1),
    "fewer entries than the end says": lambda: _counted(1),
    "no entries, says the end": lambda: _counted(-4),
    "a directory that is cut": lambda: _sized(-10),
    "a directory that is longer": lambda: _sized(10),
    "several disks": lambda: built(parts(), disk=1, first=1),
    "the directory on another disk": lambda: built(parts(), first=1),
    "records on another disk": lambda: built(parts(), here=3),
    "a record on another disk": lambda: _tensor(central={"disk": 1}),
    "a zip64 locator of several disks": lambda: _zip64(parts()).replace(
        b"\x01\0\0\0PK\5\6", b"\x02\0\0\0PK\5\6"
    ),
    "a zip64 locator that leads elsewhere": lambda: _located(-1),
    "a zip64 locator without a record": lambda: _located(None),
    "a zip64 end that is longer": lambda: _zip64(parts(), length=45),
    "a zip64 end that is shorter": lambda: _zip64(parts(), length=43),
    "zip64 ends of other counts": lambda: _zip64(parts(), narrow={"here": 3, "count": 3}),
    "zip64 ends of other places": lambda: _zip64(parts(), narrow={"at": 7}),
    "zip64 ends of other sizes": lambda: _zip64(parts(), narrow={"size": 46}),
    "a zip64 end of another disk": lambda: _zip64(parts(), disk=1, first=1),
    "zip64 without need": lambda: _tensor(central={"extra": _wide(16)}),
    "a zip64 field of another place": lambda: _tensor(
        central={"size": U32, "packed": U32, "extra": _wide(16, 16, 7)}
    ),
    "two zip64 fields": lambda: _tensor(
        central={"size": U32, "packed": U32, "extra": _wide(16, 16) + _wide(8, 8)}
    ),
    "a cut zip64 field": lambda: _tensor(
        central={"size": U32, "packed": U32, "extra": _wide(16, 16)[:-4]}
    ),
    "no zip64 field": lambda: _tensor(central={"size": U32, "packed": U32}),
    "other zip64 sizes in the local header": lambda: _tensor(
        local={"size": U32, "packed": U32, "extra": _wide(8, 8)}
    ),
    "another name": lambda: _tensor(local={"name": b"x/data/7"}),
    "another case of the name": lambda: _tensor(local={"name": b"x/DATA/0"}),
    "a longer name": lambda: _tensor(local={"name": b"x/data/00"}),
    "another size": lambda: _tensor(local={"size": 4}),
    "another packed size": lambda: _tensor(local={"packed": 4}),
    "a size of 0 without a descriptor": lambda: _tensor(local={"size": 0, "packed": 0}),
    "another method": lambda: _tensor(local={"method": 8}),
    "other flags": lambda: _tensor(local={"flags": 2048}),
    "another checksum": lambda: _tensor(local={"crc": 1}),
    "a checksum of 0": lambda: built(parts(tensor=Part(b"x/data/0", b"1" * 16, local={"crc": 0}))),
    "encrypted": lambda: _tensor(local={"flags": 1}, central={"flags": 1}),
    "encrypted, says the directory": lambda: _tensor(central={"flags": 1}),
    "strongly encrypted": lambda: _tensor(local={"flags": 64}, central={"flags": 64}),
    "a patch": lambda: _tensor(local={"flags": 32}, central={"flags": 32}),
    "masked headers": lambda: _tensor(local={"flags": 8192}, central={"flags": 8192}),
    "two sizes": lambda: _tensor(local={"size": 8}, central={"size": 8}),
    "a folder with bytes": lambda: _tensor(central={"attributes": 0x10}),
    "a folder's name with bytes": lambda: _with(Part(b"x/data/1/", b"1")),
    "another place": lambda: _tensor(central={"header": 0}),
    "a place in the directory": lambda: _tensor(central={"header": 400}),
    "a descriptor of another checksum": lambda: _described(_descriptor(bytes(range(16)), crc=1)),
    "a descriptor of another size": lambda: _described(_descriptor(bytes(range(16)), size=15)),
    "a descriptor of another packed size": lambda: _described(
        _descriptor(bytes(range(16)), packed=15)
    ),
    "no descriptor": lambda: _described(None),
    "a descriptor without a signature": lambda: _described(_descriptor(bytes(range(16)))[4:]),
    "a descriptor that no flag tells": lambda: _tensor(descriptor=_descriptor(bytes(16))),
    "a name twice": lambda: _with(Part(b"x/data/0", b"1" * 16)),
    "a pickle twice": lambda: _with(Part(b"x/data.pkl", EVIL)),
    "a pickle twice, by case": lambda: _with(Part(b"x/DATA.PKL", EVIL)),
    "a tensor twice, by case": lambda: _with(Part(b"x/Data/0", b"1" * 16)),
    "a pickle up to a NUL": lambda: built([Part(b"x/data.pkl\0", EVIL), *parts()]),
    "a backslash": lambda: _with(Part(b"x\\data.pkl", EVIL)),
    "a line end in a name": lambda: _with(Part(b"x/a\nb", b"1")),
    "a name that isn't UTF-8": lambda: _with(Part(b"x/\xff", b"1", flags=2048)),
    "a name of another code page": lambda: _with(Part(b"x/\xe9", b"1")),
    "a name of 600 bytes": lambda: _with(Part(b"x/" + b"n" * 600, b"1")),
    "a record with a comment": lambda: _tensor(central={"comment": b"hello"}),
    "an extra field that is cut": lambda: _tensor(central={"extra": b"\x55\x54\xff\0x"}),
    "half an extra field": lambda: _tensor(central={"extra": b"\x55\x54\x01"}),
}


def _two_tensors() -> bytes:
    """Two directories that differ in the bytes of a tensor."""
    records = [*parts(), Part(b"x/data/0", b"1" * 16)]
    raw, places = body([Part(b"x/.pad", bytes(1000)), *records])
    places = places[1:]
    one = directory(records[:-1], places[:-1])
    swapped = [*records[:2], records[4], records[3]]
    two = directory(swapped, [at - len(one) for at in (*places[:2], places[4], places[3])])
    return raw + one + two + end(4, len(one), len(raw))


def _shifted(before: bytes) -> bytes:
    """Something before the first record, which all offsets know of."""
    raw, places = body(parts(), len(before))
    entries = directory(parts(), places)
    return before + raw + entries + end(4, len(entries), len(before + raw))


def _ended_twice() -> bytes:
    raw, places = body(parts())
    evil, more = body(parts(EVIL), len(raw))
    entries, others = directory(parts(), places), directory(parts(EVIL), more)
    head = raw + evil + others + entries
    inner = end(4, len(entries), len(head) - len(entries))
    return head + end(4, len(others), len(raw + evil), inner)


def _hidden() -> bytes:
    """A record that has a local header and isn't in the directory."""
    records = [parts()[0], Part(b"x/data.pkl", EVIL), *parts()[1:]]
    raw, places = body(records)
    listed = [records[0], *records[2:]]
    entries = directory(listed, [places[0], *places[2:]])
    return raw + entries + end(len(listed), len(entries), len(raw))


def _counted(more: int) -> bytes:
    return built(parts(), here=(4 + more) % 65536, count=(4 + more) % 65536)


def _sized(more: int) -> bytes:
    raw, places = body(parts())
    entries = directory(parts(), places)
    return raw + entries + end(4, len(entries) + more, len(raw))


def _located(shift: int | None) -> bytes:
    raw, places = body(parts())
    entries = directory(parts(), places)
    numbers = 4, len(entries), len(raw)
    at = len(raw + entries)
    record = end64(*numbers) if shift is not None else b""
    return raw + entries + record + locator(at + (shift or 0)) + end(*numbers)
