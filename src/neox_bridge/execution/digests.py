"""Hashes files with 128-bit XXH3, which is as fast as memory, or with SHA-256."""

import hashlib
import os
from typing import TYPE_CHECKING, Any

from neox_bridge.execution.buffers import buffer
from neox_bridge.layouts.record_file import HashName
from neox_bridge.stores.paths import is_local

if TYPE_CHECKING:
    from collections.abc import Callable

STEP_BYTES = 1 << 20


def hasher(name: HashName) -> Any:
    """An empty hash with ``update`` and ``hexdigest``; xxh3_128 as ``xxhsum -H2`` prints it."""
    if name == "sha256":
        return hashlib.sha256()
    import xxhash

    return xxhash.xxh3_128()


def hash_file(path: str, name: HashName, check: "Callable[[], None]" = lambda: None) -> str:
    """The hash of a file's bytes in hexadecimal. check: called regularly; may raise to stop."""
    if not is_local(path):
        return _hash_object(path, name, check)
    state = hasher(name)
    hash_range(state, path, 0, None, check)
    return str(state.hexdigest())


def hash_range(
    state: Any, path: str, start: int, end: int | None, check: "Callable[[], None]"
) -> int:
    """Add a local file's bytes to a hash, from ``start`` to ``end`` or to the file's own end.

    Returns the offset where it stopped, which is before ``end`` if the file is shorter.
    """
    whole, at = memoryview(buffer(2, STEP_BYTES)), start
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        while end is None or at < end:
            wanted = whole if end is None else whole[: end - at]
            if not (count := os.preadv(fd, [wanted], at)):
                break
            check()
            state.update(whole[:count])
            at += count
    finally:
        os.close(fd)
    return at


def hash_bytes(data: "bytes | memoryview", name: HashName | None) -> str | None:
    """The hash of bytes in hexadecimal; None without a name."""
    if name is None:
        return None
    state = hasher(name)
    state.update(data)
    return str(state.hexdigest())


def _hash_object(url: str, name: HashName, check: "Callable[[], None]") -> str:
    from neox_bridge.stores.ranges import Ranges

    state, ranges, at = hasher(name), Ranges(), 0
    try:
        while data := ranges.get(url, at)[1]:
            check()
            state.update(data)
            at += len(data)
    finally:
        ranges.close()
    return str(state.hexdigest())
