"""Reads pickles without running them: no class is looked up, imported or called.

The stream's opcodes drive a small stack machine. Containers and scalars become Python's own;
a class or function becomes a ``Global`` (its two names); what a pickle would have called becomes
a ``Record`` of the call. A few constructors, those of plain containers and of tensors, are
known by name and folded to the value that they stand for.
"""

import codecs
import io
import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.formats.dtypes import BY_STORAGE

MAX_OPCODES = 50_000_000  # also bounds the items that folding a constructor may copy
MAX_KEY_NODES = 1000  # values inside one tuple used as a key: hashing is recursive, so bounded


class PickleError(BridgeError):
    """A pickle that is damaged or that this reader doesn't accept: one sentence, no file name."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name; never looked up."""

    module: str
    name: str


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """A call that a pickle asks for, written down instead of made.

    factory: what would be called, mostly a ``Global``.
    state: what BUILD would have set; None where there was no BUILD.
    items, entries: what APPENDS and SETITEMS would have added.
    new: whether ``factory.__new__`` rather than ``factory`` would be called.
    """

    factory: object
    args: tuple[object, ...] = ()
    kwargs: dict[Any, object] = field(default_factory=dict)
    state: object = None
    items: list[object] = field(default_factory=list)
    entries: dict[Any, object] = field(default_factory=dict)
    new: bool = False

    def __repr__(self) -> str:
        known = isinstance(self.factory, Global)
        return f"<Record {self.factory if known else type(self.factory).__name__}>"


@dataclass(frozen=True, slots=True)
class StorageRef:
    """The buffer that tensors view. numel, start: in elements of dtype, start from the record's."""

    key: str
    dtype: str
    numel: int
    location: str
    start: int = 0


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage. offset and strides: in elements of dtype."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _Bounded:
    """A stream that refuses a length beyond its end before memory is set aside for it."""

    def __init__(self, stream: BinaryIO) -> None:
        here = stream.tell()
        self.end = stream.seek(0, io.SEEK_END)
        self.tell, self.readline = stream.tell, stream.readline
        self._read = stream.read
        stream.seek(here)

    def read(self, size: int) -> bytes:
        if size > self.end - self.tell():
            raise PickleError("the pickle ends in the middle of a value")
        return self._read(size)


@dataclass(slots=True)
class _Machine:
    persistent: Callable[[object], object] | None
    tensor: Callable[[PickledTensor], object]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    left: int = MAX_OPCODES


def load(
    stream: BinaryIO,
    persistent: Callable[[object], object] | None = None,
    tensor: Callable[[PickledTensor], object] | None = None,
) -> object:
    """The value of the pickle at the stream's position, which is left right behind it.

    stream: seekable. persistent: turns a persistent id into a value, ``storage_ref`` for torch's.
    tensor: what to put in a tensor's place, by default the ``PickledTensor`` itself.
    Raises PickleError for what is damaged, unknown or too large, and what the callbacks raise.
    """
    machine = _Machine(persistent, tensor or (lambda pickled: pickled))
    try:
        for opcode, arg, _ in pickletools.genops(_Bounded(stream)):
            _spend(machine, 1)
            if opcode.name == "STOP":
                return machine.stack.pop()
            _HANDLERS[opcode.name](machine, arg)
    except IndexError:
        raise PickleError("the pickle takes more values than it gave") from None
    except KeyError as error:
        raise PickleError(f"the pickle uses what this reader doesn't know: {error}") from None
    except (ValueError, OverflowError, EOFError, struct.error, TypeError) as error:
        raise PickleError(f"the pickle is damaged: {str(error)[:200]}") from None
    raise PickleError("the pickle has no end")


def storage_ref(pid: object) -> StorageRef:
    """The storage that torch's persistent id names; with the view of old files, if it has one."""
    match pid:
        case ("storage", Global(module, name), key, location, int(numel), *rest):
            dtype = BY_STORAGE[name].name if name in BY_STORAGE else name
            if (module, name) == ("torch.storage", "UntypedStorage"):
                dtype = "uint8"
            match rest:
                case [] | [None]:
                    return StorageRef(str(key), dtype, numel, str(location))
                case [(_, int(start), int(size))]:
                    return StorageRef(str(key), dtype, size, str(location), start)
    raise PickleError("a persistent id isn't a torch storage's")


def _spend(machine: _Machine, cost: int) -> None:
    machine.left -= cost
    if machine.left < 0:
        raise PickleError(f"the pickle takes more than {MAX_OPCODES:,} steps")


# --- folding known constructors -------------------------------------------------------------


def _ints(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, tuple) or not all(type(i) is int and i >= 0 for i in value):
        return None
    return value


def _rebuild_tensor(machine: _Machine, args: tuple[Any, ...]) -> object:
    storage, offset, shape, strides = args[0], args[1], _ints(args[2]), _ints(args[3])
    dtype = args[6] if len(args) > 6 else None  # v3 has a dtype here, v2 a dict of metadata
    if not isinstance(storage, StorageRef) or type(offset) is not int or offset < 0:
        return NotImplemented
    if shape is None or strides is None or len(shape) != len(strides):
        return NotImplemented
    name = dtype.name if isinstance(dtype, Global) else storage.dtype
    return machine.tensor(PickledTensor(storage, offset, shape, strides, name))


