"""Pickles, zips, tars, safetensors and JSON on both sides of each limit: signs, sizes, steps."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.formats import zip_directory
from neox_bridge.formats.bounded_json import deeper, parse_json
from neox_bridge.formats.pickle_folds import (
    MAX_STEPS,
    Context,
    Global,
    PickledTensor,
    PickleError,
    Record,
    StorageRef,
    hashable,
    storage_ref,
)
from neox_bridge.formats.pickle_security import is_candidate, scan
from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.pickles import load
from neox_bridge.formats.safetensors import layout_safetensors, read_safetensors
from neox_bridge.formats.tar import is_tar
from neox_bridge.formats.tensor_values import read_box
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.formats.torch_legacy import MAGIC
from neox_bridge.formats.torch_zip import layout_pt, place
from neox_bridge.formats.zip_directory import ZipError, data_places, read_directory
from neox_bridge.tensors.pieces import OutputFile, OutputTensor
from neox_bridge.tensors.tensor_ref import TensorRef

# --- pickles: steps


def steps(data: bytes) -> int:
    context = Context(lambda tensor: tensor)
    load(io.BytesIO(data), storage_ref, context=context)
    return MAX_STEPS - context.left


def text(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + b"k" * length


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x09tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\3\x85K\1\x85\x89NtR"


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"N.", 1),
        (b"\x80\x02N.", 2),
        (text(32) + b".", 1),
        (text(33) + b".", 2),
        (text(63) + b".", 2),
        (text(64) + b".", 3),
        (text(3200) + b".", 101),
        (b"I" + b"1" * 30 + b"\n.", 1),
        (b"I" + b"1" * 31 + b"\n.", 2),  # the end of the line counts
        (b"I" + b"1" * 63 + b"\n.", 3),
        (b"cos\nsystem\n.", 1),
        (b"c" + b"m" * 31 + b"\n" + b"n" * 63 + b"\n.", 4),
        (b"cos\nsystem\n)R.", 3 + 4),
        (b"cos\nsystem\n)\x81.", 3 + 4),
        (b"\x80\x04cos\nsystem\n)}\x92.", 5 + 4),
        (TENSOR + b".", 19 + 10 + 1),
        (b"cbuiltins\nlist\n](NNNe\x85R.", 9 + 3),
        (b"cbuiltins\ndict\n}\x85R.", 4),
        (b"c_codecs\nencode\n" + text(640) + text(6)[:-6] + b"latin1\x86R.", 5 + 20 + 5),
        (b"cbuiltins\nbytes\n\x8e" + struct.pack("<Q", 640) + b"x" * 640 + b"\x85R.", 4 + 20 + 5),
        (b"}K\1Ns.", 4),
        (b"}" + text(4096 * 3) + b"Ns.", 4 + 384 + 3),
        (b"}K\1K\2\x86Ns.", 6 + 2),
    ],
    ids=lambda value: str(value)[:20],
)
def test_steps_are_counted(data: bytes, count: int) -> None:
    assert steps(data) == count


@pytest.mark.parametrize(
    ("value", "among", "cost"),
    [
        ("text", 1600, 0),
        (b"bytes", 1600, 0),
        ("x" * 4095, 0, 0),
        ("x" * 8192, 0, 2),
        (Global("m" * 4000, "n" * 96), 160, 1),
        (1.5, 1600, 0),
        (None, 1600, 0),
        (3, 1600, 0),
        ((1 << 64) - 1, 1600, 0),
        (1 << 64, 1600, 100),
        (-(1 << 64), 1600, 100),
        (1 << 64, 15, 0),
        (1 << 64, 16, 1),
        (1 << 8192, 0, 1),
        ((), 160, 10),
        ((1, 2), 160, 12),
        ((1, (2, 3)), 0, 4),
        (frozenset([1]), 0, 1),
        (("x" * 4096,), 0, 2),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_key_costs(value: Any, among: int, cost: int) -> None:
    context = Context(lambda tensor: tensor)
    assert hashable(context, value, among) is value
    assert MAX_STEPS - context.left == cost


def test_a_key_has_500_values_at_most() -> None:
    context = Context(lambda tensor: tensor)
    hashable(context, (1,) * 499, 0)
    hashable(context, ((1,) * 249, (1,) * 248), 0)
    for wide in ((1,) * 500, ((1,) * 249, (1,) * 249)):
        with pytest.raises(PickleError, match="tuple that is too large"):
            hashable(context, wide, 0)


def test_the_last_step_and_one_more() -> None:
    context = Context(lambda tensor: tensor)
    context.spend(MAX_STEPS)
    assert context.left == 0
    with pytest.raises(PickleError, match="more than 1,000,000 steps"):
        context.spend(1)
    for left, enough in ((2, True), (1, False)):
        context = Context(lambda tensor: tensor, left)
        if enough:
            assert load(io.BytesIO(b"\x80\x02N."), context=context) is None
        else:
            with pytest.raises(PickleError, match="steps"):
                load(io.BytesIO(b"\x80\x02N."), context=context)


def test_a_string_has_16_mib_at_most() -> None:
    most = 16 << 20
    stream = io.BytesIO(b"\x8e" + struct.pack("<Q", most) + bytes(most) + b".")
    assert load(stream) == bytes(most)
    stream = io.BytesIO(b"\x8e" + struct.pack("<Q", most + 1) + bytes(most + 1) + b".")
    with pytest.raises(PickleError, match="a string of 16,777,217 bytes"):
        load(stream)


def test_a_pickle_ends_where_it_is_said_to() -> None:
    data = text(5) + b"."
    assert load(io.BytesIO(data + b"rest"), size=len(data)) == "kkkkk"
    for size in range(len(data)):
        with pytest.raises(PickleError):
            load(io.BytesIO(data + b"rest"), size=size)
    line = b"I12\n."
    assert load(io.BytesIO(line), size=5) == 12
    for size in range(5):
        with pytest.raises(PickleError):
            load(io.BytesIO(line + b"rest"), size=size)
    stream = io.BytesIO(b"ahead" + data + b"behind")
    stream.seek(5)
    assert load(stream) == "kkkkk"
    assert stream.read() == b"behind"


# --- pickles: signs and sizes


@pytest.mark.parametrize(
    "data",
    [
        b"T" + struct.pack("<i", -1) + b"x.",  # BINSTRING
        b"\x8b" + struct.pack("<i", -1) + b"x.",  # LONG4
        b"Np-1\n.",  # PUT
        b"Np-1\n0g-1\n.",
        b"Nq\x000g-1\n.",  # GET
        b"]K\1\x86K\1e.",
    ],
)
def test_negative_numbers_are_refused(data: bytes) -> None:
    with pytest.raises(PickleError):
        load(io.BytesIO(data))
    with pytest.raises((pickle.UnpicklingError, ValueError, IndexError)):
        pickle.loads(data)


@pytest.mark.parametrize(
    ("module", "kind", "dtype"),
    [
        ("torch", "FloatStorage", "float32"),
        ("torch", "BFloat16Storage", "bfloat16"),
        ("torch", "OtherStorage", "OtherStorage"),
        ("torch.storage", "UntypedStorage", "uint8"),
    ],
)
def test_storages(module: str, kind: str, dtype: str) -> None:
    given = ("storage", Global(module, kind), "7", "cpu", 4)
    assert storage_ref(given) == StorageRef("7", dtype, 4)
    assert storage_ref((*given, None)) == StorageRef("7", dtype, 4)
    assert storage_ref((*given, ("v", 2, 2))) == StorageRef("7", dtype, 2, 2)


@pytest.mark.parametrize(
    ("pid", "right"),
    [
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 0), True),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", (1 << 63) - 1), True),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 1 << 63), False),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", -1), False),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("v", 0, 0)), True),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("v", -1, 2)), False),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("v", 0, -1)), False),
        (
            ("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("v", (1 << 63) - 1, 1)),
            True,
        ),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("v", 1 << 63, 1)), False),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("v", 1, 1 << 63)), False),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("v", 0)), False),
        (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, None, 1), False),
        (("storage", Global("torch", "FloatStorage"), 0, "cpu", 4), False),
        (("storage", "FloatStorage", "0", "cpu", 4), False),
        (("module", Global("torch", "FloatStorage"), "0", "cpu", 4), False),
        ("storage", False),
    ],
    ids=str,
)
def test_what_names_a_storage(pid: Any, right: bool) -> None:
    if right:
        assert storage_ref(pid).dtype == "float32"
    else:
        with pytest.raises(PickleError, match="does not name a PyTorch storage"):
            storage_ref(pid)


def rebuilt(function: str, *args: Any) -> Any:
    """What a call of one of torch's functions becomes. The storage comes first."""
    from neox_bridge.formats.pickle_folds import fold

    context = Context(lambda tensor: tensor)
    storage = StorageRef("0", "float32", 9)
    return fold(context, Global("torch._utils", function), (storage, *args))


