"""What all targets share: how many examples, where files lie, what a hang and an expected end are.

``make test`` runs a fixed number of examples of each target, always the same ones; ``make fuzz``
sets FUZZ and runs others until its time is up (run.py).
"""

import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = bool(os.environ.get("FUZZ"))
_HANGS = 20  # seconds, for what takes milliseconds
_ROUND = 300  # examples of a target between two others in a long run


def examples(count: int) -> settings:
    """The settings of a target that runs this many examples in ``make test``."""
    return settings(
        max_examples=_ROUND if LONG else count,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory, where there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="neox-bridge-fuzz-", dir=place)


@contextmanager
def ends() -> Iterator[None]:
    """Fail where the block seems never to end."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it takes more than {_HANGS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# --- mutations -------------------------------------------------------------------------------

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def _flip(raw: bytearray, at: int, chance: random.Random) -> None:
    raw[at] ^= 1 << chance.randrange(8)


def _byte(raw: bytearray, at: int, chance: random.Random) -> None:
    raw[at] = chance.randrange(256)


def _number(raw: bytearray, at: int, chance: random.Random) -> None:
    size = chance.choice((2, 4, 8))
    value = chance.choice(_NUMBERS) % (1 << 8 * size)
    raw[at : at + size] = value.to_bytes(size, "little")


def _remove(raw: bytearray, at: int, chance: random.Random) -> None:
    del raw[at : at + chance.choice((1, 2, 4, 8, 64))]


def _repeat(raw: bytearray, at: int, chance: random.Random) -> None:
    raw[at:at] = raw[at : at + chance.choice((1, 2, 4, 8, 64))]


def _move(raw: bytearray, at: int, chance: random.Random) -> None:
    other, size = chance.randrange(len(raw)), chance.choice((1, 2, 4, 8, 64))
    raw[at : at + size] = raw[other : other + size]


def _cut(raw: bytearray, at: int, chance: random.Random) -> None:
    if chance.random() < 0.2:
        del raw[at:]


_WAYS: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    _flip, _byte, _number, _remove, _repeat, _move, _cut,
)  # fmt: skip


def mutated(raw: bytes, changes: list[tuple[int, int]]) -> bytes:
    """The bytes after some changes; each is a kind with its seed, and a place."""
    found = bytearray(raw)
    for kind, place in changes:
        if found:
            way = _WAYS[kind % len(_WAYS)]
            way(found, place % len(found), random.Random(kind))
    return bytes(found)


CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 2**20)), max_size=6)


# --- values ----------------------------------------------------------------------------------

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.integers(-(2**70), 2**70),
    st.sampled_from((0.0, 0.5, 1.0, 1e-5, 1e308, -1.5, float("nan"), float("inf"), 1e9)),
    st.sampled_from(("", "gelu", "silu", "swiglu", "rmsnorm", "layernorm", "rotary", "none", "1e-5",
                     "24", "float16", "rm", "llama", "mamba", "\x1b[2J", "a\nb", "\ud800")),
    st.text(max_size=8),
)  # fmt: skip
JSON: st.SearchStrategy[Any] = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.text(max_size=6),
                st.sampled_from(("type", "rope_type", "rope_theta", "partial_rotary_factor")),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=6,
)


def within(value: Any, chance: random.Random, new: Any) -> Any:
    """A JSON value with one of the values inside it replaced."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return new
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    at = chance.choice(list(keys))
    copy = value.copy()
    if chance.random() < 0.1:
        del copy[at]
    else:
        copy[at] = within(value[at], chance, new)
    return copy


def write(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    return str(path)