def _rebuild_from_type(machine: _Machine, args: tuple[Any, ...]) -> object:
    rebuilt = _fold(machine, args[0], args[2])
    return NotImplemented if isinstance(rebuilt, Record) else rebuilt


def _sequence(machine: _Machine, args: tuple[Any, ...]) -> list[Any]:
    """The items of a constructor's only argument, a container that was itself in the pickle."""
    if not args:
        return []
    (items,) = args
    if not isinstance(items, list | tuple | set | frozenset):
        raise PickleError("a container is built from what isn't one")
    _spend(machine, len(items))
    return list(items)


def _fold_dict(machine: _Machine, args: tuple[Any, ...]) -> object:
    if args and isinstance(args[0], dict):
        _spend(machine, len(args[0]))
        return dict(args[0])
    return {_key(key): value for key, value in _sequence(machine, args)}


def _fold_encode(machine: _Machine, args: tuple[Any, ...]) -> object:
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        return NotImplemented
    _spend(machine, len(args[0]) // 8)
    return codecs.latin_1_encode(args[0])[0]


def _fold_bytes(machine: _Machine, args: tuple[Any, ...]) -> object:
    if not args:
        return b""
    if isinstance(args[0], bytes):
        _spend(machine, len(args[0]) // 8)
        return args[0]
    return _fold_encode(machine, args)


def _fold_bytearray(machine: _Machine, args: tuple[Any, ...]) -> object:
    data = _fold_bytes(machine, args)
    return bytearray(data) if isinstance(data, bytes) else NotImplemented


_Fold = Callable[[_Machine, tuple[Any, ...]], object]
_FOLDS: dict[tuple[str, str], _Fold] = {
    ("collections", "OrderedDict"): _fold_dict,
    ("collections", "defaultdict"): lambda machine, args: _fold_dict(machine, args[1:]),
    ("torch", "Size"): lambda machine, args: tuple(_sequence(machine, args)),
    ("_codecs", "encode"): _fold_encode,
    ("torch._utils", "_rebuild_tensor"): lambda machine, args: _rebuild_tensor(machine, args[:4]),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda _, args: args[0],
    ("torch._utils", "_rebuild_parameter_with_state"): lambda _, args: args[0],
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
_BUILTIN_FOLDS: dict[str, _Fold] = {
    "set": lambda machine, args: {_key(item) for item in _sequence(machine, args)},
    "frozenset": lambda machine, args: frozenset(_key(i) for i in _sequence(machine, args)),
    "list": _sequence,
    "tuple": lambda machine, args: tuple(_sequence(machine, args)),
    "dict": _fold_dict,
    "bytes": _fold_bytes,
    "bytearray": _fold_bytearray,
}
_FOLDS |= {(m, name): fold for m in ("builtins", "__builtin__") for name, fold in _BUILTIN_FOLDS.items()}


def _fold(machine: _Machine, factory: object, args: object, new: bool = False) -> object:
    """What calling ``factory(*args)`` gives, if it is known; else the call as a Record."""
    if not isinstance(args, tuple):
        raise PickleError("the pickle calls something with what isn't a tuple of arguments")
    fold = _FOLDS.get((factory.module, factory.name)) if isinstance(factory, Global) else None
    value = fold(machine, args) if fold else NotImplemented
    return Record(factory, args, new=new) if value is NotImplemented else value


# --- the stack machine ----------------------------------------------------------------------


def _key(value: Any) -> Any:
    """The value, if it can be hashed within bounds: Python's hash of a tuple is recursive."""
    todo, seen = [value], 0
    while todo:
        item, seen = todo.pop(), seen + 1
        if isinstance(item, tuple):
            todo.extend(item[: MAX_KEY_NODES + 1])
        elif isinstance(item, list | dict | set | bytearray):
            raise PickleError(f"the pickle uses a {type(item).__name__} as a key")
        if seen + len(todo) > MAX_KEY_NODES:
            raise PickleError("the pickle has too large a tuple as a key")
    return value


def _take_mark(machine: _Machine) -> list[Any]:
    items, machine.stack = machine.stack, machine.marks.pop()
    return items


def _take(machine: _Machine, count: int) -> tuple[Any, ...]:
    values = tuple(machine.stack[-count:])
    if len(values) < count:
        raise IndexError
    del machine.stack[-count:]
    return values


def _append(machine: _Machine, items: Iterable[object]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Record):
        target.items.extend(items)
    else:
        raise PickleError(f"the pickle appends to a {type(target).__name__}")


def _set_items(machine: _Machine, pairs: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict | Record) or len(pairs) % 2:
        raise PickleError(f"the pickle sets items of a {type(target).__name__} or half an item")
    entries = target.entries if isinstance(target, Record) else target
    entries.update(zip(map(_key, pairs[::2]), pairs[1::2], strict=True))


def _build(machine: _Machine, _arg: object) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Record):
        target.state = state
    # other values are folded: attributes set on them (a state dict's _metadata) mean no weights
