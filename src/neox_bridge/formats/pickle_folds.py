"""Replaces the calls in a pickle by their values: plain containers and tensors.

All other calls become a ``Record``. No class is looked up or called: constructors are known by
module and name, and their values are built here.
"""

import codecs
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from neox_bridge.errors import BridgeError
from neox_bridge.tensors.dtypes import BY_STORAGE

MAX_STEPS = 1_000_000  # a step takes about 1 µs or 128 bytes; a tensor takes about 50 steps
# Values inside one tuple that is used as a key. Python hashes and compares tuples recursively, so
# this is half of its limit of 1000.
MAX_KEY_NODES = 500
_MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 63  # sizes in PyTorch are signed 64-bit numbers
_RECORD = 4  # steps of a Record, which has seven fields
_FEW = 1 << 64  # only a few integers up to here have the same hash


class PickleError(BridgeError):
    """A pickle is damaged, or this reader refuses it. The message does not name the file."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by its name. It is never looked up."""

    module: str
    name: str


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """A call in a pickle, which is recorded and not made.

    Attributes:
        factory: What would be called, usually a ``Global``.
        state: The argument of BUILD; None if there is no BUILD.
        items: What APPENDS would add.
        entries: What SETITEMS would add.
        new: Whether ``factory.__new__`` would be called instead of ``factory``.
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
    """A storage: the buffer that tensors view.

    Attributes:
        dtype: A name in ``dtypes.BY_NAME``, or PyTorch's name of an unknown kind of storage.
        numel: The size in elements.
        start: The first element, counted from the start of the record.
    """

    key: str
    dtype: str
    numel: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage. ``offset`` and ``strides`` are in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Watcher(Protocol):
    """Gets a call for everything that an ordinary unpickler would do, in the same order."""

    def named(self, name: Global) -> None: ...  # imported
    def called(self, factory: object, args: object) -> None: ...
    def changed(self, target: Global) -> None: ...  # items or attributes set


@dataclass(slots=True)
class Context:
    """State of reading: what replaces a tensor, and how many steps are left."""

    tensor: Callable[[PickledTensor], object]
    left: int = field(default_factory=lambda: MAX_STEPS)
    watch: Watcher | None = None

    def spend(self, cost: int) -> None:
        """Count steps, so that a small file cannot occupy the reader or fill the memory.

        Several pickles of a file may share one context and its steps.
        """
        self.left -= cost
        if self.left < 0:
            raise PickleError(f"reading the pickle takes more than {MAX_STEPS:,} steps, the limit")


def storage_ref(pid: object) -> StorageRef:
    """The storage that a persistent id of PyTorch names, with the view that old files may add.

    Source: torch/serialization.py, ``persistent_load`` of ``_load`` and ``_legacy_load``.
    """
    match pid:
        case ("storage", Global(module, name), str(key), str(), int(numel), *rest):
            dtype = BY_STORAGE[name].name if name in BY_STORAGE else name
            if (module, name) == ("torch.storage", "UntypedStorage"):
                dtype = "uint8"
            match rest:
                case [] | [None] if 0 <= numel < _MAX_SIZE:
                    return StorageRef(key, dtype, numel)
                case [(_, int(start), int(size))] if min(start, size) >= 0:
                    if max(start, size) < _MAX_SIZE:
                        return StorageRef(key, dtype, size, start)
    raise PickleError("a persistent id does not name a PyTorch storage")


def hashable(context: Context, value: Any, among: int) -> Any:
    """Check that a value can be hashed and compared within bounds, and return it.

    Python hashes tuples and compares sets recursively. The hash of a text is random for each
    process, but an attacker can choose other keys that all have the same hash.

    Args:
        among: The number of keys that this one may have to be compared with.
    """
    todo, seen, cost = [value], 0, 0
    while todo:
        item, seen = todo.pop(), seen + 1
        if isinstance(item, tuple | frozenset):
            todo.extend(islice(item, MAX_KEY_NODES + 1))
        elif isinstance(item, str | bytes):
            cost += len(item) >> 12
        elif isinstance(item, Global):
            cost += (len(item.module) + len(item.name)) >> 12
        elif isinstance(item, list | dict | set | bytearray):
            raise PickleError(f"the pickle uses a {type(item).__name__} as a key")
        elif isinstance(item, int):
            cost += item.bit_length() >> 13
        if seen + len(todo) > MAX_KEY_NODES:
            raise PickleError("the pickle uses a tuple that is too large as a key")
    small = isinstance(value, int) and abs(value) < _FEW
    if not (small or isinstance(value, str | bytes | float | Global | Record | None)):
        cost += among // 16
    context.spend(seen - 1 + cost)
    return value


def key_set(context: Context, items: Collection[Any], among: int = 0) -> set[Any]:
    """The items as a set. among: the number of keys to which they are added."""
    return {hashable(context, item, among + i) for i, item in enumerate(items)}


def fold(context: Context, factory: object, args: object, new: bool = False) -> object:
    """The value of ``factory(*args)`` for a known constructor; otherwise the call as a Record.

    new: whether the call is ``factory.__new__``, which ignores the items of a container.
    """
    if not isinstance(args, tuple):
        raise PickleError("the pickle is damaged: it calls something without an argument tuple")
    known = _FOLDS.get((factory.module, factory.name)) if isinstance(factory, Global) else None
    value = known(context, args) if known and not (new and args) else NotImplemented
    return record(context, factory, args, new=new) if value is NotImplemented else value


def record(
    context: Context,
    factory: object,
    args: tuple[object, ...],
    kwargs: dict[Any, object] | None = None,
    new: bool = False,
) -> Record:
    """The call as a Record. Counts its steps."""
    context.spend(_RECORD)
    return Record(factory, args, kwargs or {}, new=new)


def _sizes(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        return None
    if not all(type(i) is int for i in value):
        return None
    if any(i < 0 for i in value):
        raise PickleError("a tensor has a negative size or stride")
    if any(i >= _MAX_SIZE for i in value):
        raise PickleError("a tensor is larger than any storage")
    return value


def _rebuild_tensor(context: Context, args: tuple[Any, ...]) -> object:
    storage, offset, shape, strides = args[0], args[1], _sizes(args[2]), _sizes(args[3])
    dtype = args[6] if len(args) > 6 else None  # a dtype in v3, metadata in v2
    if not isinstance(storage, StorageRef) or type(offset) is not int:
        return NotImplemented
    if offset < 0:
        raise PickleError("a tensor has a negative offset")
    if shape is None or strides is None:
        return NotImplemented
    if len(shape) != len(strides):
        raise PickleError("a tensor does not have one stride for each dimension")
    if offset >= _MAX_SIZE:
        raise PickleError("a tensor starts past the end of its storage")
    context.spend(10 + len(shape))
    name = dtype.name if isinstance(dtype, Global) else storage.dtype
    return context.tensor(PickledTensor(storage, offset, shape, strides, name))


_FROM_TYPE = ("torch._tensor", "_rebuild_from_type_v2")


def _rebuild_from_type(context: Context, args: tuple[Any, ...]) -> object:
    """The tensor without its attributes. args: function, type, arguments, state."""
    factory = args[0]
    if not isinstance(factory, Global) or (factory.module, factory.name) == _FROM_TYPE:
        return NotImplemented
    rebuilt = fold(context, factory, args[2])
    return NotImplemented if isinstance(rebuilt, Record) else rebuilt


def _sequence(context: Context, args: tuple[Any, ...]) -> list[Any] | None:
    """The items of a constructor's only argument; None if they are the result of a call."""
    if not args:
        return []
    (items,) = args
    if isinstance(items, Record | Global):
        return None
    if not isinstance(items, list | tuple | set | frozenset):
        raise PickleError("a container is built from a value that is not a container")
    context.spend(len(items))
    return list(items)