V2, V3 = "_rebuild_tensor_v2", "_rebuild_tensor_v3"


def test_tensors_are_rebuilt() -> None:
    storage = StorageRef("0", "float32", 9)
    want = PickledTensor(storage, 1, (2, 3), (3, 1), "float32")
    assert rebuilt("_rebuild_tensor", 1, (2, 3), (3, 1)) == want
    assert rebuilt(V2, 1, (2, 3), (3, 1), False, {}) == want
    assert rebuilt(V2, 1, (2, 3), (3, 1), False, {}, {"meta": 1}) == want
    other = rebuilt(V3, 1, (2, 3), (3, 1), False, {}, Global("torch", "uint16"))
    assert other.dtype == "uint16"
    assert rebuilt(V2, 0, (1,) * 64, (1,) * 64, False, {}).shape == (1,) * 64
    assert rebuilt(V2, (1 << 63) - 1, (), (), False, {}).offset == (1 << 63) - 1
    assert rebuilt(V2, 0, ((1 << 63) - 1,), (0,), False, {}).shape == ((1 << 63) - 1,)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (True, (2,), (1,)),
        (0.0, (2,), (1,)),
        (0, (True,), (1,)),
        (0, [2], (1,)),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_no_tensor_is_made_of_them(offset: Any, shape: Any, strides: Any) -> None:
    assert isinstance(rebuilt(V2, offset, shape, strides, False, {}), Record)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "what"),
    [
        (-1, (2,), (1,), "negative offset"),
        (0, (-2,), (1,), "negative size or stride"),
        (0, (2,), (-1,), "negative size or stride"),
        (0, (2, 2), (1,), "one stride for each dimension"),
    ],
)
def test_numbers_that_no_tensor_has_are_refused(
    offset: int, shape: Any, strides: Any, what: str
) -> None:
    with pytest.raises(PickleError, match=what):
        rebuilt(V2, offset, shape, strides, False, {})


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(1 << 63, (2,), (1,)), (0, (1 << 63,), (1,)), (0, (2,), (1 << 63,))],
)
def test_sizes_that_torch_cannot_have(offset: int, shape: Any, strides: Any) -> None:
    with pytest.raises(PickleError, match="storage"):
        rebuilt(V2, offset, shape, strides, False, {})


def test_tensors_with_attributes() -> None:
    from neox_bridge.formats.pickle_folds import fold

    context = Context(lambda tensor: "tensor")
    storage = StorageRef("0", "float32", 9)
    from_type = Global("torch._tensor", "_rebuild_from_type_v2")
    inner = (storage, 0, (2,), (1,), False, {})
    made = fold(context, from_type, (Global("torch._utils", V2), Global("a", "T"), inner, {"x": 1}))
    assert made == "tensor"
    for factory in (from_type, Global("os", "system"), "text"):
        args = (factory, Global("a", "T"), inner, {})
        assert isinstance(fold(context, from_type, args), Record)
    parameter = Global("torch._utils", "_rebuild_parameter")
    assert fold(context, parameter, (made, True, {})) == "tensor"


