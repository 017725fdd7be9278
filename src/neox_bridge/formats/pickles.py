"""Reads pickles without running them: no class is looked up, imported or called.

A small stack machine executes the opcodes. Containers and scalars become values of Python, a class
or function becomes a ``Global`` with its two names, and a call becomes a ``Record``. The calls of a
few known constructors, of plain containers and tensors, become their values (``pickle_folds``).

The opcodes are those of protocols 0 to 5 (CPython's ``pickletools``), except EXT*, which needs a
registry of the process, and out-of-band buffers, which files do not have.
"""

import io
import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from neox_bridge.formats.pickle_folds import (
    Context,
    Global,
    PickledTensor,
    PickleError,
    Record,
    StorageRef,
    fold,
    hashable,
    key_set,
    record,
    storage_ref,
)

__all__ = [
    "Context",
    "Global",
    "PickleError",
    "PickledTensor",
    "Record",
    "StorageRef",
    "load",
    "storage_ref",
]

_LAST_PROTOCOL = 5
_MAX_VALUE = 16 << 20  # bytes of one string
_MAX_LINE = 1 << 20  # bytes of a line in protocol 0
_STEP = 32  # bytes of a string per step; a text in Python takes up to four times as many


class _Bounded:
    """A stream that refuses a length beyond its end before it allocates memory."""

    def __init__(self, stream: BinaryIO, size: int | None, context: Context) -> None:
        if size is None:
            here = stream.tell()
            size = stream.seek(0, io.SEEK_END) - here
            stream.seek(here)
        self.left = size
        self._read, self._readline, self._spend = stream.read, stream.readline, context.spend

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise PickleError("the pickle ends in the middle of a value (truncated?)")
        if size > _STEP:
            if size > _MAX_VALUE:
                raise PickleError(
                    f"the pickle contains a string of {size:,} bytes, more than is allowed"
                )
            self._spend(size // _STEP)
        self.left -= size
        return self._read(size)

    def readline(self) -> bytes:
        line = self._readline(min(_MAX_LINE, self.left))
        self.left -= len(line)
        self._spend(len(line) // _STEP)
        return line


@dataclass(slots=True)
class _Machine:
    persistent: Callable[[object], object] | None
    context: Context
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)


def load(
    stream: BinaryIO,
    persistent: Callable[[object], object] | None = None,
    tensor: Callable[[PickledTensor], object] | None = None,
    size: int | None = None,
    context: Context | None = None,
    until: str | None = None,
) -> object:
    """Read the pickle at the position of a stream. The stream is then right behind it.

    Args:
        stream: A seekable stream.
        persistent: Turns a persistent id into a value; ``storage_ref`` for those of PyTorch.
        tensor: Returns the replacement of a tensor. Default: the ``PickledTensor`` itself.
        size: The most bytes to read. Default: up to the end of the stream.
        context: An existing context, for pickles that share their steps. ``tensor`` is then unused.
        until: A key of the outermost dictionary at which reading stops. The value contains the
            items before it. A pickle of another form is read completely.

    Raises:
        PickleError: The pickle is damaged, unknown or too large.
        Exception: Whatever the callbacks raise.
    """
    context = context or Context(tensor or (lambda pickled: pickled))
    machine = _Machine(persistent, context)
    bounded = _Bounded(stream, size, context)
    codes = _CODES if until is None else {**_CODES, **_stopping(until)}
    try:
        while (code := bounded.read(1)) != _STOP:
            context.left -= 1  # like spend(1), but faster
            if context.left < 0:
                context.spend(0)
            if code not in codes:
                raise PickleError(f"the pickle is damaged: {code!r} is not a pickle opcode")
            handler, argument = codes[code]
            handler(machine, argument(bounded) if argument else None)
        return machine.stack.pop()
    except _ReachedKey:
        pairs = _take_mark(machine)
        _set_items(machine, pairs)
        return machine.stack.pop()
    except IndexError:
        raise PickleError(
            "the pickle is damaged: it takes more values from its stack than it put there"
        ) from None
    except (ValueError, OverflowError, EOFError, struct.error, TypeError) as error:
        raise PickleError(f"the pickle is damaged: {str(error)[:200]}") from None


class _ReachedKey(Exception):
    """The key at which reading stops."""


def _stopping(until: str) -> "dict[bytes, _Code]":
    """The opcodes of text. They stop at this key of the outermost dictionary."""

    def push(machine: _Machine, arg: object) -> None:
        if arg == until and len(machine.marks) == 1 and len(machine.stack) % 2 == 0:
            (outermost,) = machine.marks
            if len(outermost) == 1 and isinstance(outermost[0], dict):
                raise _ReachedKey
        machine.stack.append(arg)

    return {code: (push, _CODES[code][1]) for code in _TEXT}


def _take_mark(machine: _Machine) -> list[Any]:
    items, machine.stack = machine.stack, machine.marks.pop()
    return items


def _take(machine: _Machine, count: int) -> tuple[Any, ...]:
    values = tuple(machine.stack[-count:])
    if len(values) < count:
        raise IndexError
    del machine.stack[-count:]
    return values


def _push_value(machine: _Machine, arg: object) -> None:
    machine.stack.append(arg)


def _constant(make: Callable[[], object]) -> "_Handler":
    return lambda machine, _: machine.stack.append(make())


def _mark(machine: _Machine, _arg: object) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, _arg: object) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        _take_mark(machine)  # POP also removes a mark on top, as in CPython


