"""Safetensors that contradict themselves or are too much; each with its name."""

import json
import struct
from collections.abc import Callable
from typing import Any


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(*offsets: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    """An entry of one dimension, unless it is told otherwise."""
    if shape is None:
        shape = [offsets[1] - offsets[0]]
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def of(data: int = 16, **entries: Any) -> Callable[[], bytes]:
    return lambda: packed(json.dumps(entries).encode(), bytes(data))


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"\x01" + bytes(6),
    "length only": lambda: packed(b"", length=2),
    "length 2**63": lambda: packed(b"{}", length=2**63),
    "length 2**64-1": lambda: packed(b"{}", length=2**64 - 1),
    "length of all": lambda: packed(b"{}" + bytes(14), length=16),
    "overlapping": of(a=entry(0, 12), b=entry(8, 16)),
    "the same bytes twice": of(a=entry(0, 16), b=entry(0, 16)),
    "one inside another": of(a=entry(0, 16), b=entry(4, 8)),
    "a hole": of(a=entry(0, 4), b=entry(8, 16)),
    "a hole at the start": of(a=entry(4, 16)),
    "a rest at the end": of(a=entry(0, 12)),
    "out of range": of(a=entry(0, 16), b=entry(16, 32)),
    "far out of range": of(a=entry(0, 16), b=entry(2**60, 2**60 + 8)),
    "misaligned": of(a=entry(0, 15, dtype="F32", shape=[4]), b=entry(15, 16)),
    "not a multiple": of(a=entry(0, 15, dtype="F32", shape=[3, 1]), b=entry(15, 16)),
    "end before start": of(a=entry(16, 0, shape=[16])),
    "negative": of(a=entry(-16, 0)),
    "both negative": of(a=entry(-16, -16, shape=[0]), b=entry(0, 16)),
    "negative sizes": of(a=entry(0, 16, shape=[-4, -4])),
    "huge offsets": of(a=entry(10**30, 10**30 + 16)),
    "4000 digits": lambda: packed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b"]}}"),
    "a million digits": lambda: packed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10**6 + b"]}}"),
    "float offsets": of(a=entry(0.0, 16.0, shape=[16])),
    "exponents": lambda: packed(
        b'{"a":{"dtype":"U8","shape":[1e1],"data_offsets":[0,1e1]}}', bytes(10)
    ),
    "bool offsets": of(1, a=entry(False, True, shape=[1])),
    "text offsets": of(a=entry("0", "16", shape=[16])),
    "three offsets": of(a=entry(0, 8, 16, shape=[16])),
    "no offsets": of(a={"dtype": "U8", "shape": [16]}),
    "null": of(a=None),
    "a list": lambda: packed(b"[1]", bytes(1)),
    "no object": lambda: packed(b"null"),
    "shape that overflows": of(a=entry(0, 0, shape=[2**32, 2**32])),
    "shape that overflows to its size": of(a=entry(0, 16, shape=[2**60 + 1, 16])),
    "shape that overflows beside a zero": of(0, a=entry(0, 0, shape=[2**63, 2, 0])),
    "many dimensions": of(a=entry(0, 16, shape=[16] + [1] * 100_000)),
    "huge dimensions": of(0, a=entry(0, 0, shape=[10**39] * 100_000 + [0])),
    "shape is text": of(a=entry(0, 2, shape="12")),
    "shape is an object": of(a=entry(0, 1, shape={"1": 1})),
    "dtype is a list": of(a=entry(0, 16, dtype=["U8"])),
    "dtype is long": of(a=entry(0, 16, dtype="U8" * 1_000_000)),
    "a name twice": lambda: packed(
        b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2), bytes(16)
    ),
    "a key twice": lambda: packed(
        b'{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16],"shape":[16]}}', bytes(16)
    ),
    "metadata is a list": lambda: packed(b'{"__metadata__":["a"]}'),
    "metadata is an empty list": lambda: packed(b'{"__metadata__":[]}'),
    "metadata is text": lambda: packed(b'{"__metadata__":"a"}'),
    "metadata nests": lambda: packed(b'{"__metadata__":{"a":{"b":"c"}}}'),
    "metadata has numbers": lambda: packed(b'{"__metadata__":{"a":1}}'),
    "nan": lambda: packed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'),
    "infinity": lambda: packed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}'),
    "bad utf-8": lambda: packed(b'{"\xff":1}'),
    "utf-16": lambda: packed("{}".encode("utf-16")),
    "a byte order mark": lambda: packed(b"\xef\xbb\xbf{}"),
    "spaces in front": lambda: packed(b"  {}"),
    "zeros behind": lambda: packed(b"{}\0\0"),
    "two objects": lambda: packed(b"{}{}"),
    "half a header": lambda: packed(b'{"a":'),
    "deep lists": lambda: packed(b'{"a":' + b"[" * 1_000_000),
    "deep objects": lambda: packed(b'{"a":' * 1_000_000),
    "deep metadata": lambda: packed(b'{"__metadata__":' + b"[" * 500 + b"]" * 500 + b"}"),
    "100 MB of spaces": lambda: packed(b"{}".ljust(100_000_000)),
    "just under 100 MB": lambda: packed(b'{"a":"' + b"a" * 99_999_990 + b'"}'),
    "32 MB of lists": lambda: packed(b'{"a":[' + b"[]," * ((31 << 20) // 3) + b"0]}"),
    "30 MB of text": lambda: packed('{"😀":"'.encode() + b"a" * (30 << 20) + b'"}'),
    "a million entries": lambda: packed(
        b"{%s}" % b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n
                            for n in range(1_000_000))
    ),
    "100 000 twice": lambda: packed(
        b"{%s}" % b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % (n % 99_999)
                            for n in range(100_000))
    ),
}  # fmt: skip
# those that take the most memory or time
LARGE = ("100 MB of spaces", "just under 100 MB", "32 MB of lists", "30 MB of text",
         "a million entries", "100 000 twice", "deep objects", "many dimensions")  # fmt: skip