@pytest.mark.parametrize(
    ("start", "numel", "offset", "shape", "strides", "right"),
    [
        (0, 8, 0, (8,), (1,), True),
        (0, 8, 1, (8,), (1,), False),
        (0, 9, 0, (8,), (1,), False),  # the storage says more than there is
        (2, 6, 0, (6,), (1,), True),
        (3, 6, 0, (5,), (1,), False),
        (0, 8, 0, (2, 4), (4, 1), True),
        (0, 8, 0, (2, 4), (5, 1), False),
        (0, 8, 0, (4, 2), (1, 4), True),
        (0, 8, 3, (4,), (0,), True),
        (0, 8, 7, (), (), True),
        (0, 8, 8, (), (), False),
        (0, 8, 99, (0,), (1,), True),
        (0, 8, 4, (2,), (4,), False),
        (0, 8, 3, (2,), (4,), True),
    ],
)
def test_a_tensor_lies_within_its_storage(
    start: int, numel: int, offset: int, shape: Any, strides: Any, right: bool
) -> None:
    storage = StorageRef("0", "float32", numel, start)
    tensor = PickledTensor(storage, offset, shape, strides, "float32")
    if not right:
        with pytest.raises(PickleError, match="storage"):
            place(tensor, "f", 100, 32)
        return
    ref = place(tensor, "f", 100, 32)
    assert ref.offset == 100 + min(4 * (start + offset), 32)
    assert (ref.file, ref.dtype, ref.shape) == ("f", "float32", shape)


def test_offsets_are_in_the_elements_of_the_tensor() -> None:
    storage = StorageRef("0", "uint8", 16, 4)
    tensor = PickledTensor(storage, 2, (2,), (1,), "float16")
    assert place(tensor, "f", 100, 32).offset == 108
    for dtype in ("complex999", "x"):
        with pytest.raises(PickleError, match=f"element type {dtype}"):
            place(PickledTensor(storage, 0, (), (), dtype), "f", 0, 32)


# --- pickles: what a call becomes


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"c_codecs\nencode\nX\2\0\0\0\xc3\xbfX\6\0\0\0latin1\x86R.", b"\xff"),
        (b"c__builtin__\nbytearray\nX\1\0\0\0aX\7\0\0\0latin-1\x86R.", bytearray(b"a")),
        (b"cbuiltins\nbytes\n)R.", b""),
        (b"cbuiltins\nset\n](K\1K\2e\x85R.", {1, 2}),
        (b"ctorch\nSize\n](K\1K\2e\x85R.", (1, 2)),
        (b"ccollections\nOrderedDict\n](K\1K\2\x86e\x85R.", {1: 2}),
        (b"ccollections\ndefaultdict\ncbuiltins\nlist\n\x85R.", {}),
        (b"(X\1\0\0\0ai__builtin__\nset\n.", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_known_calls_are_values(data: bytes, value: Any) -> None:
    if value is None:
        with pytest.raises(PickleError, match="is not a container"):
            load(io.BytesIO(data))
        return
    read = load(io.BytesIO(data))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "data",
    [
        b"c_codecs\nencode\n" + text(1) + b"X\4\0\0\0utf8\x86R.",
        b"c_codecs\nencode\n" + text(1) + b"\x85R.",
        b"c_codecs\nencode\n" + text(1) + b"X\6\0\0\0latin1N\x87R.",
        b"c_codecs\nencode\nK\1X\6\0\0\0latin1\x86R.",
        b"(" + text(1) + b"X\6\0\0\0latin1Ni_codecs\nencode\n.",
        b"cbuiltins\nlist\n](K\1e\x85\x81.",  # __new__ ignores the items
        b"cbuiltins\nlist\ncos\nsystem\n\x85R.",
    ],
)
def test_unknown_calls_are_records(data: bytes) -> None:
    record = load(io.BytesIO(data))
    assert isinstance(record, Record)
    assert isinstance(record.factory, Global)


def test_inst_and_obj_name_and_call() -> None:
    inst = load(io.BytesIO(b"(K\1K\2ios\nsystem\n."))
    obj = load(io.BytesIO(b"(cos\nsystem\nK\1K\2o."))
    for record in (inst, obj):
        assert isinstance(record, Record)
        assert (record.factory, record.args) == (Global("os", "system"), (1, 2))
    kwargs = load(io.BytesIO(b"\x80\x04cos\nsystem\nK\1\x85}" + text(1) + b"K\2s\x92."))
    assert isinstance(kwargs, Record)
    assert (kwargs.args, kwargs.kwargs, kwargs.new) == ((1,), {"k": 2}, True)


def test_items_and_state_of_a_record() -> None:
    record = load(io.BytesIO(b"cm\nC\n)R(K\1K\2eK\3a(K\4K\5K\6K\7uK\x08K\x09s}K\1K\2sb."))
    assert isinstance(record, Record)
    assert record.items == [1, 2, 3]
    assert record.entries == {4: 5, 6: 7, 8: 9}
    assert record.state == {1: 2}


# --- the old format


def stream(*values: Any, raw: bytes = b"") -> bytes:
    return b"".join(v if isinstance(v, bytes) else pickle.dumps(v, 2) for v in values) + raw


def storage(key: bytes, numel: int, kind: bytes = b"Float") -> bytes:
    """The persistent id of a storage."""
    head = b"(X\7\0\0\0storagectorch\n" + kind + b"Storage\nX\1\0\0\0" + key
    return head + b"X\3\0\0\0cpuK" + bytes([numel]) + b"NtQ"


