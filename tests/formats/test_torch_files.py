"""Torch's files: read as torch reads them, and laid out so that torch, Python and we read them."""

import errno
import io
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pt_files import tar_header, tensor_of

from neox_bridge.errors import BridgeError
from neox_bridge.formats import torch_file, torch_zip
from neox_bridge.formats.pickle_writer import TensorSlot, numpy_array
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.formats.torch_zip import layout_pt, read_pt
from neox_bridge.tensors.coverage import check_files
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece, box
from neox_bridge.tensors.tensor_ref import TensorRef

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
FILES = sorted(FIXTURES.glob("*/checkpoints/*/*.pt"))
OPTIMIZER = [path for path in FILES if path.name.endswith("optim_states.pt")]


def same(ours: Any, theirs: Any) -> bool:
    """Whether a value that was read here is what torch reads."""
    if isinstance(theirs, torch.Tensor):
        mine = tensor_of(ours)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (mine, theirs.detach())]
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(*bits)
    if isinstance(theirs, np.ndarray):
        return isinstance(ours, Record) and ours.state[-1] == theirs.tobytes()  # type: ignore[index]
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    plain = theirs is None or isinstance(theirs, int | float | str | bytes | set)
    return bool(ours == theirs) if plain else isinstance(ours, Record)


# --- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted({p.parent.parent.parent.name for p in FILES}))
def test_fixtures_are_read_as_torch_reads_them(folder: str) -> None:
    paths = [p for p in FILES if folder in p.parts and p not in OPTIMIZER]
    assert paths
    for path in paths:
        assert same(read_torch(str(path)), torch.load(path, weights_only=False)), path


@pytest.mark.parametrize("path", OPTIMIZER, ids=lambda path: f"{path.parts[-4]}-{path.name}")
def test_optimizer_files_open_without_deepspeed(path: Path) -> None:
    state = read_torch(str(path))["optimizer_state_dict"]  # type: ignore[index]
    (group,) = {len(v) for v in [state["single_partition_of_fp32_groups"]]}
    assert group
    assert all(isinstance(ref, TensorRef) for ref in state["single_partition_of_fp32_groups"])


