"""Reads the stream that torch.save wrote before 1.6: five pickles, then raw storages.

Source: torch/serialization.py, ``_legacy_save`` and ``_legacy_load``: magic number, protocol
version, system information, the object, the storages' keys; then, for each key in this order,
the number of elements as int64 and the elements.
"""

import struct
from functools import partial
from typing import BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickles import (
    Context,
    Global,
    PickledTensor,
    PickleError,
    StorageRef,
    load,
    storage_ref,
)
from neox_bridge.formats.torch_zip import Claims, not_whole, place
from neox_bridge.stores.paths import open_file, size_of
from neox_bridge.tensors.dtypes import BY_NAME
from neox_bridge.tensors.tensor_ref import TensorRef

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_legacy(path: str) -> object:
    """The value of a file, with a ``TensorRef`` for each tensor. Nothing in the file is run.

    Raises:
        BridgeError: The file is truncated, damaged or big-endian. The message names it.
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        try:
            return _read(path, file)
        except PickleError as error:
            raise not_whole(path, str(error)) from None


def _read(path: str, file: BinaryIO) -> object:
    context = Context(lambda pickled: pickled)
    if load(file, context=context) != MAGIC:
        raise BridgeError(
            f"{path} is a pickle that torch.save did not write. Load it in the program that "
            "wrote it, and save its state dict with torch.save."
        )
    if load(file, context=context) != _PROTOCOL:
        raise PickleError("its protocol version is not 1001")
    system = load(file, context=context)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BridgeError(
            f"{path} was written on a big-endian machine. Load it with torch.load on a "
            "little-endian machine and save it again with torch.save."
        )
    start = file.tell()
    storages: dict[str, StorageRef] = {}
    persistent = partial(_persistent, storages=storages)
    load(file, persistent, context=context)
    records = _records(file, storages, load(file, context=context))
    file.seek(start)  # the places are known only now, so read the object again
    claims = Claims(file)

    def tensor(pickled: PickledTensor) -> TensorRef:
        offset, size = records[pickled.storage.key]
        return claims.take(place(pickled, path, offset, size))

    context.tensor = tensor
    return load(file, persistent, context=context)


def _persistent(pid: object, storages: dict[str, StorageRef]) -> object:
    """Note a storage by its key, or return the class of a module that has its source text."""
    match pid:
        case ("module", Global() as factory, *_):
            return factory
    storage = storage_ref(pid)
    first = storages.setdefault(storage.key, storage)
    if first.dtype != storage.dtype:
        raise PickleError(f"storage {storage.key[:40]} is used with two element types")
    return storage


def _records(
    file: BinaryIO, storages: dict[str, StorageRef], keys: object
) -> dict[str, tuple[int, int]]:
    """The offset and the size in bytes of the elements of each storage."""
    if not isinstance(keys, list):
        raise PickleError("the keys of its storages are not a list")
    end = size_of(file)
    records = {}
    for key in keys:
        if not isinstance(key, str) or key not in storages or key in records:
            raise PickleError("the keys of its storages do not match its tensors")
        dtype = storages[key].dtype
        if dtype not in BY_NAME:
            raise PickleError(f"a storage has the unknown type {dtype[:40]}")
        raw = file.read(8)
        numel = struct.unpack("<q", raw)[0] if len(raw) == 8 else -1
        offset, size = file.tell(), numel * BY_NAME[dtype].itemsize
        if numel < 0 or offset + size > end:
            raise PickleError(f"storage {key[:40]} extends past the end of the file (truncated?)")
        records[key] = (offset, size)
        file.seek(offset + size)
    if missing := [key for key in storages if key not in records]:
        raise PickleError(f"storage {missing[0][:40]} is missing")
    return records
