"""The zip container that torch.save writes since 1.6: read into references, and laid out.

Source: torch 2.13's torch/serialization.py, caffe2/serialize/inline_container.cc and its miniz
(third_party/miniz-3.0.2); the zip format is PKWARE's APPNOTE 6.3. Everything is little-endian.
"""

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.formats.dtypes import BY_NAME
from neox_bridge.formats.pickles import PickledTensor, PickleError, load, storage_ref
from neox_bridge.formats.tensor_ref import TensorRef, is_contiguous

_LOCAL = struct.Struct("<4sHHHHHIIIHH")  # APPNOTE 4.3.7
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 1
_MAX_PICKLE = 256 << 20  # bytes of data.pkl, which is read into memory


@dataclass(frozen=True, slots=True)
class _Entry:
    """A stored record: where its bytes lie in the file."""

    offset: int
    size: int


def read_pt(path: str) -> object:
    """The value of a zip ``.pt`` file, with a ``TensorRef`` in each tensor's place.

    Nothing in the file is run: see ``pickles``. Raises BridgeError, naming the file and the way
    out, for one that is truncated, compressed, a TorchScript archive, big-endian, or whose
    records overlap or are too small for their tensors; OSError where it can't be read.
    """
    with open(path, "rb") as file:
        try:
            entries = _entries(path, file)
            return _value(path, file, entries)
        except PickleError as error:
            raise not_whole(path, str(error)) from None


def not_whole(path: str, what: str) -> BridgeError:
    """The error of a damaged file. what: a clause that says what is wrong."""
    return BridgeError(f"{path} isn't a whole torch file: {what}. Copy it again.")


def place(tensor: PickledTensor, path: str, start: int, size: int) -> TensorRef:
    """The tensor in its file, whose storage is the ``size`` bytes from the byte ``start`` on.

    Raises PickleError where the tensor or its storage reaches outside, or has an unknown dtype.
    """
    storage = tensor.storage
    if tensor.dtype not in BY_NAME or storage.dtype not in BY_NAME:
        unknown = tensor.dtype if storage.dtype in BY_NAME else storage.dtype
        raise PickleError(
            f"a tensor has elements of {unknown[:40]}, which this reader doesn't know"
        )
    unit, step = BY_NAME[storage.dtype].itemsize, BY_NAME[tensor.dtype].itemsize
    limit = (storage.start + storage.numel) * unit
    if limit > size:
        raise PickleError(f"storage {storage.key[:40]} should have {limit} bytes and has {size}")
    low = storage.start * unit + tensor.offset * step
    if 0 in tensor.shape:
        low = min(low, limit)
    else:
        last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.strides, strict=True))
        if low + (last + 1) * step > limit:
            raise PickleError(f"a tensor reaches beyond its storage {storage.key[:40]}")
    dense = is_contiguous(tensor.shape, tensor.strides)
    strides = None if dense else tensor.strides
    return TensorRef(path, start + low, tensor.dtype, tensor.shape, strides)


def _value(path: str, file: BinaryIO, entries: dict[str, _Entry]) -> object:
    if "constants.pkl" in entries or any(name.startswith("code/") for name in entries):
        raise BridgeError(
            f"{path} is a TorchScript archive, whose weights lie inside a program. "
            "Load it with torch.jit.load and torch.save its state_dict()."
        )
    if "data.pkl" not in entries:
        raise not_whole(path, "it has no data.pkl")
    if "byteorder" in entries:
        order = _read(file, entries["byteorder"], 16)
        if order != b"little":
            raise BridgeError(
                f"{path} was written on a big-endian machine (byteorder {order!r}). "
                "Load it with torch and torch.save it on a little-endian one."
            )

    def tensor(pickled: PickledTensor) -> TensorRef:
        entry = entries.get(f"data/{pickled.storage.key}")
        if entry is None:
            raise PickleError(f"the record data/{pickled.storage.key[:40]} is missing")
        return place(pickled, path, entry.offset, entry.size)

    return load(io.BytesIO(_read(file, entries["data.pkl"], _MAX_PICKLE)), storage_ref, tensor)


def _read(file: BinaryIO, entry: _Entry, most: int) -> bytes:
    if entry.size > most:
        raise PickleError(f"a record has {entry.size:,} bytes, and {most:,} are allowed")
    file.seek(entry.offset)
    return file.read(entry.size)


def _entries(path: str, file: BinaryIO) -> dict[str, _Entry]:
    """The records by their names below the archive's top folder, whatever that is called."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error):
        raise not_whole(path, "it has no zip directory at its end (truncated?)") from None
    entries: dict[str, _Entry] = {}
    tops, free = set(), 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        top, slash, name = info.orig_filename.partition("/")
        tops.add(top)
        if not slash or len(tops) > 1 or "\\" in name or ".." in (top, *name.split("/")):
            raise PickleError(f"{info.orig_filename[:80]!r} isn't below the archive's one folder")
        if name in entries:
            raise PickleError(f"the record {name[:80]!r} stands in it twice")
        if info.compress_type != zipfile.ZIP_STORED:
            raise BridgeError(
                f"{path}: {name} is compressed, and tensors can't be read in place. "
                "Load the file with torch and torch.save it again, or unzip it and zip it with -0."
            )
        entry = _locate(file, info)
        if info.header_offset < free or entry.offset + entry.size > end:
            raise PickleError(f"the record {name[:80]!r} overlaps another or reaches outside")
        free = entry.offset + entry.size
        entries[name] = entry
    return entries


def _locate(file: BinaryIO, info: zipfile.ZipInfo) -> _Entry:
    """Where a record's bytes begin, which only its local header tells."""
    file.seek(info.header_offset)
    raw = file.read(_LOCAL.size)
    if len(raw) < _LOCAL.size:
        raise PickleError("a record lies outside the file")
    signature, _, flags, method, *_, name_size, extra_size = _LOCAL.unpack(raw)
    name = file.read(name_size)
    if signature != _LOCAL_SIGNATURE or method != zipfile.ZIP_STORED or flags & _ENCRYPTED:
        raise PickleError(f"the record {info.orig_filename[:80]!r} has no header of its own")
    if (
        info.compress_size != info.file_size
        or name.decode("utf-8", "replace") != info.orig_filename
    ):
        raise PickleError(f"the record {info.orig_filename[:80]!r} differs from the directory")
    return _Entry(info.header_offset + _LOCAL.size + name_size + extra_size, info.file_size)
