"""Reads and lays out the zip container that torch.save writes since 1.6.

Source: torch 2.13's torch/serialization.py, caffe2/serialize/inline_container.cc and its miniz
(third_party/miniz-3.0.2); the zip format is PKWARE's APPNOTE 6.3. Everything is little-endian.
"""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickle_writer import dump
from neox_bridge.formats.pickles import PickledTensor, PickleError, load, storage_ref
from neox_bridge.formats.zip_directory import (
    ALIGNMENT,
    CENTRAL,
    DESCRIPTOR,
    DESCRIPTOR64,
    EXTRA,
    HAS_DESCRIPTOR,
    LOCAL,
    STORED,
    U32,
    UTF8,
    NoDirectory,
    ZipError,
    data_places,
    folded,
    read_directory,
)
from neox_bridge.stores.paths import open_file, size_of
from neox_bridge.tensors.dtypes import BY_NAME
from neox_bridge.tensors.pieces import OutputFile, OutputTensor
from neox_bridge.tensors.sharing import BLOCK_BYTES, residue
from neox_bridge.tensors.tensor_ref import TensorRef, is_contiguous

_CRC_IN_CENTRAL = 16  # bytes into the header
_PADDING = 0x4246  # "FB", the extra field with which PyTorch pads
_MADE_BY = 0x031E  # Unix, version 3.0, as miniz writes it
_ALIKE_BYTES = 64 << 10  # of a pickle that other files may have too
_CLAIM = 8  # times the file's bytes, and
_CLAIM_LEAST_BYTES = 64 << 20  # in any case, that its tensors may have together


@dataclass(frozen=True, slots=True)
class _Entry:
    """A stored record, by the place of its bytes in the file."""

    offset: int
    size: int


class Claims:
    """Bounds the total bytes of the tensors in a file, which may overlap.

    One element with strides of 0 can be a tensor of any size, which would be written in full.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.left = max(_CLAIM * size_of(file), _CLAIM_LEAST_BYTES)

    def take(self, ref: TensorRef) -> TensorRef:
        """Count a tensor and return it. Raises PickleError if the total is too large."""
        self.left -= ref.nbytes
        if self.left < 0:
            raise PickleError("its tensors claim far more data than the file holds")
        return ref


def read_pt(path: str, *, alike: bool = False, until: str | None = None) -> object:
    """The value of a zip ``.pt`` file, with a ``TensorRef`` for each tensor.

    Nothing in the file is run (see ``pickles``). Time and memory are bounded for every file.

    Args:
        alike: Whether other files may have the same pickle, which is then read only once.
        until: See ``pickles.load``.

    Raises:
        BridgeError: The file is truncated, compressed, big-endian or a TorchScript archive, or its
            records overlap or are too small for their tensors. The message has the way out.
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        try:
            return _value(path, file, _entries(path, file), alike, until)
        except PickleError as error:
            raise not_whole(path, str(error)) from None
        except NoDirectory:
            raise not_whole(path, "the zip directory at its end is missing (truncated?)") from None
        except ZipError as error:
            raise BridgeError(
                f"{path} is ambiguous: {error}, so different programs could read different "
                "contents from it. The file is damaged or malicious. Get it again from a source "
                "that you trust."
            ) from None


def not_whole(path: str, what: str) -> BridgeError:
    """The error for a damaged file. what: a clause that says what is wrong."""
    return BridgeError(f"{path} is not a complete PyTorch file: {what}. Download or copy it again.")


def place(tensor: PickledTensor, path: str, start: int, size: int) -> TensorRef:
    """The tensor in its file. Its storage has ``size`` bytes from the byte ``start``.

    Raises PickleError if the tensor or its storage reaches outside, or has an unknown dtype.
    """
    storage = tensor.storage
    if tensor.dtype not in BY_NAME or storage.dtype not in BY_NAME:
        unknown = tensor.dtype if storage.dtype in BY_NAME else storage.dtype
        raise PickleError(f"a tensor has the unknown element type {unknown[:40]}")
    unit, step = BY_NAME[storage.dtype].itemsize, BY_NAME[tensor.dtype].itemsize
    limit = (storage.start + storage.numel) * unit
    if limit > size:
        raise PickleError(f"storage {storage.key[:40]} should have {limit} bytes but has {size}")
    low = storage.start * unit + tensor.offset * step
    if 0 in tensor.shape:
        low = min(low, limit)
    else:
        last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.strides, strict=True))
        if low + (last + 1) * step > limit:
            raise PickleError(f"a tensor extends past the end of its storage {storage.key[:40]}")
    dense = is_contiguous(tensor.shape, tensor.strides)
    strides = None if dense else tensor.strides
    return TensorRef(path, start + low, tensor.dtype, tensor.shape, strides)