def _container(make: "Callable[[Context, list[Any]], object]") -> "_Fold":
    def made(context: Context, args: tuple[Any, ...]) -> object:
        items = _sequence(context, args)
        return NotImplemented if items is None else make(context, items)

    return made


def _fold_dict(context: Context, args: tuple[Any, ...]) -> object:
    if args and isinstance(args[0], dict):
        context.spend(len(args[0]))
        return dict(args[0])
    return _pairs(context, args)


_pairs = _container(
    lambda context, items: {
        hashable(context, key, i): value for i, (key, value) in enumerate(items)
    }
)


def _fold_encode(context: Context, args: tuple[Any, ...]) -> object:
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        return NotImplemented
    context.spend(len(args[0]) // 128)
    return codecs.latin_1_encode(args[0])[0]


def _fold_bytes(context: Context, args: tuple[Any, ...]) -> object:
    if not args:
        return b""
    if isinstance(args[0], bytes):
        context.spend(len(args[0]) // 128)
        return args[0]
    return _fold_encode(context, args)


def _fold_bytearray(context: Context, args: tuple[Any, ...]) -> object:
    data = _fold_bytes(context, args)
    return bytearray(data) if isinstance(data, bytes) else NotImplemented


_Fold = Callable[[Context, tuple[Any, ...]], object]
_BUILTINS: dict[str, _Fold] = {
    "set": _container(key_set),
    "frozenset": _container(lambda context, items: frozenset(key_set(context, items))),
    "list": _container(lambda _, items: items),
    "tuple": _container(lambda _, items: tuple(items)),
    "dict": _fold_dict,
    "bytes": _fold_bytes,
    "bytearray": _fold_bytearray,
}
_FOLDS: dict[tuple[str, str], _Fold] = {
    ("collections", "OrderedDict"): _fold_dict,
    ("collections", "defaultdict"): lambda context, args: _fold_dict(context, args[1:]),
    ("torch", "Size"): _container(lambda _, items: tuple(items)),
    ("_codecs", "encode"): _fold_encode,
    ("torch._utils", "_rebuild_tensor"): lambda context, args: _rebuild_tensor(context, args[:4]),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda _, args: args[0],
    ("torch._utils", "_rebuild_parameter_with_state"): lambda _, args: args[0],
    _FROM_TYPE: _rebuild_from_type,
    **{(m, name): fold for m in ("builtins", "__builtin__") for name, fold in _BUILTINS.items()},
}