def tensor(key: bytes, numel: int, kind: bytes = b"Float") -> bytes:
    size = b"K\0K" + bytes([numel]) + b"\x85K\1\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key, numel, kind) + size + b"\x89NtR"


TWO = b"\x80\x02}(X\1\0\0\0a" + tensor(b"a", 2) + b"X\1\0\0\0b" + tensor(b"b", 3) + b"u."
SYSTEM = {"little_endian": True}


def raw_storage(count: int, numel: int | None = None) -> bytes:
    return struct.pack("<q", count if numel is None else numel) + bytes(4 * count)


def legacy(path: Path, *, system: Any = SYSTEM, keys: Any = None, raw: bytes | None = None) -> Path:
    behind = raw_storage(2) + raw_storage(3) if raw is None else raw
    path.write_bytes(stream(MAGIC, 1001, system, TWO, keys or ["a", "b"], raw=behind))
    return path


def test_storages_follow_in_the_order_of_their_keys(tmp_path: Path) -> None:
    path = legacy(tmp_path / "x.pt")
    size = path.stat().st_size
    found: Any = read_torch(str(path))
    assert {name: ref.offset for name, ref in found.items()} == {"a": size - 28, "b": size - 12}
    path = legacy(tmp_path / "x.pt", keys=["b", "a"], raw=raw_storage(3) + raw_storage(2))
    found = read_torch(str(path))
    assert {name: ref.offset for name, ref in found.items()} == {"a": size - 8, "b": size - 28}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"system": {"little_endian": False}}, "big-endian"),
        ({"system": {"little_endian": 1}}, "big-endian"),
        ({"system": {}}, "big-endian"),
        ({"system": [True]}, "big-endian"),
        ({"raw": raw_storage(2, -1) + raw_storage(3)}, "past the end of the file"),
        ({"raw": raw_storage(2, 3) + raw_storage(3)}, "storage"),
        ({"raw": raw_storage(2) + raw_storage(2)}, "should have 12 bytes but has 8"),
        ({"raw": raw_storage(2) + raw_storage(2, 3)}, "past the end of the file"),
        ({"raw": raw_storage(2) + raw_storage(3)[:-1]}, "past the end of the file"),
        ({"raw": raw_storage(2) + b"1234567"}, "past the end of the file"),
        ({"keys": ["a"]}, "storage b is missing"),
        ({"keys": ["a", "a", "b"]}, "do not match its tensors"),
        ({"keys": ["a", "c"]}, "do not match its tensors"),
        ({"keys": {"a": 1}}, "are not a list"),
    ],
)
def test_old_files_that_are_not_whole(changes: Any, match: str, tmp_path: Path) -> None:
    path = legacy(tmp_path / "x.pt", **changes)
    with pytest.raises(BridgeError, match=match):
        read_torch(str(path))


