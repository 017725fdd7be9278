"""The unpickler: streams of opcodes that mostly make sense; Python is the oracle of plain ones."""

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

from bounds import ends, examples
from hypothesis import given
from hypothesis import strategies as st

from neox_bridge.formats.pickles import Global, PickleError, Record, load, storage_ref

_GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n",
    b"cbuiltins\nlist\n", b"cbuiltins\ntuple\n", b"cbuiltins\ndict\n", b"c__builtin__\nbytearray\n",
    b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch\nSize\n", b"ccopy_reg\n_reconstructor\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"ccollections\ndefaultdict\n", b"cbuiltins\nfrozenset\n", b"ctorch._utils\n_rebuild_tensor\n",
)  # fmt: skip
_STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
_PLAIN = (
    b"N", b"\x88", b"\x89", b"K\x05", b"M\xff\x01", b"J\xfe\xff\xff\xff", b"]", b"}", b")", b"\x8f",
    b"X\x01\x00\x00\x00a", b"\x8c\x02bc", b"C\x02\xff\x00", b"G?\xf0" + bytes(6), b"I12\n",
    b"L7L\n", b"F1.5\n", b"S'x'\n", b"V\xc3\xa9\n", b"\x8a\x02\xff\x00", b"U\x01z", b"I01\n",
)  # fmt: skip
# opcodes by how many values they take; nearly all leave one
_TAKE = {
    1: (b"\x85", b"2", b"q\x00", b"q\x01", b"r\x02\x00\x00\x00", b"p3\n", b"\x94"),
    2: (b"\x86", b"a", b"R", b"b", b"\x81", b"\x93"),
    3: (b"\x87", b"s", b"\x92"),
}
_GET = (b"h\x00", b"h\x01", b"j\x02\x00\x00\x00", b"g3\n")
_OF_MARK = (
    b"t",
    b"l",
    b"d",
    b"e",
    b"u",
    b"\x90",
    b"\x91",
    b"o",
    b"1",
    b"icollections\nOrderedDict\n",
)
_ODD = (
    b"0", b"Q", b"Px\n", b"\x82\x01", b"\x97", b"\x98", b"\x95" + bytes(8), b"\x80\x05", b".",
    b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"U\xff", b"\xff", b"I\n",
    b"\x8a\xff", b"q", b"B\x00\x00\x00\x10",
)  # fmt: skip


def _program(code: bytes, plain: bool) -> bytes:
    """A pickle from bytes: each chooses an opcode that can work there, and now and then any."""
    found, depth, marks = [b"\x80\x04"], 0, []  # type: ignore[var-annotated]
    for one, other in zip(code[::2], code[1::2], strict=False):
        kind = one % 16
        if kind < 5 or depth == 0:
            choices = _PLAIN if plain or kind > 1 else (*_GLOBALS, _STORAGE)
            found.append(choices[other % len(choices)])
            depth += 1
        elif kind < 12:
            takes = 1 + other % min(3, depth)
            choices = _TAKE[takes]
            op = choices[one // 16 % len(choices)]
            if plain and op in (b"R", b"\x81", b"\x93", b"\x92", b"b"):
                op = b"2"
            found.append(op)
            depth += {b"2": 1}.get(op, 0) if takes == 1 or op == b"2" else 1 - takes
        elif kind == 12:
            found.append(_GET[other % 4])
            depth += 1
        elif kind == 13:
            found.append(b"(")
            marks.append(depth)
            depth = 0
        elif kind == 14 and marks:
            op = _OF_MARK[other % (7 if plain else len(_OF_MARK))]
            found.append(op)
            depth = marks.pop() + (op not in (b"e", b"u", b"1"))
        elif not plain:
            found.append(_ODD[other % len(_ODD)])
    while marks:
        found.append(b"t")
        depth = marks.pop() + 1
    return b"".join(found) + (b"" if depth else b"N") + b"."


def _tree(value: Any, left: list[int]) -> Any:
    """The value as tuples, to compare; None for what is beyond some hundred nodes."""
    left[0] -= 1
    if left[0] < 0:
        return None
    if isinstance(value, dict):
        pairs = [(_tree(k, left), _tree(v, left)) for k, v in value.items()]
        return ("dict", pairs)
    if isinstance(value, list | tuple):
        return (type(value).__name__, [_tree(item, left) for item in value])
    if isinstance(value, set | frozenset):
        return (type(value).__name__, sorted(map(repr, value)))
    return (type(value).__name__, repr(value))


def _inert(value: object, left: list[int]) -> None:
    """Nothing but plain values and records."""
    plain = (int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset)
    assert (
        value is None
        or isinstance(value, (*plain, Record, Global))
        or (type(value).__name__ in ("PickledTensor", "StorageRef"))
    ), type(value)
    left[0] -= 1
    if left[0] > 0 and isinstance(value, list | tuple):
        for item in value[:10]:
            _inert(item, left)


def _read(data: bytes, **callbacks: Callable[..., object]) -> Any:
    with ends():
        return load(io.BytesIO(data), **callbacks)


@given(st.binary(max_size=120))
@examples(1600)
def test_any_program(code: bytes) -> None:
    try:
        value = _read(_program(code, plain=False), persistent=storage_ref)
    except PickleError as error:
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        _inert(value, [1000])


@given(st.binary(max_size=120))
@examples(1600)
def test_plain_programs_give_what_python_gives(code: bytes) -> None:
    data = _program(code, plain=True)
    try:
        theirs = pickle.loads(data)
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, KeyError, IndexError,
            EOFError, RecursionError, struct.error, UnicodeDecodeError):  # fmt: skip
        theirs = None
    try:
        ours = _read(data)
    except PickleError:
        return
    if theirs is not None:
        assert _tree(ours, [200]) == _tree(theirs, [200])


@given(st.binary(max_size=60))
@examples(600)
def test_any_bytes(data: bytes) -> None:
    try:
        _read(data, persistent=storage_ref)
    except PickleError:
        return
