"""Pickles that would run something, or that try to break the reader; each with its name."""

import struct


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def running(command: str) -> dict[str, bytes]:
    """Pickles that run a shell command under Python's own unpickler."""
    system = b"cos\nsystem\n"
    args = _text(command) + b"\x85"
    call = system + args + b"R"
    return {
        "reduce": b"\x80\x02" + call + b".",
        "protocol 0": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "inst": b"(" + _text(command) + b"ios\nsystem\n.",
        "obj": b"(" + system + _text(command) + b"o.",
        "stack global": b"\x80\x04" + _text("os") + _text("system") + b"\x93" + args + b"R.",
        "nested": b"\x80\x02](}" + _text("k") + call + b"se.",
        "an argument": b"\x80\x02cbuiltins\nlist\n" + call + b"\x85\x85R.",
        "a key": b"\x80\x02}" + call + b"Ns.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n"
        + (system + _text("__call__") + b"\x86R" + args + b"R."),
        "build": b"\x80\x02ctypes\nSimpleNamespace\n)R}" + _text("a") + call + b"sb.",
        "popped": b"\x80\x02" + call + b"0N.",
        "eval": b"\x80\x02cbuiltins\neval\n"
        + (_text(f"__import__('os').system({command!r})") + b"\x85R."),
        "newobj": b"\x80\x02csubprocess\nPopen\n]("
        + b"".join(map(_text, command.split()))
        + b"e\x85\x81"
        + call
        + b"\x86.",
    }


CALL = b"cos\nsystem\n" + _text("exit 3") + b"\x85"
RECORDS: dict[str, bytes] = {
    "newobj": b"\x80\x02" + CALL + b"\x81.",
    "newobj_ex": b"\x80\x04" + CALL + b"}\x92.",
    "inst": b"(" + _text("exit 3") + b"ios\nsystem\n.",
    "obj": b"(cos\nsystem\n" + _text("exit 3") + b"o.",
    "reduce": b"\x80\x02" + CALL + b"R.",
}

REFUSED: dict[str, bytes] = {
    "ext1": b"\x80\x02\x82\x01.",
    "ext2": b"\x80\x02\x83\x01\x00.",
    "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05N\x98.",
    "protocol 6": b"\x80\x06N.",
    "persistent id": b"Psomewhere\n.",
    "binary persistent id": b"\x80\x02NQ.",
    "nothing": b"",
    "no end": b"\x80\x02N",
    "empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "mark in between": b"\x80\x02K\x01(\x85.",
    "unknown opcode": b"\x80\x02\xff.",
    "memo": b"\x80\x02h\x07.",
    "appends to a dict": b"\x80\x02}K\x01a.",
    "items of a list": b"\x80\x02]K\x01K\x02s.",
    "half an item": b"\x80\x02}(K\x01u.",
    "list as key": b"\x80\x02}]K\x01s.",
    "set in a tuple as key": b"\x80\x04}\x8f\x85K\x01s.",
    "arguments that are none": b"\x80\x02cos\nsystem\nNR.",
    "class by number": b"\x80\x04K\x01K\x02\x93.",
    "100 MB string": b"\x80\x02X\x00\x00\x00\x06abc.",
    "4 GB string": b"\x80\x02X\xff\xff\xff\xff.",
    "8 EB bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "long line": b"I" + b"1" * (2 << 20) + b"\n.",
    "not a number": b"Ix\n.",
    "not utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "wide tuple as key": b"\x80\x02}(" + b"K\x01" * 600 + b"tK\x01s.",
    "deep tuple as key": b"\x80\x02}" + b"K\x01" + b"\x85" * 600 + b"K\x01s.",
    "exponential key": b"\x80\x02}" + b"K\x01" + b"2\x86" * 40 + b"K\x01s.",
    "shared lists, copied": b"\x80\x02cbuiltins\nlist\nq\x000("
    + b"N" * 100_000
    + b"lq\x010("
    + b"h\x00h\x01\x85R" * 101
    + b"l.",
}

N = 100_000
_FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\n"
DEEP: dict[str, bytes] = {
    "lists": b"\x80\x02" + b"]" * N + b"a" * (N - 1) + b".",
    "tuples": b"\x80\x02)" + b"\x85" * N + b".",
    "dicts": b"\x80\x02" + b"}N" * N + b"}" + b"s" * N + b".",
    "records": b"\x80\x02cx\ny\n" + b")R" * N + b".",
    "states": b"\x80\x02" + b"cx\ny\n)R" * N + b"b" * (N - 1) + b".",
    "frozensets": b"\x80\x04" + b"(" * N + b"\x91" * N + b".",
    "marks": b"\x80\x02" + b"(" * N + b"l" * N + b".",
    "rebuilt types": b"\x80\x02"
    + _FROM_TYPE
    + b"q\x00"
    + b"(h\x00N" * N
    + b")"
    + b"Nt" * N
    + b"R.",
    "equal sets": b"\x80\x04\x8f(" + (b"(" * N + b"\x91" * N) * 2 + b"\x90.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a tuple in itself": b"\x80\x02]q\x00h\x00\x85a.",
}
