"""Pickles that would run something, or that try to break the reader; each with its name."""

import struct
from collections.abc import Callable


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def running(command: str) -> dict[str, bytes]:
    """Pickles that run a shell command under Python's own unpickler."""
    system = b"cos\nsystem\n"
    args = _text(command) + b"\x85"
    call = system + args + b"R"
    code = _text(f"__import__('os').system({command!r})")
    program = code + b"\x85R"
    inner = b"\x80\x02" + call + b"."
    nested = b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R."
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
        "eval": b"\x80\x02cbuiltins\neval\n" + program + b".",
        "exec": b"\x80\x02cbuiltins\nexec\n" + program + b".",
        "timeit": b"\x80\x02ctimeit\ntimeit\n" + _text("pass") + code + b"\x86R.",
        "profiler": b"\x80\x02ccProfile\nrun\n" + program + b".",
        "debugger": b"\x80\x02cbdb\nBdb\n)RX\x03\x00\x00\x00run"
        + (b"q\x000q\x010cbuiltins\ngetattr\nh\x01h\x00\x86R" + program + b"."),
        "a pickle in a pickle": b"\x80\x03cpickle\nloads\n" + nested,
        "a pickle in a pickle, in C": b"\x80\x03c_pickle\nloads\n" + nested,
        "memo overwritten": b"\x80\x02cbuiltins\nlen\nq\x000"
        + (system + b"q\x000h\x00" + args + b"R."),
        "memo out of order": b"\x80\x04"
        + (_text("system") + b"r\xff\xff\x00\x000" + _text("os") + b"j\xff\xff\x00\x00")
        + (b"\x93p99999\n0g99999\n" + args + b"R."),
        "newobj_ex": b"\x80\x04csubprocess\nPopen\n)}"
        + (_text("args") + _text(command) + b"s" + _text("shell") + b"\x88s\x92" + call + b"\x86."),
        "partial": b"\x80\x02cfunctools\npartial\n" + (system + _text(command) + b"\x86R)R."),
        "map": b"\x80\x02cbuiltins\nlist\ncbuiltins\nmap\n"
        + (system + b"(" + _text(command) + b"l\x86R\x85R."),
        "extension": b"\x80\x02ccopyreg\nadd_extension\n"
        + (_text("os") + _text("system") + b"J\x01\x00\x00\x10\x87R0")
        + (b"\x84\x01\x00\x00\x10" + args + b"R."),
        "then damaged": b"\x80\x02" + call + b"\xff.",
        "then cut off": b"\x80\x02" + call + b"X\xff\xff",
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
    "new object without arguments": b"\x80\x04cos\nsystem\nN}\x92.",
    "new object without keywords": b"\x80\x04cos\nsystem\n)N\x92.",
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


def _ints(values: "list[int]") -> bytes:
    """Each as LONG1, with None behind it: items of a dictionary."""
    parts = []
    for value in values:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        parts.append(b"\x8a" + bytes([len(data)]) + data + b"N")
    return b"".join(parts)


def _same_hash(count: int) -> bytes:
    """Keys (a, b) with one hash: CPython's is xxHash's of the items' hashes, which has an inverse.

    Source: CPython's Objects/tupleobject.c, tuplehash.
    """
    mask, first, second, fifth = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, None
    fifth = 2870177450012600261
    back = pow(second, -1, 1 << 64)

    def turn(acc: int, by: int) -> int:
        return ((acc << by) | (acc >> (64 - by))) & mask

    parts, a = [], 0
    while len(parts) < count:
        a += 1
        acc = turn((fifth + a * second) & mask, 31) * first & mask
        b = (turn(12345, 33) - acc) * back & mask  # acc + b * second, turned, is 12345
        if 0 < b < (1 << 61) - 1:
            data = b.to_bytes(8, "little")
            parts.append(b"J" + struct.pack("<i", a) + b"\x8a\x08" + data + b"\x86N")
    return b"".join(parts)


def _long_text() -> bytes:
    return b"X" + struct.pack("<I", 8 << 20) + b"k" * (8 << 20)