def _pop_mark(machine: _Machine, _arg: object) -> None:
    _take_mark(machine)


def _duplicate(machine: _Machine, _arg: object) -> None:
    machine.stack.append(machine.stack[-1])


def _put(machine: _Machine, index: int) -> None:
    if index < 0:
        raise PickleError("the pickle is damaged: it stores a value at a negative memo index")
    machine.memo[index] = machine.stack[-1]


def _get(machine: _Machine, index: int) -> None:
    if index not in machine.memo:
        raise PickleError("the pickle is damaged: it reads a memo entry that it never stored")
    machine.stack.append(machine.memo[index])


def _memoize(machine: _Machine, _arg: object) -> None:
    _put(machine, len(machine.memo))


def _list(machine: _Machine, _arg: object) -> None:
    items = _take_mark(machine)
    machine.stack.append(items)


def _tuple(machine: _Machine, _arg: object) -> None:
    items = _take_mark(machine)
    machine.stack.append(tuple(items))


def _short_tuple(count: int) -> "_Handler":
    return lambda machine, _: machine.stack.append(_take(machine, count))


def _dict(machine: _Machine, _arg: object) -> None:
    pairs = _take_mark(machine)
    machine.stack.append({})
    _set_items(machine, pairs)


def _frozenset(machine: _Machine, _arg: object) -> None:
    items = _take_mark(machine)
    machine.stack.append(frozenset(key_set(machine.context, items)))


def _target(machine: _Machine) -> Any:
    """The value on top, which gets items or attributes."""
    target = machine.stack[-1]
    if machine.context.watch and isinstance(target, Global):
        machine.context.watch.changed(target)
    return target


def _extend(machine: _Machine, items: Iterable[object]) -> None:
    target = _target(machine)
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Record):
        target.items.extend(items)
    else:
        raise PickleError(f"the pickle is damaged: it appends to a {type(target).__name__}")


def _append(machine: _Machine, _arg: object) -> None:
    _extend(machine, _take(machine, 1))


def _appends(machine: _Machine, _arg: object) -> None:
    items = _take_mark(machine)
    _extend(machine, items)


def _add_items(machine: _Machine, _arg: object) -> None:
    items = _take_mark(machine)
    target = _target(machine)
    if isinstance(target, set):
        target.update(key_set(machine.context, items, len(target)))
    else:
        _extend(machine, items)


def _set_items(machine: _Machine, pairs: list[Any]) -> None:
    target = _target(machine)
    if not isinstance(target, dict | Record) or len(pairs) % 2:
        raise PickleError(
            f"the pickle is damaged: it sets items of a {type(target).__name__}, or a key "
            "without a value"
        )
    entries = target.entries if isinstance(target, Record) else target
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        entries[hashable(machine.context, key, len(entries))] = value


def _set_item(machine: _Machine, _arg: object) -> None:
    _set_items(machine, list(_take(machine, 2)))


def _set_marked_items(machine: _Machine, _arg: object) -> None:
    pairs = _take_mark(machine)
    _set_items(machine, pairs)


