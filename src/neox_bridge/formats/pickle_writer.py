"""Writes the pickle of a ``.pt`` file in protocol 2, as torch.save does.

It uses only opcodes that ``torch.load`` with ``weights_only=True`` accepts
(torch/_weights_only_unpickler.py). CPython's ``pickletools`` describes the opcodes.
"""

import re
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

from neox_bridge.formats.pickles import Global, PickleError, Record
from neox_bridge.tensors.dtypes import BY_NAME
from neox_bridge.tensors.tensor_ref import row_major

_BATCH = 1000  # items that one opcode sets or appends, as in CPython
_LINE = re.compile("[!-~]+")  # names that protocol 2 can hold
_MOST = 2_000_000  # written values; a tuple may contain another one 100 times, and so on
_ENCODE = Global("_codecs", "encode")
_ORDERED_DICT = Global("collections", "OrderedDict")
_SET = Global("__builtin__", "set")  # Python 2's name, which protocol 2 uses for builtins
_FROZEN_SET = Global("__builtin__", "frozenset")
_BYTEARRAY = Global("__builtin__", "bytearray")
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_UNTYPED = Global("torch.storage", "UntypedStorage")
_U32 = struct.Struct("<I")
_SHORT = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}  # by length


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """The place of the tensor with this name."""

    name: str


def numpy_array(data: bytes, dtype: str, shape: Sequence[int]) -> Record:
    """A value that ``torch.load`` reads as a numpy array, with numpy 1 and 2.

    data: the elements in row-major order. dtype: byte order, kind and size, such as "<u4".
    Source: numpy's ``array_reduce`` and ``arraydescr_reduce``; numpy 2 keeps the old module name
    ``numpy.core.multiarray`` for such files.
    """
    order, code = dtype[0], dtype[1:]
    kind = Record(Global("numpy", "dtype"), (code, False, True))
    kind.state = (3, order, None, None, None, -1, -1, 0)
    empty = (Global("numpy", "ndarray"), (0,), b"b")
    array = Record(Global("numpy.core.multiarray", "_reconstruct"), empty)
    array.state = (1, tuple(shape), kind, False, data)
    return array


@dataclass(slots=True)
class _Writer:
    """memo: places by ``_identity``. places: how many there are, with those that nobody recalls.

    alive: temporary values whose id is in the memo. frames: what all tensors of a dtype have.
    """

    slots: Mapping[str, tuple[str, tuple[int, ...]]]
    out: list[bytes] = field(default_factory=list)
    memo: dict[object, int] = field(default_factory=dict)
    places: int = 0
    keys: dict[str, str] = field(default_factory=dict)
    alive: list[object] = field(default_factory=list)
    frames: dict[str, tuple[bytes, bytes, bytes, bytes]] = field(default_factory=dict)
    left: int = field(default_factory=lambda: _MOST)