MERSENNE = (1 << 61) - 1  # an integer's hash is its remainder
WORK: dict[str, Callable[[], bytes]] = {
    "laughing tuples": lambda: b"\x80\x02)" + b"2\x86" * 100 + b".",
    "laughing lists": lambda: (
        b"\x80\x02]" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(100)) + b"."
    ),
    "laughing sets, equal": lambda: (
        b"\x80\x04\x8f(" + (b"(K\x01\x91" + b"q\x000((h\x00h\x00t\x91" * 40) * 2 + b"\x90."
    ),
    "numbers of one hash": lambda: (
        b"\x80\x02}(" + _ints([i * MERSENNE for i in range(1, 60_000)]) + b"u."
    ),
    "tuples of one hash": lambda: b"\x80\x02}(" + _same_hash(30_000) + b"u.",
    "a set of one hash": lambda: b"\x80\x02c__builtin__\nset\n(" + _same_hash(30_000) + b"l\x85R.",
    "long keys, alike": lambda: (
        b"\x80\x02"
        + _long_text()
        + b"q\x000"
        + _long_text()
        + b"q\x010}("
        + b"h\x00Nh\x01N" * 100_000
        + b"u."
    ),
    "a long number as key": lambda: (
        b"\x80\x02\x8b"
        + struct.pack("<i", 8 << 20)
        + b"k" * (8 << 20)
        + b"q\x000}("
        + b"h\x00N" * 200_000
        + b"u."
    ),
    "wide text": lambda: (
        b"\x80\x02("
        + (b"X" + struct.pack("<I", (8 << 20) + 4) + b"\xf0\x9f\x98\x80" + b"k" * (8 << 20)) * 8
        + b"l."
    ),
    "many bytes": lambda: (
        b"\x80\x02(" + (b"B" + struct.pack("<I", 15 << 20) + b"k" * (15 << 20)) * 4 + b"l."
    ),
    "copied bytes": lambda: (
        b"\x80\x02"
        + _long_text()
        + b"X\x06\x00\x00\x00latin1\x86q\x000"
        + b"c_codecs\nencode\nq\x010("
        + b"h\x01h\x00R" * 1000
        + b"l."
    ),
    "many dictionaries": lambda: b"\x80\x02(" + b"}" * 3_000_000 + b"l.",
    "many records": lambda: b"\x80\x02cx\ny\nq\x000)q\x010(" + b"h\x00h\x01R" * 700_000 + b"l.",
    "many marks": lambda: b"\x80\x02" + b"(" * 3_000_000 + b".",
    "memo everywhere": lambda: (
        b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i * 4001) for i in range(900_000)) + b"."
    ),
    "bytes by size": lambda: b"\x80\x02c__builtin__\nbytes\n\x8a\x05" + b"\x7f" * 5 + b"\x85R.",
    "bytearray by size": lambda: (
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + b"\x7f" * 5 + b"\x85R."
    ),
    "a list of a range": lambda: (
        b"\x80\x02c__builtin__\nlist\nc__builtin__\nrange\n\x8a\x05" + b"\x7f" * 5 + b"\x85R\x85R."
    ),
    "frame of 4 EB": lambda: b"\x80\x04\x95" + b"\xff" * 7 + b"\x3fN.",
    "memo of 4 G": lambda: b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo by many digits": lambda: b"\x80\x02Np" + b"9" * 4000 + b"\n.",
    "a number of many digits": lambda: b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "a negative length": lambda: b"\x80\x02\x8b\xff\xff\xff\xff.",
    "8 EB bytearray": lambda: b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "8 EB text": lambda: b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "4 GB bytes": lambda: b"\x80\x03B\xff\xff\xff\xff.",
    "2 GB number": lambda: b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "an import": lambda: b"\x80\x02ccanary_module\nThing\n.",
    "an environment": lambda: b"\x80\x02cos\nenviron\nX\x01\x00\x00\x00aX\x01\x00\x00\x00bs.",
    "a path": lambda: b"\x80\x02csys\npath\nX\x01\x00\x00\x00aa.",
    "a module's attributes": lambda: b"\x80\x02cos\npath\nN}X\x01\x00\x00\x00aNs\x86b.",
    "a persistent call": lambda: b"\x80\x02" + CALL + b"RQ.",
    "a storage by a call": lambda: b"\x80\x02(X\x07\x00\x00\x00storage" + CALL + b"RNNK\x01tQ.",
    "a type rebuilt by a call": lambda: (
        b"\x80\x02" + _FROM_TYPE + b"(cos\nsystem\ncos\nsystem\nX\x06\x00\x00\x00exit 3\x85NtR."
    ),
    "a torch file inside": lambda: b"\x80\x03ctorch.storage\n_load_from_bytes\nC\x02\x80.\x85R.",
    "the terminal's codes": lambda: b"\x80\x04X\x05\x00\x00\x00\x1b[2J\nX\x01\x00\x00\x00\r\x93)R.",
}
HEAVY = (
    *("numbers of one hash", "tuples of one hash", "a set of one hash", "long keys, alike"),
    *("a long number as key", "wide text", "many bytes", "copied bytes", "many dictionaries"),
    *("many records", "many marks", "memo everywhere"),
)