def test_one_storage_has_one_type(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    both = b"\x80\x02" + tensor(b"a", 2) + tensor(b"a", 2, b"Int") + b"\x86."
    path.write_bytes(stream(MAGIC, 1001, SYSTEM, both, ["a"], raw=raw_storage(2)))
    with pytest.raises(BridgeError, match="two element types"):
        read_torch(str(path))


@pytest.mark.parametrize(("values", "match"), [((1,), "did not write"), ((MAGIC, 1002), "1001")])
def test_other_streams(values: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(stream(*values, SYSTEM, TWO, ["a", "b"], raw=raw_storage(2) + raw_storage(3)))
    with pytest.raises(BridgeError, match=match):
        read_torch(str(path))


EVIL = b"\x80\x02cos\nsystem\nX\1\0\0\0x\x85R."


@pytest.mark.parametrize("at", range(6))
def test_the_five_pickles_of_an_old_file_are_looked_into(at: int, tmp_path: Path) -> None:
    path, values = tmp_path / "x.pt", [MAGIC, 1001, SYSTEM, {"a": 1}, [], []]
    values[at] = EVIL
    path.write_bytes(stream(*values))
    report = scan(str(path))
    assert report.harmless is (at == 5)  # nobody reads a sixth
    assert report.pickles == (1 if at == 0 else 5)
    assert [use.name for use in report.uses] == (["os.system"] if at < 5 else [])


# --- zips


def whole(file: OutputFile) -> bytearray:
    raw = bytearray(file.size)
    for offset, data in file.literals:
        raw[offset : offset + len(data)] = data
    for one in file.tensors:
        assert one.inline is not None
        raw[one.offset : one.offset + len(one.inline)] = one.inline
    return raw


def laid_out() -> bytearray:
    """As this tool and torch write it: with data descriptors and a zip64 end record."""
    tensors = [
        OutputTensor("a", "uint8", (3,), inline=b"abc"),
        OutputTensor("b", "uint8", (0,), inline=b""),
    ]
    return whole(layout_pt("x.pt", {"a": TensorSlot("a"), "b": TensorSlot("b")}, tensors))


def zipped() -> bytearray:
    """As Python's zipfile writes it: sizes and checksums in the local headers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/version", b"3\n")
    return bytearray(buffer.getvalue())


def places(raw: bytes) -> list[int]:
    file = io.BytesIO(raw)
    return data_places(file, *read_directory(file))


FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    # offset in the record, and format; those that no reader looks at are left out
    "PK\3\4": {
        "flags": (6, "H"),
        "method": (8, "H"),
        "name": (26, "H"),
        "extra": (28, "H"),
        "first letter": (30, "B"),
    },
    "PK\1\2": {
        "flags": (8, "H"),
        "method": (10, "H"),
        "crc": (16, "I"),
        "packed": (20, "I"),
        "size": (24, "I"),
        "name": (28, "H"),
        "extra": (30, "H"),
        "comment": (32, "H"),
        "disk": (34, "H"),
        "header": (42, "I"),
        "first letter": (46, "B"),
    },
    "PK\7\10": {"crc": (4, "I"), "packed": (8, "I"), "size": (12, "I")},
    "PK\6\6": {
        "length": (4, "Q"),
        "disk": (16, "I"),
        "first disk": (20, "I"),
        "here": (24, "Q"),
        "count": (32, "Q"),
        "size": (40, "Q"),
        "start": (48, "Q"),
    },
    "PK\6\7": {"disk": (4, "I"), "place": (8, "Q"), "disks": (16, "I")},
    "PK\5\6": {
        "disk": (4, "H"),
        "first disk": (6, "H"),
        "here": (8, "H"),
        "count": (10, "H"),
        "size": (12, "I"),
        "start": (16, "I"),
        "comment": (20, "H"),
    },
}
LOCAL_NUMBERS = {"crc": (14, "I"), "packed": (18, "I"), "size": (22, "I")}


def every_field(raw: bytes) -> list[tuple[str, str, int, str]]:
    fields = []
    for signature, named in FIELDS.items():
        known = {**named, **LOCAL_NUMBERS} if signature == "PK\3\4" else named
        at = raw.find(signature.encode())
        while at >= 0:
            fields += [(signature, name, at + off, kind) for name, (off, kind) in known.items()]
            at = raw.find(signature.encode(), at + 1)
    return fields


@pytest.mark.parametrize("make", [laid_out, zipped])
@pytest.mark.parametrize("by", [5, -1])
def test_no_field_of_a_zip_may_be_another(make: Callable[[], bytearray], by: int) -> None:
    raw = make()
    assert places(raw)
    accepted = []
    for signature, name, at, kind in every_field(raw):
        changed = bytearray(raw)
        (value,) = struct.unpack_from(f"<{kind}", raw, at)
        struct.pack_into(f"<{kind}", changed, at, (value + by) % (1 << 8 * struct.calcsize(kind)))
        try:
            places(changed)
        except ZipError:
            continue
        accepted.append((signature, name, at))
    assert accepted == []


def test_the_signatures_of_a_zip() -> None:
    raw = laid_out()
    for signature in FIELDS:
        at = raw.rfind(signature.encode())
        for byte in range(4):
            changed = bytearray(raw)
            changed[at + byte] ^= 0x20
            with pytest.raises(ZipError):
                places(changed)


@pytest.mark.parametrize(
    "behind", [b"x", b"\0" * 4, b"PK\5\6" + bytes(18), b"PK\5\6", bytes(70000)]
)
def test_nothing_follows_the_end(behind: bytes) -> None:
    with pytest.raises(ZipError):
        places(laid_out() + behind)


def test_bytes_between_and_before_records() -> None:
    raw = zipped()
    for at in (0, raw.find(b"PK\3\4", 1), raw.find(b"PK\1\2"), raw.find(b"PK\5\6")):
        with pytest.raises(ZipError):
            places(raw[:at] + b"\0" + raw[at:])


def archive_with(extra: bytes) -> bytearray:
    """A zip whose only record has this extra field in both headers."""
    name, data = b"x/data.pkl", b"\x80\x02}."
    numbers = (zlib.crc32(data), len(data), len(data), len(name), len(extra))
    header = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 0, 0, 0, *numbers) + name + extra
    central = struct.pack(
        "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, 0, 0, 0, 0, *numbers, 0, 0, 0, 0, 0
    )
    central += name + extra
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(central), len(header + data), 0)
    return bytearray(header + data + central + end)


@pytest.mark.parametrize(
    ("extra", "right"),
    [
        (b"", True),
        (struct.pack("<HH", 0, 0), True),
        (struct.pack("<HHQ", 0, 8, 5), True),
        (struct.pack("<HHQ", 2, 8, 5), True),
        (struct.pack("<HHQ", 0x5455, 8, 5) + struct.pack("<HH", 0x4246, 0), True),
        (struct.pack("<HHQ", 1, 8, 5), False),  # zip64's, which nothing asks for
        (struct.pack("<HH", 1, 0), False),
        (struct.pack("<HHQ", 2, 9, 5), False),  # longer than there is
        (struct.pack("<HH", 2, 0) + b"x", False),
        (b"xyz", False),
    ],
)
def test_extra_fields(extra: bytes, right: bool) -> None:
    raw = archive_with(extra)
    if right:
        assert places(raw) == [30 + 10 + len(extra)]
    else:
        with pytest.raises(ZipError):
            places(raw)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("x/" + "n" * 509, True),
        ("x/" + "n" * 510, False),
        ("x/a\\b", False),
        ("x/a\x7f", False),
        ("x/a\x1f", False),
        ("x/a b", True),
        ("x/~", True),
        ("x/\u00e9", True),
        ("x/dir/", True),
    ],
)
def test_names_of_records(name: str, right: bool) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"")
    if right:
        entries, _ = read_directory(buffer)
        assert [entry.name for entry in entries] == [name]
    else:
        with pytest.raises(ZipError, match="is not a name that PyTorch writes"):
            read_directory(buffer)


def test_records_begin_at_multiples_of_64_without_waste() -> None:
    for length in range(1, 80):
        tensors = [OutputTensor(n, "uint8", (length,), inline=bytes(length)) for n in ("a", "b")]
        file = layout_pt("x.pt", [TensorSlot("a"), TensorSlot("b")], tensors)
        raw = whole(file)
        assert all(one.offset % 64 == 0 for one in file.tensors)
        entries, end = read_directory(io.BytesIO(raw))
        starts = data_places(io.BytesIO(raw), entries, end)
        for entry, start in zip(entries, starts, strict=True):
            least = entry.header + 30 + len(entry.name) + 4
            assert start % 64 == 0
            assert 0 <= start - least < 64
            assert bytes(raw[start : start + entry.packed]) is not None
        assert [
            start for e, start in zip(entries, starts, strict=True) if e.name.startswith("x/data/")
        ] == [one.offset for one in file.tensors]


def test_places_in_a_store_are_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted where headers are not at hand, and asked for where that is not sure."""
    asked: list[int] = []
    monkeypatch.setattr(zip_directory, "is_remote", lambda _file: True)
    monkeypatch.setattr(zip_directory, "is_here", lambda _file, _at, _count: False)
    monkeypatch.setattr(zip_directory, "fetch_places", lambda _file, at, _count: asked.extend(at))
    for raw, sure in ((laid_out(), True), (zipped(), False)):
        monkeypatch.setattr(zip_directory, "is_remote", lambda _file: False)
        expected = places(raw)
        monkeypatch.setattr(zip_directory, "is_remote", lambda _file: True)
        asked.clear()
        assert places(raw) == expected
        headers = [entry.header for entry in read_directory(io.BytesIO(raw))[0]]
        assert asked == ([] if sure else [max(0, at - 24) for at in headers])
        if sure:
            blank = bytearray(raw)
            for at in headers:
                blank[at : at + 30] = bytes(30)  # nothing of them is read
            assert places(blank) == expected
    monkeypatch.setattr(zip_directory, "is_here", lambda _file, _at, _count: True)
    with pytest.raises(ZipError):
        places(blank)


@pytest.mark.parametrize("alike", [False, True])
def test_what_is_laid_out_by_torchs_rules_is_read(alike: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    tensors = [
        OutputTensor("a", "uint8", (3,), inline=b"abc"),
        OutputTensor("b", "float32", (0, 2), inline=b""),
        OutputTensor("c", "float16", (2, 1), inline=b"1234"),
    ]
    value = {"a": TensorSlot("a"), "none": None, "c": TensorSlot("c"), "b": TensorSlot("b")}
    raw = whole(layout_pt("x.pt", value, tensors))
    path.write_bytes(raw)
    found: Any = read_torch(str(path), alike=alike)
    assert list(found) == ["a", "none", "c", "b"]
    assert found["none"] is None
    assert found["a"] == TensorRef(str(path), raw.index(b"abc"), "uint8", (3,))
    assert found["c"] == TensorRef(str(path), raw.index(b"1234"), "float16", (2, 1))
    assert (found["b"].dtype, found["b"].shape) == ("float32", (0, 2))


PICKLED = b"\x80\x02}X\1\0\0\0a" + tensor(b"0", 4) + b"s."
RECORDS = {"x/data.pkl": PICKLED, "x/byteorder": b"little", "x/data/0": bytes(16)}


@pytest.mark.parametrize(
    ("records", "method", "match"),
    [
        (RECORDS, 0, None),
        ({**RECORDS, "x/version": b"3"}, 0, None),
        (RECORDS, 8, "data.pkl is compressed"),
        ({**RECORDS, "x/byteorder": b"big"}, 0, "big-endian"),
        ({**RECORDS, "x/byteorder": b"little "}, 0, "big-endian"),
        ({**RECORDS, "x/code/a.py": b""}, 0, "TorchScript"),
        ({**RECORDS, "x/constants.pkl": b""}, 0, "TorchScript"),
        ({**RECORDS, "x/Code/a.py": b""}, 0, "TorchScript"),
        ({**RECORDS, "x/my/code/a.py": b""}, 0, None),
        (
            {**RECORDS, "y/version": b"3"},
            0,
            "is not inside the single top-level folder of the archive",
        ),
        (
            {**RECORDS, "version": b"3"},
            0,
            "is not inside the single top-level folder of the archive",
        ),
        (
            {**RECORDS, "/version": b"3"},
            0,
            "is not inside the single top-level folder of the archive",
        ),
        (
            {**RECORDS, "x/../version": b"3"},
            0,
            "is not inside the single top-level folder of the archive",
        ),
        ({**RECORDS, "x/..version": b"3"}, 0, None),
        ({"x/data/0": bytes(16)}, 0, "data.pkl is missing"),
        ({"x/data.pkl": PICKLED}, 0, "the record data/0 is missing"),
        ({**RECORDS, "x/data/0": bytes(15)}, 0, "should have 16 bytes but has 15"),
        ({**RECORDS, "x/data/0": bytes(17)}, 0, None),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_records_of_a_file_of_torch(
    records: dict[str, bytes], method: int, match: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    if match is None:
        found: Any = read_torch(str(path))
        assert found["a"].shape == (4,)
        return
    with pytest.raises(BridgeError, match=match) as caught:
        read_torch(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("numel", "right"), [(16 << 20, True), ((16 << 20) + 1, False)])
def test_tensors_of_a_small_file_claim_64_mib_at_most(
    numel: int, right: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    size = b"K\0J" + struct.pack("<i", numel) + b"\x85K\0\x85"
    expanded = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(b"0", 4) + size + b"\x89NtR"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}X\1\0\0\0a" + expanded + b"s.")
        archive.writestr("x/data/0", bytes(16))
    if right:
        found: Any = read_torch(str(path))
        assert found["a"].strides == (0,)
        return
    with pytest.raises(BridgeError, match="far more data than the file holds"):
        read_torch(str(path))


@pytest.mark.parametrize(("count", "harmless"), [(50, True), (51, False)])
def test_pickles_of_one_zip_are_bounded(count: int, harmless: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"x/{number}.pkl", b"\x80\x02}.")
    report = scan(str(path))
    assert report.harmless is harmless
    assert ("more than 50 pickles" in report.problem) is not harmless


@pytest.mark.parametrize(
    ("raw", "candidate"),
    [
        (b"\x80\x02N.", True),
        (b"\x80\x05N.", True),
        (b"\x80\x06N.", False),
        (b"\x80", False),
        (b"PK\3\4", False),
        (b"text", False),
        (b"", False),
        (bytes(zipped()), True),
        (bytes(zipped()[:-1]), False),
        (bytes(zipped()) + b"x", True),
    ],
    ids=lambda value: str(value)[:16],
)
def test_which_files_may_hold_pickles(raw: bytes, candidate: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(raw)
    assert is_candidate(str(path), (".pt",)) is candidate
    assert is_candidate(str(path), ("file",))


# --- tars


def tar_header() -> bytearray:
    return bytearray(tarfile.TarInfo("storages").tobuf(tarfile.USTAR_FORMAT))


def of_python(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def test_a_tar_is_known_by_its_checksum_only() -> None:
    raw = tar_header()
    assert is_tar(raw)
    assert is_tar(bytes(raw) + b"more")
    assert not is_tar(raw[:511])
    assert not is_tar(b"")
    assert not is_tar(bytes(512))
    for at in range(0, 512, 7):
        changed = bytearray(raw)
        changed[at] ^= 1
        assert is_tar(changed) is of_python(bytes(changed))
        assert not is_tar(changed) or 148 <= at < 156


@pytest.mark.parametrize(
    "field",
    ["{:06o}\0 ", "{:07o}\0", " {:5o} \0", "+{:05o}\0 ", "0o{:04o}\0 ", "{:o}\0junk", "x{:05o}\0 "],
)
def test_spellings_of_the_checksum(field: str) -> None:
    raw = tar_header()
    raw[257:265] = bytes(8)  # as V7 has it
    total = sum(raw[:148]) + 256 + sum(raw[156:])
    raw[148:156] = field.format(total).encode().ljust(8, b" ")[:8]
    assert is_tar(raw) is of_python(bytes(raw))
    assert is_tar(raw) is not field.startswith("x")
    raw[148:156] = b"\x80" + total.to_bytes(7, "big")
    assert is_tar(raw)
    assert of_python(bytes(raw))


# --- safetensors


def safetensors(path: Path, header: Any, data: int = 0) -> str:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    return str(path)


def entry(low: int, high: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [high - low] if shape is None else shape,
        "data_offsets": [low, high],
    }


def test_tensors_lie_where_the_header_says(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 20, [3], "F32"),
        "a": entry(0, 8, [2, 2], "BF16"),
        "none": entry(8, 8, [0, 5]),
        "scalar": entry(20, 22, [], "F16"),
        "end": entry(22, 22, [0]),
    }
    path = safetensors(tmp_path / "x.safetensors", header, 22)
    start = 8 + len(json.dumps(header))
    assert read_safetensors(path) == {
        "b": TensorRef(path, start + 8, "float32", (3,)),
        "a": TensorRef(path, start, "bfloat16", (2, 2)),
        "none": TensorRef(path, start + 8, "uint8", (0, 5)),
        "scalar": TensorRef(path, start + 20, "float16", ()),
        "end": TensorRef(path, start + 22, "uint8", (0,)),
    }


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": entry(0, 4)}, 4, None),
        ({"a": entry(0, 4)}, 3, "truncated"),
        ({"a": entry(0, 4)}, 5, "truncated"),
        ({"a": entry(0, 4), "b": entry(3, 5)}, 5, "overlaps"),
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "overlaps"),
        ({"a": entry(1, 4)}, 4, "overlaps"),
        ({"a": entry(0, 4, [5])}, 4, "does not match its shape"),
        ({"a": entry(0, 4, [3])}, 4, "does not match its shape"),
        ({"a": entry(0, 4, [-4])}, 4, "does not consist of dtype"),
        ({"a": entry(-4, 0, [4])}, 4, "does not consist of dtype"),
        ({"a": {**entry(0, 1), "shape": [True]}}, 1, "does not consist of dtype"),
        ({"a": {**entry(0, 1), "dtype": 3}}, 1, "does not consist of dtype"),
        ({"a": {**entry(0, 1), "shape": 1}}, 1, "does not consist of dtype"),
        ({"a": {**entry(0, 1), "data_offsets": [0, 1, 1]}}, 1, "does not consist of dtype"),
        ({"a": [1]}, 1, "does not consist of dtype"),
        ({"a": entry(0, 1, [1] * 64)}, 1, None),
        ({"a": entry(0, 1, [1] * 65)}, 1, "more dimensions"),
        ({"a": entry(0, 0, [0, 2**63 - 1])}, 0, None),
        ({"a": entry(0, 0, [0, 2**63])}, 0, "more dimensions or bytes"),
        ({"a": entry(0, 0, [0, 2**61], "F32")}, 0, "more dimensions or bytes"),
        ({"a": entry(0, 1, dtype="X8")}, 1, "does not know"),
        ({"__metadata__": None}, 0, None),
        ({"__metadata__": {}}, 0, None),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"__metadata__": ["a"]}, 0, "__metadata__"),
        (b"[]", 0, "does not start with {"),
        (b" {}", 0, "does not start with {"),
        (b"{}  ", 0, None),
        (b"", 0, "starts with zeros"),
        (b'{"a": NaN}', 0, "is not valid JSON"),
        (b'{"a": 1, "a": 1}', 0, "unique names"),
        (b"{", 0, "is not valid JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers(header: Any, data: int, match: str | None, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x.safetensors", header, data)
    if match is None:
        read_safetensors(path)
        return
    with pytest.raises(BridgeError, match=match) as caught:
        read_safetensors(path)
    assert path in str(caught.value)


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x.safetensors", {"a": entry(0, 1, [2], "F4")}, 1)
    with pytest.raises(Refused, match="quantized"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "it is empty"),
        (b"\xff" * 7, "7 bytes, fewer"),
        (bytes(8), "starts with zeros"),
        (struct.pack("<Q", 3) + b"{}", "10 bytes, fewer"),
        (struct.pack("<Q", 2) + b"{}", None),
    ],
)
def test_lengths(raw: bytes, match: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    if match is None:
        assert read_safetensors(str(path)) == {}
        return
    with pytest.raises(BridgeError, match=match):
        read_safetensors(str(path))


@pytest.mark.parametrize(("length", "short"), [(511, True), (512, False), (513, False)])
def test_a_text_in_the_place_of_weights(length: int, short: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"a" * length)
    with pytest.raises(BridgeError) as caught:
        read_safetensors(str(path))
    assert ("is a short text" in str(caught.value)) is short
    assert ("fewer than its header announces" in str(caught.value)) is not short


def test_headers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_bridge.formats.safetensors._MAX_HEADER_BYTES", 10)
    assert read_safetensors(safetensors(tmp_path / "a", b"{}" + b" " * 8)) == {}
    with pytest.raises(BridgeError, match="11 bytes, more than the allowed 10"):
        read_safetensors(safetensors(tmp_path / "a", b"{}" + b" " * 9))


@pytest.mark.parametrize("first", [None, 0, 8, 4088])
def test_what_is_laid_out_is_read(first: int | None, tmp_path: Path) -> None:
    for length in range(1, 12):
        tensors = [
            OutputTensor("a" * length, "float16", (2, length), inline=b"a" * 4 * length),
            OutputTensor("b", "uint8", (), inline=b"b"),
        ]
        file = layout_safetensors("x", tensors, first)
        path = tmp_path / "x"
        path.write_bytes(whole(file))
        found = read_safetensors(str(path))
        assert [(ref.offset, ref.dtype, ref.shape) for ref in found.values()] == [
            (one.offset, one.dtype, one.shape) for one in file.tensors
        ]
        begin = file.tensors[0].offset
        assert begin % 8 == 0 if first is None else begin % 4096 == first
        if first is None:
            assert begin < 8 + len(json.dumps({"__metadata__": {"format": "pt"}})) + 160


# --- elements, and JSON


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize(
    "strides", [None, (20, 5, 1), (1, 4, 12), (600, 1, 50), (0, 0, 0), (7, 70, 1)]
)
def test_boxes_of_tensors(dtype: str, strides: Any, tmp_path: Path) -> None:
    kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    flat = (np.arange(2000) % 251).astype(kind)
    path = tmp_path / "x"
    path.write_bytes(b"head" + flat.tobytes())
    shape = (3, 4, 5)
    steps = strides or (20, 5, 1)
    full = np.lib.stride_tricks.as_strided(flat, shape, tuple(flat.itemsize * s for s in steps))
    ref = TensorRef(str(path), 4, dtype, shape, strides)
    boxes: list[tuple[Any, Any]] = [
        ((0, 0, 0), shape),
        ((1, 2, 3), (2, 2, 2)),
        ((2, 0, 4), (1, 4, 1)),
        ((0, 3, 0), (3, 1, 5)),
        ((1, 1, 1), (0, 2, 2)),
        ((0, 1, 0), (3, 3, 1)),
    ]
    with path.open("rb") as file:
        for start, size in boxes:
            read = read_box(file, ref, start, size)
            place = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            assert read.dtype == full.dtype
            assert read.shape == size
            assert np.array_equal(read, full[place])


@pytest.mark.parametrize("short", [1, 2, 9])
def test_a_file_that_is_too_short(short: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(16 - short))
    ref = TensorRef(str(path), 0, "float32", (4,))
    with path.open("rb") as file:
        with pytest.raises(BridgeError, match=f"x is {short} bytes? too short"):
            read_box(file, ref, (0,), (4,))
        assert read_box(file, ref, (0,), (1,)).tolist() == [0.0]


def test_boxes_do_not_read_far_gaps(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.count += size or 0
            return super().read(size)

    data = np.arange(10_000, dtype=np.float32)
    for stride, most in ((4, 4 * 4 * 50), (5, 4 * 4 * 50), (190, 4 * 4 * 50)):
        file = Counting(data.tobytes())
        ref = TensorRef("x", 0, "float32", (50,), (stride,))
        assert read_box(file, ref, (0,), (50,)).tolist() == data[: 50 * stride : stride].tolist()
        assert file.count <= most


def test_json_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_json(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parse_json(b"[" * 65 + b"]" * 65) is not None
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 66 + b"]" * 66)
    assert parse_json(b"[" * 66 + b"]" * 66, depth=None) is not None
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 100_000, depth=None)
    assert parse_json(b"1" * 40) == int("1" * 40)
    assert parse_json(b"-" + b"1" * 39) == -int("1" * 39)
    with pytest.raises(ValueError, match="a number has 41 digits"):
        parse_json(b"1" * 41)


@pytest.mark.parametrize(
    ("text", "memory"),
    [("", 0), ("{", 200), ("[", 72), (":", 200), (",", 64), ("{[:,", 536), ("{{", 400)],
)
def test_the_memory_of_json_is_estimated(
    text: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    need = 2 * sys.getsizeof(f'"{text}"') + memory
    for most, right in ((need, True), (need - 1, False)):
        monkeypatch.setattr("neox_bridge.formats.bounded_json._MOST_BYTES", most)
        if right:
            assert parse_json(f'"{text}"'.encode()) == text
        else:
            with pytest.raises(ValueError, match="parsing it would take about"):
                parse_json(f'"{text}"'.encode())


@pytest.mark.parametrize(
    ("value", "depth"),
    [(1, 0), ([], 0), ([1], 1), ([[]], 1), ([[1]], 2), ({"a": [1]}, 2), ([1, {"a": {"b": []}}], 3)],
)
def test_how_deeply_a_value_nests(value: Any, depth: int) -> None:
    assert not deeper(value, depth)
    assert depth == 0 or deeper(value, depth - 1) is True