def dump(
    value: object, slots: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[bytes, tuple[str, ...]]:
    """Write a pickle.

    Args:
        value: Consists of None, bool, int, float, str, bytes, bytearray, list, tuple, dict, set,
            frozenset, OrderedDict, ``Global``, ``Record`` and ``TensorSlot``. A Record is written
            as it was read, with its name, arguments, items and state.
        slots: The dtype and shape of each tensor by its name. Each is contiguous and has its own
            storage.

    Returns:
        The pickle, and the names of the slots in the order of their storages ``0``, ``1``, …

    Raises:
        ValueError: A slot is missing from ``slots``.
        TypeError: The value contains something else.
        PickleError: The value is nested too deeply or would be much too long.
    """
    writer = _Writer(slots)
    writer.out.append(b"\x80\x02")
    try:
        _save(writer, value)
    except RecursionError:
        raise PickleError("a value is nested too deeply to write") from None
    writer.out.append(b".")
    return b"".join(writer.out), tuple(writer.keys)


def _save(writer: _Writer, value: object) -> None:
    writer.left -= 1
    if writer.left < 0:
        raise PickleError("a value has too many parts to write")
    if value is None:
        writer.out.append(b"N")
    elif isinstance(value, bool):
        writer.out.append(b"\x88" if value else b"\x89")
    elif isinstance(value, int):
        writer.out.append(_int(value))
    elif isinstance(value, float):
        writer.out.append(b"G" + struct.pack(">d", value))
    elif isinstance(value, tuple):
        _save_tuple(writer, value)
    elif (key := _identity(value)) in writer.memo:
        writer.out.append(_recall(writer.memo[key]))
    elif isinstance(value, str | Global):
        _save_text(writer, value)
        _remember(writer, key)
    elif isinstance(value, TensorSlot):
        _save_tensor(writer, value.name)
        _remember(writer, key)
    else:
        _save_object(writer, value, key)


def _identity(value: object) -> object:
    """The key by which equal values share a place in the pickle: contents, or the object's id.

    Immutable values go by their contents, because which equal strings are the same object differs
    from run to run.
    """
    return value if isinstance(value, str | Global | TensorSlot) else id(value)


def _remember(writer: _Writer, key: object) -> None:
    writer.memo[key] = writer.places
    writer.out.append(_place(writer))


def _place(writer: _Writer) -> bytes:
    """The next place in the memo. Files of PyTorch have places that nothing reads."""
    index = writer.places
    writer.places += 1
    return b"q%c" % index if index < 256 else b"r" + _U32.pack(index)


def _recall(index: int) -> bytes:
    return b"h%c" % index if index < 256 else b"j" + _U32.pack(index)


def _wide(opcode: bytes, number: int) -> bytes:
    return opcode + _U32.pack(number)


@lru_cache(4096)
def _int(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return struct.pack("<cB", b"K", value)
    if 0 <= value < 1 << 16:
        return struct.pack("<cH", b"M", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        return _wide(b"\x8b", len(data)) + data
    return struct.pack("<BB", 0x8A, len(data)) + data


def _save_text(writer: _Writer, value: "str | Global") -> None:
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        writer.out.append(_wide(b"X", len(data)) + data)
    elif _LINE.fullmatch(value.module) and _LINE.fullmatch(value.name):
        writer.out.append(f"c{value.module}\n{value.name}\n".encode())
    else:  # a line break in a name would begin opcodes, so write it as text, as protocol 4 does
        _save(writer, value.module)
        _save(writer, value.name)
        writer.out.append(b"\x93")


def _save_tuple(writer: _Writer, value: Sequence[object]) -> None:
    """Write a tuple. Its place in the memo is never read, as in files of PyTorch."""
    short = _SHORT.get(len(value))
    if short is None:
        writer.out.append(b"(")
    for item in value:
        _save(writer, item)
    writer.out.append(short or b"t")
    if value:
        writer.out.append(_place(writer))


def _save_object(writer: _Writer, value: object, key: object) -> None:
    if isinstance(value, bytes):
        _call(writer, _ENCODE, (value.decode("latin1"), "latin1"), key)
    elif isinstance(value, list):
        writer.out.append(b"]")
        _remember(writer, key)
        _append(writer, value)
    elif isinstance(value, OrderedDict):
        _call(writer, _ORDERED_DICT, (), key)
        _set_items(writer, value)
    elif isinstance(value, dict):
        writer.out.append(b"}")
        _remember(writer, key)
        _set_items(writer, value)
    elif isinstance(value, bytearray):
        _call(writer, _BYTEARRAY, (bytes(value).decode("latin1"), "latin1"), key)
    elif isinstance(value, set | frozenset):
        items = _ordered(value)
        writer.alive.append(items)
        _call(writer, _SET if isinstance(value, set) else _FROZEN_SET, (items,), key)
    elif isinstance(value, Record):
        _save_record(writer, value, key)
    else:
        raise TypeError(f"a {type(value).__name__} can't be written into a .pt file")


def _ordered(items: "set[Any] | frozenset[Any]") -> list[Any]:
    try:
        return sorted(items, key=lambda item: (str(type(item)), item))
    except TypeError:  # classes and records cannot be sorted
        return sorted(items, key=repr)


def _save_record(writer: _Writer, value: Record, key: object) -> None:
    if value.kwargs:  # NEWOBJ_EX of protocol 4, which readers accept in protocol 2 too
        for part in (value.factory, value.args, value.kwargs):
            _save(writer, part)
        writer.out.append(b"\x92")
        _remember(writer, key)
    else:
        _call(writer, value.factory, value.args, key, b"\x81" if value.new else b"R")
    _append(writer, value.items)
    _set_items(writer, value.entries)
    if value.state is not None:
        _save(writer, value.state)
        writer.out.append(b"b")


def _call(
    writer: _Writer,
    factory: object,
    args: tuple[object, ...],
    key: object,
    opcode: bytes = b"R",
) -> None:
    _save(writer, factory)
    _save_tuple(writer, args)
    writer.out.append(opcode)
    _remember(writer, key)


def _append(writer: _Writer, items: Sequence[object]) -> None:
    for start in range(0, len(items), _BATCH):
        _batch(writer, [(item,) for item in items[start : start + _BATCH]], b"a", b"e")


def _set_items(writer: _Writer, entries: Mapping[Any, object]) -> None:
    pairs = list(entries.items())
    for start in range(0, len(pairs), _BATCH):
        _batch(writer, pairs[start : start + _BATCH], b"s", b"u")


def _batch(
    writer: _Writer, groups: Sequence[tuple[object, ...]], single: bytes, several: bytes
) -> None:
    if len(groups) > 1:
        writer.out.append(b"(")
    for group in groups:
        for value in group:
            _save(writer, value)
    writer.out.append(several if len(groups) > 1 else single)


def _save_tensor(writer: _Writer, name: str) -> None:
    """Write a call of ``_rebuild_tensor``. Dtypes without a storage class need its version 3.

    Put together here, since a checkpoint's pickle is mostly these.
    """
    if name not in writer.slots:
        raise ValueError(f"no tensor is called {name}")
    dtype, shape = writer.slots[name]
    known = BY_NAME[dtype]
    key = writer.keys.setdefault(name, str(len(writer.keys)))
    size = prod(shape) if known.storage else prod(shape) * known.itemsize
    frame = writer.frames.get(dtype)
    writer.out += (  # the order decides the places in the memo
        frame[0] if frame else _frame_head(writer, dtype),
        _text(writer, key),
        frame[1] if frame else _text(writer, "cpu"),
        _int(size),
        b"t",
        _place(writer),
        b"QK\0",  # the persistent id; the offset in the storage
        _numbers(writer, shape),
        _numbers(writer, row_major(shape)),
        frame[2] if frame else _frame_hooks(writer),
        _place(writer),
        frame[3] if frame else _frame_end(writer, dtype),
        _place(writer),
        b"R",
    )
    if frame is None:  # from now on it is read from the memo
        head, end = _frame_head(writer, dtype), _frame_end(writer, dtype)
        writer.frames[dtype] = (head, _text(writer, "cpu"), _frame_hooks(writer), end)


def _frame_head(writer: _Writer, dtype: str) -> bytes:
    storage = BY_NAME[dtype].storage
    rebuild, kind = (_REBUILD, Global("torch", storage)) if storage else (_REBUILD_V3, _UNTYPED)
    return _text(writer, rebuild) + b"((" + _text(writer, "storage") + _text(writer, kind)


def _frame_hooks(writer: _Writer) -> bytes:
    """The arguments for no gradient and no backward hooks."""
    return b"\x89" + _text(writer, _ORDERED_DICT) + b")R"


def _frame_end(writer: _Writer, dtype: str) -> bytes:
    return (b"" if BY_NAME[dtype].storage else _text(writer, Global("torch", dtype))) + b"t"


def _text(writer: _Writer, value: "str | Global") -> bytes:
    """A text as ``_save`` writes it."""
    index = writer.memo.get(value)
    if index is not None:
        return _recall(index)
    at = len(writer.out)
    _save(writer, value)
    encoded = b"".join(writer.out[at:])
    del writer.out[at:]
    return encoded


def _numbers(writer: _Writer, values: Sequence[int]) -> bytes:
    """A tuple of whole numbers as ``_save_tuple`` writes it."""
    encoded = b"".join(map(_int, values))
    if len(values) > 3:
        encoded = b"(" + encoded
    return encoded + _SHORT.get(len(values), b"t") + (_place(writer) if values else b"")
