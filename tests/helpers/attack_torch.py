"""Hostile ``.pt`` files: pickles wrapped as torch does, tensors that lie, zips that lie.

Every one is made here from a few lines, the same bytes each time.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping

MAGIC = 0x1950A86A20F9469CFC6C
Records = list[tuple[str, bytes]]


def zipped(data: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """torch.save's zip around a pickle."""
    records = [(f"data/{key}", value) for key, value in (storages or {"0": bytes(16)}).items()]
    return stored([("x/data.pkl", data), *((f"x/{n}", v) for n, v in records), ("x/version", b"3")])


def legacy(data: bytes, storages: Mapping[str, bytes] | None = None, itemsize: int = 4) -> bytes:
    """torch.save's stream of before 1.6 around a pickle."""
    storages = {"0": bytes(16)} if storages is None else storages
    head = [MAGIC, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}]
    raw = b"".join(struct.pack("<q", len(v) // itemsize) + v for v in storages.values())
    return b"".join(pickle.dumps(v, 2) for v in head) + data + pickle.dumps([*storages], 2) + raw


def stored(records: Records, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in records:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.filename = name  # as it is: ZipInfo mends backslashes and NULs
            archive.writestr(info, data)
    return buffer.getvalue()


# --- tensors --------------------------------------------------------------------------------


def _number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(data)) + data


def _tuple(values: "tuple[int, ...] | list[int]") -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def tensor(
    shape: "bytes | tuple[int, ...]" = (4,),
    strides: "bytes | tuple[int, ...]" = (1,),
    offset: "bytes | int" = 0,
    numel: int = 4,
    key: str = "0",
    storage: bytes = b"ctorch\nFloatStorage\n",
    rebuild: bytes = b"ctorch._utils\n_rebuild_tensor_v2\n",
    view: bytes = b"",
) -> bytes:
    """The opcodes of a tensor of float32 over a storage of 4 elements, or one that lies."""
    pid = b"(" + _text("storage") + storage + _text(key) + _text("cpu") + _number(numel) + view
    parts = [
        offset if isinstance(offset, bytes) else _number(offset),
        *(value if isinstance(value, bytes) else _tuple(value) for value in (shape, strides)),
    ]
    return rebuild + b"(" + pid + b"tQ" + b"".join(parts) + b"\x89NtR"


HUGE = 1 << 60
TENSORS: dict[str, Callable[[], bytes]] = {
    "a storage larger than its record": lambda: tensor((5,), numel=5),
    "a tensor beyond its storage": lambda: tensor((5,)),
    "an offset beyond the storage": lambda: tensor((1,), offset=4),
    "a negative offset": lambda: tensor(offset=-1),
    "a negative size": lambda: tensor((-4,)),
    "a negative stride": lambda: tensor(strides=(-1,), offset=3),
    "negative elements": lambda: tensor(numel=-4),
    "strides that overlap": lambda: tensor((3, 2), (1, 1)),
    "expanded": lambda: tensor((1000, 4), (0, 1)),
    "expanded to 4 EB": lambda: tensor((HUGE,), (0,)),
    "expanded in 64 dimensions": lambda: tensor((1 << 62,) * 64, (0,) * 64),
    "expanded a thousand times": lambda: b"(" + tensor((1 << 20,), (0,)) * 1000 + b"l",
    "no elements, but large": lambda: tensor((1 << 62, 0), (1, 1)),
    "65 dimensions": lambda: tensor((1,) * 65, (1,) * 65),
    "numbers of 4 MB": lambda: tensor((1 << (1 << 25), 2), (1 << (1 << 25), 1)),
    "an offset of 4 MB": lambda: tensor(offset=1 << (1 << 25)),
    "elements of 4 MB": lambda: tensor(numel=1 << (1 << 25)),
    "more sizes than strides": lambda: tensor((2, 2), (1,)),
    "sizes that aren't numbers": lambda: tensor(b"(G" + bytes(8) + b"t"),
    "a list of sizes": lambda: tensor(b"(K\x04l"),
    "true as a size": lambda: tensor(b"(\x88t"),
    "a storage of os.system": lambda: tensor(storage=b"cos\nsystem\n"),
    "a called storage": lambda: tensor(storage=b"cos\nsystem\n" + _text("exit 3") + b"\x85R"),
    "a key with dots": lambda: tensor(key="../../../../etc/passwd"),
    "an absolute key": lambda: tensor(key="/etc/passwd"),
    "a key of a megabyte": lambda: tensor(key="k" * (1 << 20)),
    "a view beyond its storage": lambda: tensor(view=b"(" + _text("1") + b"K\x03K\x04t"),
    "a view of 4 EB": lambda: tensor(view=b"(" + _text("1") + b"K\x00" + _number(HUGE) + b"t"),
    "a negative view": lambda: tensor(view=b"(" + _text("1") + _number(-1) + b"K\x04t"),
    "one tensor a million times": lambda: (
        b"(" + tensor((1,)) + b"q\x00" + b"h\x00" * 900_000 + b"l"
    ),
    "a hundred thousand tensors": lambda: (
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x000("
        + (b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu"))
        + (b"K\x04tQK\x00" + _tuple((1,) * 64) * 2 + b"\x89Ntq\x010(")
        + b"h\x00h\x01R" * 100_000
        + b"lt"
    ),
    "a tensor in a call": lambda: b"cos\nsystem\n" + tensor() + b"\x85R",
    "a tensor as key": lambda: b"}" + tensor() + b"Ns",
}


# --- zips -----------------------------------------------------------------------------------

PICKLE = b"\x80\x02}" + _text("a") + tensor() + b"s."
GOOD: Records = [("x/data.pkl", PICKLE), ("x/data/0", bytes(16)), ("x/version", b"3")]
_RENAMED = {
    "dots": "x/../../canary",
    "dots only": "..",
    "absolute": "/x/data/1",
    "an absolute path": "/etc/passwd",
    "backslashes": "x\\..\\..\\canary",
    "a drive": "C:/canary",
    "another folder": "y/data/0",
    "no folder": "canary",
    "an empty name": "",
    "a NUL": "x/data/0\0.pkl",
    "the terminal's codes": "\x1b[2J/canary",
    "64 KiB": "x/" + "n" * 65_000,
}


def _central(raw: bytes, index: int) -> int:
    """Where the central header of a record begins."""
    at = raw.index(b"PK\x01\x02")
    for _ in range(index):
        at = raw.index(b"PK\x01\x02", at + 46)
    return at


def _patched(index: int, offset: int, data: bytes, local: int | None = None) -> bytes:
    """The good zip with bytes of a record's central header changed; of the local one too."""
    raw = bytearray(stored(GOOD))
    at = _central(bytes(raw), index)
    (header,) = struct.unpack_from("<I", raw, at + 42)
    raw[at + offset : at + offset + len(data)] = data
    if local is not None:
        raw[header + local : header + local + len(data)] = data
    return bytes(raw)


def _local(index: int, offset: int, data: bytes) -> bytes:
    """The good zip with bytes of a record's local header changed."""
    raw = bytearray(stored(GOOD))
    (header,) = struct.unpack_from("<I", raw, _central(bytes(raw), index) + 42)
    raw[header + offset : header + offset + len(data)] = data
    return bytes(raw)


def _end(offset: int, data: bytes) -> bytes:
    """The good zip with bytes of its end record changed."""
    raw = bytearray(stored(GOOD))
    at = raw.rindex(b"PK\x05\x06")
    raw[at + offset : at + offset + len(data)] = data
    return bytes(raw)


def _with_extra(extra: bytes) -> bytes:
    """The good zip, whose second record has its numbers in this extra field."""
    raw = stored(GOOD)
    at, end = _central(raw, 1), raw.rindex(b"PK\x05\x06")
    name_size = struct.unpack_from("<H", raw, at + 28)[0]
    entry = bytearray(raw[at : at + 46 + name_size])
    entry[20:28] = b"\xff" * 8
    entry[30:32] = struct.pack("<H", len(extra))
    entry[42:46] = b"\xff" * 4
    new = raw[:at] + bytes(entry) + extra + raw[at + 46 + name_size : end]
    tail = bytearray(raw[end:])
    (size,) = struct.unpack_from("<I", tail, 12)
    tail[12:16] = struct.pack("<I", size + len(extra))
    return new + bytes(tail)


def _quoted(copies: int) -> bytes:
    """Many directory entries of one local record: each would be unpacked again."""
    raw = stored(GOOD)
    at, end = _central(raw, 1), raw.rindex(b"PK\x05\x06")
    name_size = struct.unpack_from("<H", raw, at + 28)[0]
    entry = raw[at : at + 46 + name_size]
    tail = bytearray(raw[end:])
    (size,) = struct.unpack_from("<I", tail, 12)
    tail[12:16] = struct.pack("<I", size + copies * len(entry))
    return raw[:end] + entry * copies + bytes(tail)


def _bomb() -> bytes:
    """64 MiB of zeros in 64 KiB, said to be 16 bytes."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(bytes(64 << 20)) + packed.flush()
    raw = bytearray(stored([("x/data.pkl", PICKLE), ("x/data/0", data)]))
    at = _central(bytes(raw), 1)
    (header,) = struct.unpack_from("<I", raw, at + 42)
    for place in (at + 10, header + 8):
        raw[place : place + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
    return bytes(raw)


def _pickle_bomb() -> bytes:
    return stored(
        [("x/data.pkl", b"\x80\x02X" + struct.pack("<I", 64 << 20) + bytes(64 << 20) + b".")],
        zipfile.ZIP_DEFLATED,
    )


ZIPS: dict[str, Callable[[], bytes]] = {
    **{
        f"a name: {what}": lambda name=name: stored([*GOOD, (name, b"1")])  # type: ignore[misc]
        for what, name in _RENAMED.items()
    },
    "compressed": lambda: stored(GOOD, zipfile.ZIP_DEFLATED),
    "compressed by bzip2": lambda: stored(GOOD, zipfile.ZIP_BZIP2),
    "compressed by lzma": lambda: stored(GOOD, zipfile.ZIP_LZMA),
    "a bomb": _bomb,
    "a bomb as pickle": _pickle_bomb,
    "a name twice": lambda: stored([*GOOD, ("x/data/0", bytes(16))]),
    "marked as a folder": lambda: _patched(1, 38, b"\x10"),
    "two pickles": lambda: stored([*GOOD, ("x/data.pkl", PICKLE)]),
    "records that overlap": lambda: _patched(1, 20, struct.pack("<II", 40, 40), 18),
    "a record in the directory": lambda: _patched(2, 20, struct.pack("<II", 60, 60), 18),
    "a record at another's place": lambda: _patched(1, 42, struct.pack("<I", 0)),
    "a record outside": lambda: _patched(1, 42, struct.pack("<I", 1 << 31)),
    "1,000 entries of one record": lambda: _quoted(1000),
    "200,000 entries": lambda: _quoted(200_000),
    "another name in the local header": lambda: _local(1, 30, b"x/data/7"),
    "another size in the local header": lambda: _local(1, 18, struct.pack("<II", 4, 4)),
    "compressed, says the local header": lambda: _local(1, 8, b"\x08\x00"),
    "encrypted, says the local header": lambda: _local(1, 6, b"\x01\x00"),
    "encrypted": lambda: _patched(1, 8, b"\x01\x00", 6),
    "no local header": lambda: _local(1, 0, b"XXXX"),
    "a long field in the local header": lambda: _local(1, 28, b"\xff\xff"),
    "another method": lambda: _patched(1, 10, b"\x63\x00", 8),
    "sizes that differ": lambda: _patched(1, 20, struct.pack("<I", 8)),
    "8 EB by zip64": lambda: _with_extra(struct.pack("<HHQQQ", 1, 24, 1 << 63, 1 << 63, 100)),
    "8 EB away by zip64": lambda: _with_extra(struct.pack("<HHQQQ", 1, 24, 16, 16, 1 << 63)),
    "an empty zip64 field": lambda: _with_extra(struct.pack("<HH", 1, 0)),
    "a cut zip64 field": lambda: _with_extra(struct.pack("<HHI", 1, 24, 0)),
    "a directory of 4 GB": lambda: _end(12, b"\xff\xff\xff\xfe"),
    "a directory outside": lambda: _end(16, b"\xff\xff\xff\xfe"),
    "more records than there are": lambda: _end(8, b"\xff\xfe\xff\xfe"),
    "many disks": lambda: _end(4, b"\x01\x00\x01\x00"),
    "two ends": lambda: stored(GOOD) + stored([("y/data.pkl", b"\x80\x02N.")]),
    "a pickle before": lambda: b"\x80\x02N." + stored(GOOD),
    "bytes behind": lambda: stored(GOOD) + bytes(100_000),
    "no pickle": lambda: stored(GOOD[1:]),
    "a folder as pickle": lambda: stored([("x/data.pkl/", b""), *GOOD[1:]]),
    "a large byte order": lambda: stored([*GOOD, ("x/byteorder", b"little" * 100_000)]),
    "a program": lambda: stored([*GOOD, ("x/code/__torch__.py", b"import os")]),
}

# --- streams --------------------------------------------------------------------------------


def _stream(*values: object, rest: bytes = b"") -> bytes:
    parts = [v if isinstance(v, bytes) else pickle.dumps(v, 2) for v in values]
    return b"".join(parts) + rest


_SYSTEM = {"little_endian": True}
_ONE = b"\x80\x02" + tensor() + b"."
STREAMS: dict[str, Callable[[], bytes]] = {
    "another magic number": lambda: _stream(1 << 4000, 1001, _SYSTEM, None, []),
    "a call as magic number": lambda: b"\x80\x02cos\nsystem\nX\x06\0\0\0exit 3\x85R.",
    "a call as protocol": lambda: _stream(MAGIC, b"\x80\x02cos\nsystem\nX\x06\0\0\0exit 3\x85R."),
    "a call as system": lambda: _stream(
        MAGIC, 1001, b"\x80\x02cos\nsystem\nX\x06\0\0\0exit 3\x85R.", None, []
    ),
    "keys that are a call": lambda: _stream(
        MAGIC, 1001, _SYSTEM, _ONE, b"\x80\x02cos\nsystem\nX\x06\0\0\0exit 3\x85R."
    ),
    "keys that aren't text": lambda: _stream(MAGIC, 1001, _SYSTEM, _ONE, [["0"]]),
    "a million keys": lambda: _stream(
        MAGIC, 1001, _SYSTEM, _ONE, b"\x80\x02](" + _text("0") * 900_000 + b"e."
    ),
    "a storage of 8 EB": lambda: _stream(
        MAGIC, 1001, _SYSTEM, _ONE, ["0"], rest=struct.pack("<q", (1 << 63) - 1)
    ),
    "a negative storage": lambda: _stream(
        MAGIC, 1001, _SYSTEM, _ONE, ["0"], rest=struct.pack("<q", -4) + bytes(16)
    ),
    "a smaller storage": lambda: _stream(
        MAGIC, 1001, _SYSTEM, _ONE, ["0"], rest=struct.pack("<q", 1) + bytes(16)
    ),
    "a module from a file": lambda: _stream(
        MAGIC,
        1001,
        _SYSTEM,
        b"\x80\x02(" + _text("module") + b"ccanary_module\nThing\n" + _text("../canary.py"),
        rest=_text("import os; os.system('touch canary')") + b"tQ)\x81.",
    ),
    "five long pickles": lambda: _stream(
        MAGIC,
        1001,
        b"\x80\x02}" + b"N0" * 400_000 + b".",
        b"\x80\x02" + b"N0" * 400_000 + b"N.",
        [],
    ),
}