BASE = torch.arange(24, dtype=torch.float32)
SAVED = {
    "shared": [BASE, BASE[4:8], BASE.view(4, 6)[:, 1:3]],
    "transposed": BASE.view(4, 6).t(),
    "expanded": torch.ones(1).expand(3, 2),
    "scalar": torch.tensor(3.5),
    "empty": [torch.empty(0), torch.empty(3, 0), BASE[24:]],
    "parameter": torch.nn.Parameter(BASE),
    "module": torch.nn.Linear(2, 3).state_dict(),
    "plain": {"a": (1, 2.5, None, True), "b": {3}, "c": "x", "d": OrderedDict(e=b"f")},
    "size": BASE.view(2, 12).size(),
    "numpy": np.arange(5),
    "lone": BASE,
    "column": BASE.view(24, 1).t(),
}
DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2 "
    "uint16 uint32 uint64 complex64 complex128"
).split()
SAVED |= {name: torch.tensor([0, 1, 2]).to(getattr(torch, name)) for name in DTYPES}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", SAVED)
def test_what_torch_saves_is_read(name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "any.pt"
    torch.save(SAVED[name], path, _use_new_zipfile_serialization=zipped)
    assert same(read_torch(str(path)), SAVED[name])


def test_strides_only_where_they_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([BASE.view(4, 6), BASE.view(4, 6).t(), BASE.view(1, 24)[:, :3]], path)
    refs: Any = read_torch(str(path))
    assert [ref.strides for ref in refs] == [None, (1, 6), None]


def test_an_object_from_a_stream(tmp_path: Path) -> None:
    """Saved to a stream the top folder is called archive."""
    buffer = io.BytesIO()
    torch.save({"a": BASE}, buffer)
    path = tmp_path / "x.pt"
    path.write_bytes(buffer.getvalue())
    assert same(read_torch(str(path)), {"a": BASE})


def test_views_in_old_files(tmp_path: Path) -> None:
    """Files of torch 0.x give storages as parts of others: ("view key", start, length)."""
    buffer = io.BytesIO()
    torch.save(BASE[:4].clone(), buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    old = b"K\x04Nt"  # numel 4, no view
    assert raw.count(old) == 1
    view = raw.replace(old, b"K\x04X\x01\x00\x00\x00vK\x01K\x03\x87t").replace(
        b"K\x00K\x04\x85", b"K\x00K\x03\x85"
    )
    path = tmp_path / "x.pt"
    path.write_bytes(view)
    theirs = torch.load(path, weights_only=False)
    assert theirs.tolist() == [1, 2, 3]
    assert same(read_torch(str(path)), theirs)


# --- refusing -------------------------------------------------------------------------------


def rezip(source: Path, target: Path, change: Any, method: int = zipfile.ZIP_STORED) -> str:
    """Write the records again. change: from (name, bytes) to such pairs."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            for renamed, data in change(name, old.read(name)):
                new.writestr(renamed, data)
    return str(target)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.pt"
    torch.save({"a": torch.arange(5.0), "b": torch.ones(2, dtype=torch.bool)}, path)
    return path


def test_other_zips_are_read(small: Path, tmp_path: Path) -> None:
    path = rezip(small, tmp_path / "new.pt", lambda name, data: [(f"other{name[5:]}", data)])
    assert same(read_torch(path), torch.load(small))


CHANGES: dict[str, tuple[Any, str]] = {
    "no pickle": (lambda n, d: [] if n.endswith("data.pkl") else [(n, d)], "data.pkl is missing"),
    "duplicate": (lambda n, d: [(n, d), (n, d)], "appears twice"),
    "big-endian": (
        lambda n, d: [(n, b"big" if n.endswith("byteorder") else d)],
        "big-endian machine",
    ),
    "no record": (lambda n, d: [] if n.endswith("data/1") else [(n, d)], "data/1 is missing"),
    "short record": (
        lambda n, d: [(n, d[:-1] if n.endswith("data/0") else d)],
        "should have 20 bytes but has 19",
    ),
    "script": (lambda n, d: [(n, d), ("small/code/x.py", b"")][: 1 + ("pkl" in n)], "TorchScript"),
    "constants": (
        lambda n, d: [(n, d), ("small/constants.pkl", b"")][: 1 + ("pkl" in n)],
        "TorchScript",
    ),
    "two folders": (lambda n, d: [(n.replace("small/v", "large/v"), d)], "single top-level folder"),
    "no folder": (lambda n, d: [(n.removeprefix("small/"), d)], "single top-level folder"),
    "outside": (lambda n, d: [(n.replace("small/v", "small/../v"), d)], "single top-level folder"),
    "bad pickle": (lambda n, d: [(n, d[:-9] if n.endswith("pkl") else d)], "ends in the middle"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", CHANGES)
def test_refused_zips(name: str, small: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    path = rezip(small, tmp_path / "new.pt", change)
    with pytest.raises(BridgeError, match=message) as caught:
        read_torch(path)
    assert path in str(caught.value)


def test_compressed(small: Path, tmp_path: Path) -> None:
    path = rezip(small, tmp_path / "new.pt", lambda n, d: [(n, d)], zipfile.ZIP_DEFLATED)
    with pytest.raises(BridgeError, match=r"is compressed.*zip it with -0"):
        read_torch(path)


@pytest.mark.parametrize("field", ["size", "offset"])
def test_overlapping_records(field: str, small: Path) -> None:
    """Directory entries that reach into the next record, or point at another one."""
    raw = bytearray(small.read_bytes())
    with zipfile.ZipFile(small) as archive:
        at = archive.start_dir
    at = raw.index(b"small/data/0", at) - 46
    if field == "size":
        raw[at + 20 : at + 28] = struct.pack("<II", 200, 200)
    else:
        raw[at + 42 : at + 46] = struct.pack("<I", 0)
    small.write_bytes(raw)
    with pytest.raises(BridgeError, match=r"overlaps|differs"):
        read_torch(str(small))


def test_last_record_in_the_directory(small: Path) -> None:
    raw = bytearray(small.read_bytes())
    at = raw.rindex(b"small/.data/serialization_id") - 46
    raw[at + 20 : at + 28] = struct.pack("<II", 200, 200)
    small.write_bytes(raw)
    with pytest.raises(
        BridgeError, match="overlaps another record or extends past the end of the data"
    ):
        read_torch(str(small))


def test_record_with_another_name(small: Path) -> None:
    raw = small.read_bytes()
    small.write_bytes(raw.replace(b"small/data/0", b"small/data/7", 1))
    with pytest.raises(BridgeError, match="does not match the directory"):
        read_torch(str(small))


def hand_made(path: Path, shape: bytes, strides: bytes, numel: int = 4, offset: int = 0) -> str:
    """A file with a float tensor of these pickled sizes over a storage of 4 elements."""
    pickled = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage"
        b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
        + bytes([numel])
        + b"tQK"
        + bytes([offset])
        + shape
        + strides
        + b"\x89NtR."
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(16))
        archive.writestr("x/version", b"3\n")
    return str(path)


def test_hand_made_files_are_read(tmp_path: Path) -> None:
    ref: Any = read_torch(hand_made(tmp_path / "x.pt", b"K\x03\x85", b"K\x01\x85", offset=1))
    assert (ref.shape, ref.dtype, ref.strides) == ((3,), "float32", None)


@pytest.mark.parametrize(
    ("shape", "strides", "numel", "offset"),
    [
        (b"K\x05\x85", b"K\x01\x85", 4, 0),
        (b"K\x03\x85", b"K\x02\x85", 4, 0),
        (b"K\x04\x85", b"K\x01\x85", 4, 1),
        (b"K\x04\x85", b"K\x01\x85", 5, 0),
        (b"K\x04\x85", b"K\x01\x85", 3, 0),
        (b")", b")", 4, 4),
        (b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85", b"K\x01\x85", 4, 0),
    ],
)
def test_tensors_beyond_their_storage(
    shape: bytes, strides: bytes, numel: int, offset: int, tmp_path: Path
) -> None:
    path = hand_made(tmp_path / "x.pt", shape, strides, numel, offset)
    with pytest.raises(BridgeError, match="storage"):
        read_torch(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_truncation_is_an_error(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(5.0)}, path, _use_new_zipfile_serialization=zipped)
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        words = r"is not a complete PyTorch file.*Download or copy it again\.|short text"
        with pytest.raises(BridgeError, match=words):
            read_torch(str(path))


@pytest.mark.filterwarnings("ignore:invalid escape")  # of Python 2's strings
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damage_never_raises_anything_else(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(5.0)}, path, _use_new_zipfile_serialization=zipped)
    raw, chance = path.read_bytes(), random.Random(0)
    for _ in range(1500):
        damaged = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(damaged)
        with suppress(BridgeError):
            value: Any = read_torch(str(path))
            for ref in value.values() if isinstance(value, dict) else ():
                assert not isinstance(ref, TensorRef) or ref.offset + 4 <= len(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it is empty"),
        (bytes(600), "starts with zeros"),
        (b"hello", "is a short text"),
        (b"\xff\xfe\0\1" * 200, "starts with b'.xff.xfe"),
        (b"\x80\x02K\x01.", "torch.save did not write"),
        (tar_header(b"x"), "is a tar"),
        (tar_header(b"x", magic=b""), "is a tar"),
        (tar_header(pickle.dumps(1, 2), magic=b""), "is a tar"),
        (bytes(257) + b"ustar" + bytes(250), "packed .tar."),  # no checksum
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PK\x03\x04" + bytes(30), "the zip directory at its end is missing"),
        (b"PK\x05\x06" + bytes(18), "data.pkl is missing"),
    ],
)
def test_other_files(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    with pytest.raises(BridgeError, match=message) as caught:
        read_torch(str(path))
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(BridgeError, match="cannot be read"):
            read_torch(str(path))


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(torch_file, "open_file", lambda _path: Broken())
    with pytest.raises(BridgeError, match=r"x\.pt cannot be read: Input/output error\."):
        torch_file.read_torch(str(tmp_path / "x.pt"))


def test_big_endian_legacy(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(BASE, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    at = raw.index(b"little_endian")
    path.write_bytes(raw[:at] + raw[at:].replace(b"\x88", b"\x89", 1))
    with pytest.raises(BridgeError, match="big-endian"):
        read_torch(str(path))


def stream_of(path: Path, storages: bytes, keys: list[str], protocol: int = 1001) -> str:
    """A pre-1.6 file with a hand-made object, and two floats for each key."""
    head = [0x1950A86A20F9469CFC6C, protocol, {"little_endian": True}]
    parts = [pickle.dumps(value, 2) for value in head]
    data = (struct.pack("<q", 2) + bytes(8)) * len(keys)
    path.write_bytes(b"".join([*parts, storages, pickle.dumps(keys, 2), data]))
    return str(path)


def storage(key: str, kind: str) -> bytes:
    return f"(Vstorage\nctorch\n{kind}\nV{key}\nVcpu\nK\x02NtQ".encode("latin1")


@pytest.mark.parametrize(
    ("objects", "keys", "message"),
    [
        ([("0", "FloatStorage"), ("0", "IntStorage")], ["0"], "two element types"),
        ([("0", "FloatStorage"), ("1", "FloatStorage")], ["0"], "storage 1 is missing"),
        ([("0", "FloatStorage")], ["0", "0"], "do not match its tensors"),
        ([("0", "FloatStorage")], ["1"], "do not match its tensors"),
        ([("0", "QInt8Storage")], ["0"], "unknown type QInt8Storage"),
        ([("0", "FloatStorage")], ["0"], ""),
    ],
)
def test_storages_of_old_files(
    objects: list[tuple[str, str]], keys: list[str], message: str, tmp_path: Path
) -> None:
    pickled = b"\x80\x02(" + b"".join(storage(*o) for o in objects) + b"l."
    path = stream_of(tmp_path / "x.pt", pickled, keys)
    if not message:
        assert isinstance(read_torch(path), list)
        return
    with pytest.raises(BridgeError, match=message):
        read_torch(path)


def test_other_protocol_of_old_files(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="is not 1001"):
        read_torch(stream_of(tmp_path / "x.pt", b"\x80\x02N.", [], 1002))


# --- laying out -----------------------------------------------------------------------------


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def outputs(tensors: dict[str, torch.Tensor]) -> list[OutputTensor]:
    """Tensors to come, without a source."""
    return [
        OutputTensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), random=1)
        for name, t in tensors.items()
    ]


def write(file: OutputFile, path: Path, tensors: dict[str, torch.Tensor], crc: bool = True) -> Path:
    """What an execution does with a planned file."""
    check_files([file])
    raw = bytearray(file.size)
    for offset, data in file.literals:
        raw[offset : offset + len(data)] = data
    for tensor in file.tensors:
        data = tensor.inline if tensor.inline is not None else raw_bytes(tensors[tensor.name])
        raw[tensor.offset : tensor.offset + tensor.nbytes] = data
        for at in tensor.crc_at if crc else ():
            assert raw[at : at + 4] == bytes(4)
            raw[at : at + 4] = struct.pack("<I", zlib.crc32(data))
    path.write_bytes(raw)
    return path


TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "empty": torch.zeros(0),
    "scalar": torch.tensor(3, dtype=torch.bfloat16),
    "big": torch.arange(40000.0),
    **{name: torch.tensor([0, 1, 2]).to(getattr(torch, name)) for name in DTYPES},
}
VALUE = {
    "module": OrderedDict((name, TensorSlot(name)) for name in TENSORS),
    "again": [TensorSlot("big")],
    "none": None,
    "plain": {"args": [1, 2.5, (3, -4, 1 << 40, True)], "s": {"x"}, "b": b"\x00\xff", "n": {}},
}


def with_tensors(value: Any) -> Any:
    if isinstance(value, TensorSlot):
        return TENSORS[value.name]
    if isinstance(value, dict):
        return type(value)((key, with_tensors(entry)) for key, entry in value.items())
    return [with_tensors(item) for item in value] if isinstance(value, list) else value


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return mine.dtype == theirs.dtype and raw_bytes(mine) == raw_bytes(theirs)
    if isinstance(theirs, dict):
        return (
            type(mine) is type(theirs)
            and list(mine) == list(theirs)
            and all(equal(mine[key], theirs[key]) for key in theirs)
        )
    if isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return bool(mine == theirs)


@pytest.fixture
def laid_out(tmp_path: Path) -> Path:
    file = layout_pt("step/x.pt", VALUE, outputs(TENSORS))
    return write(file, tmp_path / "x.pt", TENSORS)


@pytest.mark.parametrize(
    "options", [{"weights_only": True}, {"mmap": True}, {"weights_only": False}]
)
def test_torch_reads_it(options: dict[str, bool], laid_out: Path) -> None:
    assert equal(torch.load(laid_out, **options), with_tensors(VALUE))


def test_python_and_we_read_it(laid_out: Path) -> None:
    with zipfile.ZipFile(laid_out) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "x/data.pkl"
    assert same(read_torch(str(laid_out)), with_tensors(VALUE))


def test_without_crcs_torch_reads_it_all_the_same(tmp_path: Path) -> None:
    file = layout_pt("x.pt", VALUE, outputs(TENSORS))
    path = write(file, tmp_path / "x.pt", TENSORS, crc=False)
    assert equal(torch.load(path), with_tensors(VALUE))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "x/data/0"


def test_the_bytes_are_torchs(tmp_path: Path) -> None:
    """All but the serialization id and, behind it and in the directory, its CRC."""
    value = {"module": OrderedDict((name, TensorSlot(name)) for name in TENSORS), "i": [1, 2, "x"]}
    torch.save(with_tensors(value), tmp_path / "x.pt")
    theirs = (tmp_path / "x.pt").read_bytes()
    file = layout_pt("x.pt", value, outputs(TENSORS))
    ours = write(file, tmp_path / "y.pt", TENSORS).read_bytes()
    assert len(ours) == len(theirs)
    with zipfile.ZipFile(tmp_path / "y.pt") as archive:
        info = archive.getinfo("x/.data/serialization_id")
        digits = ours.index(archive.read(info), info.header_offset)
    entry = ours.rindex(b"x/.data/serialization_id") - 46
    may_differ = {*range(digits, digits + 40), *range(digits + 44, digits + 48)}
    may_differ |= set(range(entry + 16, entry + 20))
    differ = {i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b}
    assert differ - may_differ == set()


def test_crc_free_literals_are_torchs(tmp_path: Path) -> None:
    """Where a tensor's CRC goes, stands what torch leaves without CRCs: zeros."""
    tensors = {"a": TENSORS["a.weight"]}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    theirs = (tmp_path / "x.pt").read_bytes()
    file = layout_pt("x.pt", {"a": TensorSlot("a")}, outputs(tensors))
    (tensor,) = file.tensors
    assert len(tensor.crc_at) == 2
    assert all(theirs[at : at + 4] == bytes(4) for at in tensor.crc_at)
    assert theirs[tensor.offset :][:24] == raw_bytes(tensors["a"])


def test_same_input_same_bytes() -> None:
    first, second = (layout_pt("x.pt", VALUE, outputs(TENSORS)) for _ in range(2))
    assert first == second


def test_another_value_another_id() -> None:
    one, two = (layout_pt("x.pt", {"a": n}, []).literals[-1][1][-400:] for n in (1, 2))
    assert one != two


def test_inline_bytes_have_their_crc(tmp_path: Path) -> None:
    tensor = OutputTensor("a", "uint8", (5,), inline=b"hello")
    file = layout_pt("x.pt", {"a": TensorSlot("a")}, [tensor])
    assert file.tensors[0].crc_at == ()
    with zipfile.ZipFile(write(file, tmp_path / "x.pt", {})) as archive:
        assert archive.testzip() is None
        assert archive.read("x/data/0") == b"hello"


def test_a_file_without_tensors(tmp_path: Path) -> None:
    file = layout_pt("x.pt", {"module": None, "n": 3}, [])
    path = write(file, tmp_path / "x.pt", {})
    assert torch.load(path) == {"module": None, "n": 3}
    assert read_torch(str(path)) == {"module": None, "n": 3}


@pytest.mark.filterwarnings("error")
def test_numpy_arrays_load(tmp_path: Path) -> None:
    words = np.arange(7, dtype="<u4")
    value = {"rng": ("MT19937", numpy_array(words.tobytes(), "<u4", (7,)), 7)}
    loaded = torch.load(
        write(layout_pt("x.pt", value, []), tmp_path / "x.pt", {}), weights_only=False
    )
    assert (loaded["rng"][1] == words).all()


def test_slots_and_tensors_must_match() -> None:
    with pytest.raises(ValueError, match="no tensor is called b"):
        layout_pt("x.pt", TensorSlot("b"), [])
    with pytest.raises(ValueError, match="aren't those of the value"):
        layout_pt("x.pt", None, outputs({"a": BASE}))
    with pytest.raises(ValueError, match="aren't those of the value"):
        layout_pt("x.pt", TensorSlot("a"), outputs({"a": BASE}) * 2)


@pytest.mark.parametrize(("path", "top"), [("a/b.c.pt", "b.c"), ("b", "b"), ("ü.pt", "archive")])
def test_top_folder(path: str, top: str, tmp_path: Path) -> None:
    torch.save(1, tmp_path / os.path.basename(path))
    with zipfile.ZipFile(tmp_path / os.path.basename(path)) as archive:
        assert archive.namelist()[0] == f"{top}/data.pkl"
    assert f"{top}/data.pkl".encode() in layout_pt(path, 1, []).literals[0][1]


# --- where tensors are placed ---------------------------------------------------------------


def from_source(offset: int, shape: tuple[int, ...] = (40000,), **changes: Any) -> OutputTensor:
    piece = box(TensorRef("/source", offset, "float32", shape))
    return replace(OutputTensor("t", "float32", shape, (piece,)), **changes)


def placed_at(tensor: OutputTensor) -> int:
    file = layout_pt("x.pt", {"t": TensorSlot("t")}, [tensor])
    return file.tensors[0].offset


@pytest.mark.parametrize("offset", [0, 8, 64, 1000, 4096, 5000, 4096 * 77 + 4088])
def test_large_tensors_lie_as_in_their_source(offset: int) -> None:
    assert placed_at(from_source(offset)) % 4096 == offset % 4096


def test_a_later_part_of_a_tensor_counts_too() -> None:
    source = TensorRef("/source", 128, "float32", (400, 200))
    whole = OutputTensor("t", "float32", (400, 200))
    first = Piece(source, (100, 0), (50, 0), (300, 200))
    at = placed_at(replace(whole, pieces=(first,)))
    assert (at + 50 * 200 * 4 - (128 + 100 * 200 * 4)) % 4096 == 0


@pytest.mark.parametrize(
    "tensor",
    [
        from_source(1004),
        from_source(1000, (4000,)),
        from_source(1000, dtype="float16"),
        from_source(1000, divisor=2),
        from_source(1000, reduce="sum"),
        OutputTensor("t", "float32", (40000,), random=1),
        from_source(1000, pieces=(Piece(None, (0,), (0,), (40000,)),)),
    ],
    ids=["odd", "small", "cast", "divided", "summed", "random", "constant"],
)
def test_others_lie_at_64_bytes(tensor: OutputTensor) -> None:
    assert placed_at(tensor) % 64 == 0
    assert placed_at(tensor) < 1000


def test_torch_never_computes_where_moved_tensors_lie(tmp_path: Path) -> None:
    """torch's own arithmetic knows only multiples of 64; version 0 keeps it from being used."""
    tensors = {"a": torch.arange(3.0), "t": torch.arange(40000.0), "z": torch.arange(4.0)}
    value = {name: TensorSlot(name) for name in tensors}
    plain = outputs(tensors)
    file = layout_pt("x.pt", value, [plain[0], from_source(1000), plain[2]])
    path = write(file, tmp_path / "x.pt", tensors)
    from torch.utils.serialization import config

    before = config.load.calculate_storage_offsets
    config.load.calculate_storage_offsets = True
    try:
        assert equal(torch.load(path, mmap=True), tensors)
    finally:
        config.load.calculate_storage_offsets = before
    assert equal(torch.load(path), tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


# --- more than 4 GiB ------------------------------------------------------------------------


def test_more_than_4_gib(tmp_path: Path) -> None:
    """A sparse file, as torch reads it, Python's zipfile and we do."""
    numel = (1 << 32) + 5
    big = OutputTensor("big", "uint8", (numel,), random=1)
    file = layout_pt(
        "x.pt",
        {name: TensorSlot(name) for name in ("big", "small", "none")},
        [big, *outputs({"small": BASE, "none": torch.zeros(0)})],
    )
    check_files([file])
    path = tmp_path / "x.pt"
    with open(path, "wb") as out:
        for offset, data in file.literals:
            out.seek(offset)
            out.write(data)
        out.seek(file.tensors[1].offset)
        out.write(raw_bytes(BASE))
    assert path.stat().st_size == file.size
    ref: Any = read_pt(str(path))
    assert ref["big"].shape == (numel,)
    assert [ref[t.name].offset for t in file.tensors] == [t.offset for t in file.tensors]
    loaded = torch.load(path, mmap=True)
    assert loaded["big"].shape == (numel,)
    assert torch.equal(loaded["small"], BASE)


def test_headers_beyond_4_gib_are_torchs() -> None:
    """Bytes that torch 2.13 wrote for {"big": 4 GiB + 5, "small": 3 floats, "e": none}."""
    tensors = [
        OutputTensor("big", "uint8", ((1 << 32) + 5,), random=1),
        *outputs({"small": torch.zeros(3), "e": torch.zeros(0)}),
    ]
    file = layout_pt("big.pt", {name: TensorSlot(name) for name in ("big", "small", "e")}, tensors)
    assert [tensor.offset for tensor in file.tensors] == [832, 4294968256, 4294968384]
    assert file.size == 4294969353
    between = file.literals[1][1]
    assert between[:24].hex() == "504b070800000000" + "0500000001000000" * 2
    assert between[24 + 40 :][:16].hex() == "010008005d0300000100000046422b00"
    end = file.literals[-1][1]
    assert b"\xff" * 8 + bytes.fromhex("0a00140000000000000000000000d6020000") in end
    assert end[-22:].hex() == "504b0506000000000900090067020000ffffffff0000"


def test_directories_are_bounded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_bridge.formats.zip_directory._MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(BridgeError, match="directory is larger than"):
        read_torch(str(small))


def test_what_tensors_claim_is_bounded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "_CLAIM", 0)
    monkeypatch.setattr(torch_zip, "_CLAIM_LEAST_BYTES", 22)
    assert len(read_torch(str(small))) == 2  # type: ignore[arg-type]
    monkeypatch.setattr(torch_zip, "_CLAIM_LEAST_BYTES", 21)
    with pytest.raises(BridgeError, match="far more data"):
        read_torch(str(small))


def test_files_with_one_pickle_are_read_each_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pickle is gone through once; where tensors lie, and whether at all, is each file's."""
    loaded = []
    load = torch_zip.load

    def counted(*arguments: object) -> object:
        loaded.append(arguments)
        return load(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_zip, "load", counted)
    torch_zip._flat.cache_clear()
    values = [{"w": torch.full((2, 3), float(n)), "none": None} for n in range(3)]
    for number, value in enumerate(values):
        folder = tmp_path / ("long" * number)
        folder.mkdir(exist_ok=True)
        torch.save(value, folder / "a.pt")
        found = read_pt(str(folder / "a.pt"), alike=True)
        assert isinstance(found, dict)
        assert found["none"] is None
        ref = found["w"]
        assert ref.file == str(folder / "a.pt")
        assert np.fromfile(ref.file, "<f4", 6, offset=ref.offset).tolist() == [number] * 6
        found.clear()
    assert len(loaded) == 1
    raw = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(raw.replace(b"data/0", b"data/9"))
    with pytest.raises(BridgeError, match="data/0 is missing"):
        read_pt(str(tmp_path / "b.pt"), alike=True)
    assert len(loaded) == 1