def _build(machine: _Machine, _arg: object) -> None:
    state = machine.stack.pop()
    target = _target(machine)
    if isinstance(target, Record):
        target.state = state
    # attributes of folded values, such as _metadata of a state dict, are not weights


def _named(machine: _Machine, module: str, name: str) -> Global:
    imported_name = Global(module, name)
    if machine.context.watch:
        machine.context.watch.named(imported_name)
    return imported_name


def _global(machine: _Machine, arg: str) -> None:
    module, _, name = arg.partition(" ")  # pickletools joins the two lines by a space
    machine.stack.append(_named(machine, module, name))


def _stack_global(machine: _Machine, _arg: object) -> None:
    module, name = _take(machine, 2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("the pickle is damaged: it names a class by a value that is not text")
    machine.stack.append(_named(machine, module, name))


def _call(machine: _Machine, factory: object, args: object, new: bool = False) -> None:
    if machine.context.watch:
        machine.context.watch.called(factory, args)
    machine.stack.append(fold(machine.context, factory, args, new))


def _reduce(machine: _Machine, _arg: object) -> None:
    factory, args = _take(machine, 2)
    _call(machine, factory, args)


def _new_object(machine: _Machine, _arg: object) -> None:
    factory, args = _take(machine, 2)
    _call(machine, factory, args, new=True)


def _new_object_ex(machine: _Machine, _arg: object) -> None:
    factory, args, kwargs = _take(machine, 3)
    if machine.context.watch:
        machine.context.watch.called(factory, args)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise PickleError("the pickle is damaged: it calls something without an argument tuple")
    machine.stack.append(record(machine.context, factory, args, kwargs, new=True))


def _instance(machine: _Machine, arg: str) -> None:
    args = tuple(_take_mark(machine))
    _global(machine, arg)
    _call(machine, machine.stack.pop(), args)


def _object(machine: _Machine, _arg: object) -> None:
    factory, *args = _take_mark(machine)
    _call(machine, factory, tuple(args))


def _persistent(machine: _Machine, pid: object) -> None:
    if machine.persistent is None:
        raise PickleError("the pickle refers to data outside the file (a persistent id)")
    machine.stack.append(machine.persistent(pid))


def _persistent_on_stack(machine: _Machine, _arg: object) -> None:
    _persistent(machine, machine.stack.pop())


def _protocol(_machine: _Machine, version: int) -> None:
    if version > _LAST_PROTOCOL:
        raise PickleError(f"the pickle uses protocol {version}, which this version does not know")


def _nothing(_machine: _Machine, _arg: object) -> None:
    """Ignore FRAME, a hint for buffered readers."""


def _refuse(_machine: _Machine, _arg: object) -> None:
    raise PickleError(
        "the pickle needs data of another process (an extension or an out-of-band buffer)"
    )


_Handler = Callable[[_Machine, Any], None]
_VALUES = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT "
    "BINFLOAT"
).split()
_REFUSED = ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(_VALUES, _push_value),
    **dict.fromkeys(_REFUSED, _refuse),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "MEMOIZE": _memoize,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_SET": _constant(set),
    "LIST": _list,
    "TUPLE": _tuple,
    "TUPLE1": _short_tuple(1),
    "TUPLE2": _short_tuple(2),
    "TUPLE3": _short_tuple(3),
    "DICT": _dict,
    "FROZENSET": _frozenset,
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _add_items,
    "SETITEM": _set_item,
    "SETITEMS": _set_marked_items,
    "POP": _pop,
    "DUP": _duplicate,
    "MARK": _mark,
    "POP_MARK": _pop_mark,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
    "INST": _instance,
    "OBJ": _object,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "PERSID": _persistent,
    "BINPERSID": _persistent_on_stack,
    "PROTO": _protocol,
    "FRAME": _nothing,
}
_STOP = b"."
_TEXT = (b"V", b"X", b"\x8c", b"\x8d")  # UNICODE and its binary forms
_Code = tuple[_Handler, Callable[[Any], Any] | None]
_CODES: dict[bytes, _Code] = {
    opcode.code.encode("latin-1"): (
        _HANDLERS[opcode.name],
        opcode.arg.reader if opcode.arg else None,
    )
    for opcode in pickletools.opcodes
    if opcode.name in _HANDLERS
}