def _value(
    path: str, file: BinaryIO, entries: dict[str, _Entry], alike: bool, until: str | None
) -> object:
    if "data.pkl" not in entries:
        raise not_whole(path, "data.pkl is missing")
    if "byteorder" in entries:
        file.seek(entries["byteorder"].offset)
        order = file.read(min(entries["byteorder"].size, 16))
        if order != b"little":
            raise BridgeError(
                f"{path} was written on a big-endian machine (byteorder {order!r}). Load it with "
                "torch.load on a little-endian machine and save it again with torch.save."
            )

    claims = Claims(file)

    def tensor(pickled: PickledTensor) -> TensorRef:
        entry = entries.get(folded(f"data/{pickled.storage.key}"))
        if entry is None:
            raise PickleError(f"the record data/{pickled.storage.key[:40]} is missing")
        return claims.take(place(pickled, path, entry.offset, entry.size))

    pickled = entries["data.pkl"]
    file.seek(pickled.offset)
    if alike and pickled.size <= _ALIKE_BYTES:
        tensors = _flat(file.read(pickled.size))
        if tensors is not None:
            return {name: value and tensor(value) for name, value in tensors.items()}
        file.seek(pickled.offset)
    return load(file, storage_ref, tensor, pickled.size, until=until)


@lru_cache(64)
def _flat(pickled: bytes) -> "Mapping[object, PickledTensor | None] | None":
    """The value of a pickle of tensors by name, cached because layers have the same pickle."""
    value: Any = load(io.BytesIO(pickled), storage_ref)
    kinds = set(map(type, value.values())) if isinstance(value, dict) else {dict}
    return value if kinds <= {PickledTensor, type(None)} else None


def _entries(path: str, file: BinaryIO) -> dict[str, _Entry]:
    """The records by their names below the top folder of the archive.

    The names are in lower case, because PyTorch ignores the case.
    """
    listed, end = read_directory(file)
    names, tops = list[str](), set()
    for entry in listed:
        top, slash, name = entry.name.partition("/")
        tops.add(top)
        if not slash or not top or len(tops) > 1 or ".." in (top, *name.split("/")):
            raise ZipError(
                f"{entry.name[:80]!r} is not inside the single top-level folder of the archive"
            )
        names.append(folded(name))
    if any(name == "constants.pkl" or name.startswith("code/") for name in names):
        raise BridgeError(
            f"{path} is a TorchScript archive, which stores the weights inside a program. Load "
            "it with torch.jit.load and save its state_dict() with torch.save."
        )
    for entry in listed:
        if entry.method != STORED:
            name = entry.name.partition("/")[2]
            raise BridgeError(
                f"{path}: {name} is compressed, so its tensors cannot be read in place. Load the "
                "file with torch.load and save it again with torch.save, or unzip it and zip it "
                "with -0."
            )
    places = data_places(file, listed, end)
    return {
        name: _Entry(start, entry.size)
        for name, entry, start in zip(names, listed, places, strict=True)
    }


# --- laying out ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Planned:
    """A record to write.

    Attributes:
        data: Its bytes; None if they are those of the tensor.
        zip64: The extra field of numbers that exceed 32 bits. PyTorch writes it in both headers.
    """

    name: bytes
    size: int
    header: int
    start: int
    zip64: bytes
    data: bytes | None
    crc: int
    tensor: OutputTensor | None

    @property
    def end(self) -> int:
        """Where the data descriptor ends. Records without bytes have none."""
        descriptor = DESCRIPTOR64 if self.zip64 else DESCRIPTOR
        return self.start + self.size + (descriptor.size if self.size else 0)


