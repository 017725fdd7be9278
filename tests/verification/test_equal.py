"""Bits are compared where they lie: any tiling of one side against any tiling of the other."""

import os
import threading
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox_bridge.errors import BridgeError
from neox_bridge.execution.casts import cast
from neox_bridge.execution.context import Context, Stopped
from neox_bridge.tensors.dtypes import to_numpy
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import Piece, Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.verification import equal as module
from neox_bridge.verification.compare import compare, each
from neox_bridge.verification.equal import equal


def written(path: Path, values: Any, parts: tuple[int, ...], dtype: str) -> Whole:
    """A tensor as that many parts along each dimension, each a tensor of its own in one file."""
    pieces, data = [], b"?" * 5  # parts at odd offsets
    for index in np.ndindex(*parts):
        edges = [
            (n * i // k, n * (i + 1) // k)
            for n, i, k in zip(values.shape, index, parts, strict=True)
        ]
        part = values[tuple(slice(low, high) for low, high in edges)]
        ref = TensorRef(str(path), len(data), dtype, part.shape)
        zero = (0,) * len(parts)
        pieces.append(Piece(ref, zero, tuple(low for low, _ in edges), part.shape))
        data += part.tobytes()
    path.write_bytes(data)
    return Whole(dtype, values.shape, tuple(pieces))


@pytest.mark.parametrize("step", [64, 1000, 1 << 19])
@pytest.mark.parametrize("ours", [(1, 1), (2, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("theirs", [(1, 1), (4, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "complex128"])
def test_any_two_tilings(
    dtype: str,
    theirs: tuple[int, ...],
    ours: tuple[int, ...],
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STEP_BYTES", step)
    rng = np.random.default_rng(step)
    shape = (13, 29)
    raw = rng.integers(0, 256, prod(shape) * to_numpy(dtype).itemsize, np.uint8)  # NaNs among them
    values = raw.view(to_numpy(dtype)).reshape(shape)
    first = written(tmp_path / "a", values, ours, dtype)
    assert equal(first, written(tmp_path / "b", values, theirs, dtype), Context())
    for at in {0, len(raw) - 1, *rng.integers(0, len(raw), 6).tolist()}:
        flipped = raw.copy()
        flipped[at] ^= 1 << int(rng.integers(8))
        other = flipped.view(to_numpy(dtype)).reshape(shape)
        assert not equal(first, written(tmp_path / "c", other, theirs, dtype), Context())


@pytest.mark.parametrize("parts", [(1,), (3,)])
@pytest.mark.parametrize("pair", [(0x0000, 0x8000), (0x7E00, 0x7E01), (0x7E00, 0xFE00)])
def test_zeros_and_nans_by_their_bits(
    pair: tuple[int, int], parts: tuple[int, ...], tmp_path: Path
) -> None:
    one, two = (np.full(7, bits, np.uint16).view(np.float16) for bits in pair)
    first = written(tmp_path / "a", one, parts, "float16")
    second = written(tmp_path / "b", two, (1,), "float16")
    assert not equal(first, second, Context())
    found = compare("x", first, second, Context())
    assert (found.kind, found.differing, found.largest) == ("values", 7, 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_the_first_is_cast(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float16)
    made = cast(values, to_numpy(dtype))
    first = written(tmp_path / "a", values, (2, 2), "float16")
    assert equal(first, written(tmp_path / "b", made, (1, 4), dtype), Context())
    made[5, 39] *= 2
    assert not equal(first, written(tmp_path / "b", made, (1, 4), dtype), Context())


def test_constants_and_scalars(tmp_path: Path) -> None:
    zeros = np.zeros((4, 3), np.float32)
    filled = Whole("float32", (4, 3), (constant((4, 3), 0.0),))
    assert equal(filled, written(tmp_path / "a", zeros, (2, 1), "float32"), Context())
    assert not equal(filled, written(tmp_path / "b", -zeros, (2, 1), "float32"), Context())
    one = written(tmp_path / "c", np.float32(1).reshape(()), (), "float32")
    assert equal(one, one, Context())
    none = Whole("float32", (0, 3))
    assert equal(none, none, Context())


def test_what_no_piece_covers_is_not_equal(tmp_path: Path) -> None:
    whole = written(tmp_path / "a", np.zeros((4, 3), np.float32), (2, 1), "float32")
    hole = Whole(whole.dtype, whole.shape, whole.pieces[:1])
    assert not equal(whole, hole, Context())


@pytest.mark.parametrize("parts", [(1, 1), (1, 2)])
def test_a_file_that_shrinks_is_an_error(parts: tuple[int, ...], tmp_path: Path) -> None:
    values = np.ones((100, 100), np.float32)
    first = written(tmp_path / "a", values, (1, 1), "float32")
    second = written(tmp_path / "b", values, parts, "float32")
    os.truncate(tmp_path / "b", 30_000)
    with pytest.raises(BridgeError, match=r"b ended .* early"):
        equal(first, second, Context())


def test_a_failure_stops_the_other_threads() -> None:
    context, started, stopped = Context(), threading.Event(), threading.Event()

    def one(name: str) -> Any:
        if name == "bad":
            started.wait(10)
            raise BridgeError("broken")
        started.set()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                context.check()
            except Stopped:
                stopped.set()
                raise
            time.sleep(0.001)

    with pytest.raises(BridgeError, match="broken"):
        each(["bad", "long"], one, context, 2)
    assert stopped.is_set()