def layout_pt(path: str, value: object, tensors: Sequence[OutputTensor]) -> OutputFile:
    """Lay out a ``.pt`` file as torch 2.13 writes it. The same input gives the same bytes.

    Records are not compressed, and tensors begin at multiples of 64 bytes, by PyTorch's extra field
    "FB". A tensor that can share blocks with the file of its source lies where that is possible
    (see ``planning.sharing``). PyTorch can compute the places of tensors instead of reading them
    (``config.load.calculate_storage_offsets``), which would then be wrong, so such a file has
    ``.format_version`` 0, which forbids it.

    As with ``torch.serialization.set_crc32_options(False)``, a data descriptor behind the data and
    the central directory have the sizes and the CRC-32, and the local header has zeros. The CRC of
    a tensor is 0 in both places, which ``crc_at`` names. Tensors with ``inline`` bytes and all
    other records have their true CRC. Dates are 0, as in files of PyTorch.

    Args:
        path: Relative to the target. Its stem is the top folder of the archive.
        value: See ``pickle_writer.dump``. Each tensor has its own storage ``data/K``, numbered in
            the order of the slots.

    Raises:
        ValueError: Slots and tensors do not match, which is an error of the caller.
    """
    pickled, order = dump(value, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    return layout_pickled(path, pickled, order, tensors)


def layout_pickled(
    path: str, pickled: bytes, order: Sequence[str], tensors: Sequence[OutputTensor]
) -> OutputFile:
    """``layout_pt`` of a pickled value. See ``pickle_writer.dump`` for the pickle and its slots."""
    by_name = {tensor.name: tensor for tensor in tensors}
    if sorted(order) != sorted(tensor.name for tensor in tensors):
        raise ValueError(f"{path}: the tensors aren't those of the value")
    shared = {tensor.name: residue(tensor) for tensor in tensors}
    moved = any(place is not None for place in shared.values())
    top = _top_folder(path)
    records: list[tuple[str, bytes | OutputTensor]] = [
        ("data.pkl", pickled),
        (".format_version", b"0" if moved else b"1"),
        (".storage_alignment", str(ALIGNMENT).encode()),
        ("byteorder", b"little"),
        *((f"data/{key}", by_name[name]) for key, name in enumerate(order)),
        ("version", b"3\n"),
    ]
    sizes = [(name, r.nbytes if isinstance(r, OutputTensor) else len(r)) for name, r in records]
    digest = hashlib.sha256(repr((top, sizes)).encode() + pickled).digest()
    serial = f"{int.from_bytes(digest, 'big') % 10**40:040d}".encode()
    planned, cursor = [], 0
    for name, record in [*records, (".data/serialization_id", serial)]:
        place = shared[record.name] if isinstance(record, OutputTensor) else None
        planned.append(_plan(f"{top}/{name}".encode(), record, cursor, place))
        cursor = planned[-1].end
    return _assemble(path, planned, cursor)


def _top_folder(path: str) -> str:
    """The stem of the file, or "archive" if the path is not ASCII, as in PyTorch."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return stem if stem.isascii() else "archive"


def _plan(name: bytes, record: bytes | OutputTensor, header: int, shared: int | None) -> _Planned:
    """header: where it begins. shared: the ``residue`` of a tensor."""
    tensor = record if isinstance(record, OutputTensor) else None
    data = record if isinstance(record, bytes) else record.inline
    size = tensor.nbytes if tensor else len(data or b"")
    data = data if size else b""
    zip64 = b""
    if size >= U32 or header >= U32:
        zip64 = _zip64(
            *((size, size) if size >= U32 else ()), *((header,) if header >= U32 else ())
        )
    least = header + LOCAL.size + len(name) + len(zip64) + EXTRA.size
    unit, rest = (ALIGNMENT, 0) if shared is None else (BLOCK_BYTES, shared)
    crc = zlib.crc32(data) if data else 0
    return _Planned(name, size, header, least + (rest - least) % unit, zip64, data, crc, tensor)


def _assemble(path: str, planned: Sequence[_Planned], directory_at: int) -> OutputFile:
    """Join headers and small records into literals, as long as possible between two tensors."""
    literals: list[tuple[int, bytes]] = []
    placed: list[OutputTensor] = []
    run, run_at, entry_at = b"", 0, directory_at
    for entry in planned:
        run += _local_header(entry)
        if entry.tensor is None:
            run += entry.data or b""
        else:
            crcs = (entry.start + entry.size + 4, entry_at + _CRC_IN_CENTRAL)
            known = entry.data is not None
            placed.append(entry.tensor.at(entry.start, () if known else crcs))
            literals.append((run_at, run))
            run, run_at = b"", entry.start + entry.size
        run += _descriptor(entry)
        entry_at += CENTRAL.size + len(entry.name) + len(entry.zip64)
    directory = b"".join(map(_central_header, planned))
    run += directory + _end(len(planned), directory_at, len(directory))
    literals.append((run_at, run))
    return OutputFile(path, run_at + len(run), tuple(literals), tuple(placed))


def _zip64(*numbers: int) -> bytes:
    """APPNOTE 4.5.3."""
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def _flags(entry: _Planned) -> int:
    return UTF8 | (HAS_DESCRIPTOR if entry.size else 0)


def _local_header(entry: _Planned) -> bytes:
    zip64 = entry.zip64
    fill = entry.start - entry.header - LOCAL.size - len(entry.name) - len(zip64) - EXTRA.size
    extra = zip64 + EXTRA.pack(_PADDING, fill) + b"Z" * fill
    fields = (0, _flags(entry), 0, 0, 0, 0, 0, 0, len(entry.name), len(extra))
    return LOCAL.pack(b"PK\x03\x04", *fields) + entry.name + extra


def _descriptor(entry: _Planned) -> bytes:
    """APPNOTE 4.3.9, with 64-bit sizes where the header has a zip64 field, as miniz does."""
    if not entry.size:
        return b""
    layout = DESCRIPTOR64 if entry.zip64 else DESCRIPTOR
    return layout.pack(b"PK\x07\x08", entry.crc, entry.size, entry.size)


def _central_header(entry: _Planned) -> bytes:
    size, zip64 = min(entry.size, U32), entry.zip64
    fields = (0, 0, _flags(entry), 0, 0, 0, entry.crc, size, size, len(entry.name), len(zip64))
    header = CENTRAL.pack(b"PK\x01\x02", *fields, 0, 0, 0, 0, min(entry.header, U32))
    return header + entry.name + zip64


def _end(count: int, at: int, size: int) -> bytes:
    """The end record of zip64 and its locator, which PyTorch always writes, and the classic one."""
    end64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, _MADE_BY, 45, 0, 0, count, count, size, at
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at + size, 1)
    short, size, at = min(count, 0xFFFF), min(size, U32), min(at, U32)
    return (
        end64 + locator + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, short, short, size, at, 0)
    )
