"""Plans by hand, executed: every rule of moving, casting, summing and staging, against numpy."""

import errno
import fcntl
import os
import random
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution import (
    casts,
    exchange,
    files,
    flushing,
    movers,
    staging,
    trailing_hashes,
    transform,
    write_tensor,
)
from neox_bridge.execution.context import Context, Shared
from neox_bridge.execution.execute import execute
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors import sharing
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece, box
from neox_bridge.tensors.tensor_ref import TensorRef

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def store(path: Path, array: "np.ndarray[Any, Any]", name: str, offset: int = 24) -> TensorRef:
    path.write_bytes(b"#" * offset + array.tobytes() + b"#" * 8)
    return TensorRef(str(path), offset, name, array.shape)


def plan_of(*tensors: OutputTensor, head: bytes = b"HEAD0123") -> Plan:
    """One file: a literal, then the tensors; the literal has room for CRCs at 0 and 4."""
    placed, end = [], len(head)
    for tensor in tensors:
        placed.append(replace(tensor, offset=end))
        end += tensor.nbytes
    file = OutputFile("sub/file", end, ((0, head),), tuple(placed))
    return Plan({}, {}, (file,))


def run(tmp_path: Path, *tensors: OutputTensor, **options: Any) -> bytes:
    execute(plan_of(*tensors), str(tmp_path / "out"), **options)
    return (tmp_path / "out/sub/file").read_bytes()[8:]


def noise(shape: tuple[int, ...], dtype: str, seed: int = 0) -> "np.ndarray[Any, Any]":
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32).astype(DTYPES[dtype])


def no_kernel(monkeypatch: pytest.MonkeyPatch, code: int = errno.EXDEV) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(fcntl, "ioctl", refuse)


def clones(patch: pytest.MonkeyPatch, asked: list[int]) -> None:
    """FICLONERANGE as a file system has it, with blocks of 4 bytes; ``asked``: bytes of each."""

    def ioctl(target: int, request: int, argument: bytes) -> int:
        source, start, size, to = struct.unpack("qQQQ", argument)
        assert request == 0x4020940D
        assert size > 0
        assert not start % 4
        assert not size % 4
        assert not to % 4
        asked.append(size)
        return os.pwrite(target, os.pread(source, size, start), to)

    patch.setattr(sharing, "BLOCK_BYTES", 4)
    patch.setattr(fcntl, "ioctl", ioctl)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and tensors are treated as large ones are, however small."""
    monkeypatch.setattr("neox_bridge.execution.output.SMALL_BYTES", -1)
    monkeypatch.setattr(movers, "LEAST_SHARED_BYTES", 1)


@pytest.mark.parametrize("kernel", [True, False])
def test_bits_stay(kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaNs with payloads, infinities, subnormals: whatever moves them."""
    if not kernel:
        no_kernel(monkeypatch)
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    ref = store(tmp_path / "a", bits, "float16")
    assert run(tmp_path, OutputTensor("t", "float16", (256, 256), (box(ref),))) == bits.tobytes()


def test_the_kernel_may_stop_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.copy_file_range, []

    def half(*args: Any) -> int:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(args[0], args[1], 1000, *args[3:])

    monkeypatch.setattr(os, "copy_file_range", half)
    array = noise((50, 50), "float32")
    ref = store(tmp_path / "a", array, "float32")
    assert run(tmp_path, OutputTensor("t", "float32", (50, 50), (box(ref),))) == array.tobytes()


def test_writes_and_reads_may_be_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_kernel(monkeypatch)
    put, get = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: put(fd, data[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: get(fd, [into[0][:700]], at))
    array = noise((50, 50), "float32")
    pieces = (box(store(tmp_path / "a", array, "float32")),)
    tensors = [OutputTensor("t", d, (50, 50), pieces) for d in ("float32", "float16")]
    assert run(tmp_path, *tensors) == array.tobytes() + array.astype(np.float16).tobytes()


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    columns=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kinds=st.lists(st.sampled_from(["source", "turned", 0.0, -0.0]), min_size=12, max_size=12),
    block=st.integers(1, 200),
    gaps=st.sampled_from([0, 4]),
    how=st.sampled_from(["cloned", "kernel", "buffered", "memory"]),
    offset=st.integers(20, 24),
    every_crc=st.booleans(),
)
def test_boxes_from_many_files(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[int],
    columns: list[int],
    kinds: list[Any],
    block: int,
    gaps: int,
    how: str,
    offset: int,
    every_crc: bool,
) -> None:
    """A grid of sources and constants put together, bit by bit, in blocks of any size."""
    tmp_path = tmp_path_factory.mktemp("boxes")
    shape = (sum(rows), sum(columns))
    whole = np.random.default_rng(block).integers(0, 65536, shape, np.uint16)
    pieces: list[Piece] = []
    for i, height in enumerate(rows):
        for j, width in enumerate(columns):
            r, c, kind = sum(rows[:i]), sum(columns[:j]), kinds[len(pieces)]
            cell = whole[r : r + height, c : c + width]
            if isinstance(kind, float):
                cell[:] = 0x8000 if str(kind) == "-0.0" else 0
                pieces.append(constant((height, width), kind, (r, c)))
                continue
            name = tmp_path / f"{i}-{j}"
            if kind == "turned":
                ref = replace(
                    store(name, cell.T.copy(), "float16", offset),
                    shape=cell.shape,
                    strides=(1, height),
                )
            else:
                ref = store(name, np.ascontiguousarray(cell), "float16", offset)
            pieces.append(Piece(ref, (0, 0), (r, c), (height, width)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "STEP_BYTES", block)
        patch.setattr(transform, "GAPS", gaps)
        if how == "cloned":
            clones(patch, [])
        if how == "memory":
            patch.setattr("neox_bridge.execution.output.SMALL_BYTES", 1 << 20)
        if how == "buffered":
            no_kernel(patch)
        tensor = OutputTensor("t", "float16", shape, tuple(reversed(pieces)), crc_at=(4,))
        execute(plan_of(tensor), str(tmp_path / "out"), every_crc=every_crc)
    data = (tmp_path / "out/sub/file").read_bytes()
    assert data[8:] == whole.tobytes()
    crc = zlib.crc32(whole.tobytes()).to_bytes(4, "little")
    seen = every_crc or how in ("buffered", "memory")
    assert data[4:8] == crc or (not seen and data[4:8] == b"0123")


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(0, 7), max_size=4), limit=st.integers(1, 40))
def test_blocks_are_bounded_runs(shape: list[int], limit: int) -> None:
    """Also where the rows themselves are long, as of a mask of (1, 1, 2048, 2048)."""
    seen = []
    for start, size in transform.boxes(tuple(shape), limit):
        box_of = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        seen.append(np.arange(np.prod(shape, dtype=int)).reshape(shape)[box_of].ravel())
        assert 0 < len(seen[-1]) <= limit
    large = sum(2 * len(block) > limit for block in seen)
    assert len(seen) <= max(1, 2 * large)  # and no smaller than they must be
    assert np.concatenate([[], *seen]).tolist() == list(range(np.prod(shape, dtype=int)))


@pytest.mark.parametrize("gaps", [0, 4])
def test_columns_and_strides(gaps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as one run or mapped, far behind a page's start."""
    monkeypatch.setattr(transform, "GAPS", gaps)
    array = noise((64, 96), "bfloat16")
    ref = store(tmp_path / "a", array, "bfloat16", 3 * 65536 + 1234)
    right = OutputTensor("t", "bfloat16", (64, 48), (Piece(ref, (0, 48), (0, 0), (64, 48)),))
    turned = TensorRef(ref.file, ref.offset, "bfloat16", (96, 64), (1, 96))
    other = OutputTensor("u", "bfloat16", (96, 64), (box(turned),))
    want = np.ascontiguousarray(array[:, 48:]).tobytes() + np.ascontiguousarray(array.T).tobytes()
    assert run(tmp_path, right, other) == want


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts_round_once(source: str, target: str, tmp_path: Path) -> None:
    array = noise((300, 7), source)
    ref = store(tmp_path / "a", array, source)
    got = run(tmp_path, OutputTensor("t", target, (300, 7), (box(ref),)))
    assert got == array.astype(np.float32).astype(DTYPES[target]).tobytes()


def test_overflow_in_a_cast_is_counted(tmp_path: Path) -> None:
    array = np.array([1e30, -1e6, 1.0, np.inf, np.nan], np.float32)
    ref = store(tmp_path / "a", array, "float32")
    plan = plan_of(OutputTensor("t", "float16", (5,), (box(ref),)))
    (finding,) = execute(plan, str(tmp_path / "out")).findings
    assert finding.code == "cast-overflow"
    assert finding.message == (
        "2 finite values overflowed to infinity in the cast: t in sub/file (2)"
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=64), min_size=1, max_size=20), st.integers(-60, 0))
def test_wide_values_become_bfloat16_in_one_rounding(values: list[float], low: int) -> None:
    """Against the exact nearest, ties to even; ties missed by a hair are the hard cases."""
    ties = [(1 + (2 * k + 1) * 2.0**-8) * (1 + s * 2.0**low) for k in range(4) for s in (-1, 0, 1)]
    wide = np.array([*values, *ties, *(-t for t in ties)], np.float64)
    got = casts.cast(wide, np.dtype(ml_dtypes.bfloat16))
    for value, near in zip(wide, got, strict=True):
        assert np.isnan(near) == np.isnan(value)
        if np.isfinite(near):
            bits = int(near.view(np.uint16))
            ring = [b for b in (bits - 1, bits, bits + 1) if 0 <= b < 65536]
            around = np.array(ring, np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
            gaps = [
                (abs(Fraction(a) - Fraction(value)), b & 1)
                for a, b in zip(around, ring, strict=True)
                if np.isfinite(a)
            ]
            mine = (abs(Fraction(float(near)) - Fraction(value)), bits & 1)
            assert mine == min(gaps)


def test_sources_of_several_dtypes_in_one_row(tmp_path: Path) -> None:
    bits = np.arange(0x7F81, 0x7FC1, dtype=np.uint16).reshape(8, 8)  # NaNs that must stay
    wide = np.full((8, 8), 3.4e38, np.float32)
    left = Piece(store(tmp_path / "a", bits, "bfloat16"), (0, 0), (0, 0), (8, 8))
    right = Piece(store(tmp_path / "b", wide, "float32"), (0, 0), (0, 8), (8, 8))
    plan = plan_of(OutputTensor("t", "bfloat16", (8, 16), (left, right)))
    (finding,) = execute(plan, str(tmp_path / "out")).findings
    assert finding.message.startswith("64 finite values overflowed to infinity")
    got = np.frombuffer((tmp_path / "out/sub/file").read_bytes()[8:], np.uint16).reshape(8, 16)
    assert (got[:, :8] == bits).all()
    assert (got[:, 8:] == 0x7F80).all()


def test_fills(tmp_path: Path) -> None:
    for fill in (0.0, -0.0):
        tensor = OutputTensor("t", "bfloat16", (3, 2), (constant((3, 2), fill),))
        got = run(tmp_path / str(fill), tensor)
        assert got == np.full((3, 2), fill, ml_dtypes.bfloat16).tobytes()


def test_rows_and_a_fill_in_one(tmp_path: Path) -> None:
    array = noise((5, 4), "float16")
    ref = store(tmp_path / "a", array, "float16")
    pieces = (box(ref), constant((2, 4), 0.0, (5, 0)))
    tensor = OutputTensor("t", "float16", (7, 4), pieces)
    result = execute(plan_of(tensor), str(tmp_path / "out"))
    assert (tmp_path / "out/sub/file").read_bytes()[8:] == array.tobytes() + bytes(16)
    assert (result.copied, result.transformed) == (8 + 40, 16)


def ranks(tmp_path: Path, *arrays: "np.ndarray[Any, Any]", dtype: str) -> tuple[Piece, ...]:
    return tuple(box(store(tmp_path / f"r{i}", a, dtype)) for i, a in enumerate(arrays))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype: str, tmp_path: Path) -> None:
    a, b, c = (noise((9,), dtype, seed) for seed in range(3))
    pieces = ranks(tmp_path, a, b, c, dtype=dtype)
    got = run(tmp_path, OutputTensor("t", dtype, (9,), pieces, reduce="sum"))
    exact = sum(x.astype(np.float64) for x in (a, b, c))
    assert got == np.asarray(exact, np.float64).astype(DTYPES[dtype]).tobytes()


def test_a_sum_with_negative_zeros_changes_no_bit(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    zeros = np.full(65536, -0.0, np.float16)
    for position in range(3):
        parts: list[Any] = [zeros, zeros]
        parts.insert(position, bits)
        folder = tmp_path / str(position)
        folder.mkdir()
        pieces = ranks(folder, *parts, dtype="float16")
        got = run(folder, OutputTensor("t", "float16", (65536,), pieces, reduce="sum"))
        assert got == bits.tobytes()


def test_a_sum_of_some_negative_zeros(tmp_path: Path) -> None:
    a, b = np.array([-0.0, -0.0, 1.0], np.float32), np.array([-0.0, 0.0, -0.0], np.float32)
    pieces = ranks(tmp_path, a, b, dtype="float32")
    got = run(tmp_path, OutputTensor("t", "float32", (3,), pieces, reduce="sum"))
    assert got == (a + b).tobytes()
    assert got[3] == 0x80


def test_a_sum_with_a_constant(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    pieces = (constant((65536,), -0.0), *ranks(tmp_path, bits, dtype="float16"))
    got = run(tmp_path, OutputTensor("t", "float16", (65536,), pieces, reduce="sum"))
    assert got == bits.tobytes()


def test_a_divided_sum(tmp_path: Path) -> None:
    a, b = noise((9,), "float32", 1), noise((9,), "float32", 2)
    pieces = ranks(tmp_path, a, b, dtype="float32")
    got = run(tmp_path, OutputTensor("t", "float32", (9,), pieces, "sum", divisor=3))
    assert got == ((a.astype(np.float64) + b) / 3).astype(np.float32).tobytes()


def test_equal_replicas_are_one(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    pieces = ranks(tmp_path, bits, bits, bits, dtype="bfloat16")
    plan = plan_of(OutputTensor("t", "bfloat16", (65536,), pieces, reduce="replica"))
    assert execute(plan, str(tmp_path / "out")).findings == ()
    assert (tmp_path / "out/sub/file").read_bytes()[8:] == bits.tobytes()


def test_equal_replicas_that_are_cast_do_not_differ(tmp_path: Path) -> None:
    a = noise((9,), "float32")
    pieces = ranks(tmp_path, a, a, dtype="float32")
    plan = plan_of(OutputTensor("t", "float16", (9,), pieces, reduce="replica"))
    assert execute(plan, str(tmp_path / "out")).findings == ()


def test_replicas_that_differ(tmp_path: Path) -> None:
    a = np.array([1.0, 2.0, 3.0], np.float32)
    b = np.array([1.0, 2.5, 3.0], np.float32)
    pieces = ranks(tmp_path, a, b, dtype="float32")
    plan = plan_of(OutputTensor("t", "float32", (3,), pieces, reduce="replica"))
    (finding,) = execute(plan, str(tmp_path / "out")).findings
    assert finding.code == "replicas-differ"
    assert "0.25" in finding.message
    got = np.frombuffer((tmp_path / "out/sub/file").read_bytes()[8:], np.float32)
    assert got.tolist() == [1.0, 2.25, 3.0]


def test_replicas_of_two_dtypes_are_not_the_same_bits(tmp_path: Path) -> None:
    """Nor is their mean: 0x3C00 is 1 as float16 and 0.0078125 as bfloat16."""
    bits = np.full(4, 0x3C00, np.uint16)
    pieces = (
        box(store(tmp_path / "a", bits, "float16")),
        box(store(tmp_path / "b", bits, "bfloat16")),
    )
    plan = plan_of(OutputTensor("t", "float32", (4,), pieces, reduce="replica"))
    (finding,) = execute(plan, str(tmp_path / "out")).findings
    assert finding.code == "replicas-differ"


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_where_replicas_agree_the_mean_is_the_value(dtype: str, tmp_path: Path) -> None:
    kind = np.dtype(DTYPES.get(dtype, np.float64))
    top = 1.7e308 if dtype == "float64" else 60000.0
    a = np.array([-0.0, np.inf, np.nan, top, 0.1, 1.0], kind)
    b = a.copy()
    b[-1] = 2.0
    pieces = ranks(tmp_path, a, a, b, dtype=dtype)
    plan = plan_of(OutputTensor("t", dtype, (6,), pieces, reduce="replica"))
    (finding,) = execute(plan, str(tmp_path / "out")).findings
    assert "by 0.666667 at most" in finding.message
    got = np.frombuffer((tmp_path / "out/sub/file").read_bytes()[8:], kind)
    assert got[:2].tobytes() == a[:2].tobytes()
    assert got[3:5].tobytes() == a[3:5].tobytes()
    assert np.isnan(got[2])


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_replica_that_is_not_finite_is_infinitely_far(
    odd: float, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    a = np.array([1.0], np.float32)
    pieces = ranks(tmp_path, a, np.array([odd], np.float32), dtype="float32")
    plan = plan_of(OutputTensor("t", "float32", (1,), pieces, reduce="replica"))
    (finding,) = execute(plan, str(tmp_path / "out")).findings
    assert "by inf at most" in finding.message
    assert not recwarn.list


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_values_are_finite_small_and_repeatable(dtype: str, tmp_path: Path) -> None:
    tensors = [OutputTensor(f"t{i}", dtype, (500, 40), random=i) for i in range(3)]
    one = run(tmp_path / "a", *tensors, workers=1)
    four = run(tmp_path / "b", *tensors, workers=4)
    assert one == four
    values = np.frombuffer(one, DTYPES[dtype]).astype(np.float32)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 0.04
    assert len(np.unique(values[:20000])) > 500
    assert (values[:20000] != values[20000:40000]).any()


@pytest.mark.parametrize("kernel", [True, False])
def test_crcs(kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written at every place where the bytes are seen; left alone where the kernel moves them."""
    if not kernel:
        no_kernel(monkeypatch)
    array = noise((64, 64), "float32")
    ref = store(tmp_path / "a", array, "float32")
    halves = (Piece(ref, (0, 0), (0, 0), (32, 64)), Piece(ref, (32, 0), (32, 0), (32, 64)))
    moved = OutputTensor("t", "float32", (64, 64), halves, crc_at=(0,))
    made = OutputTensor("u", "float16", (64, 64), (box(ref),), crc_at=(4,))
    execute(plan_of(moved, made), str(tmp_path / "out"))
    data = (tmp_path / "out/sub/file").read_bytes()
    crc = zlib.crc32(array.tobytes()).to_bytes(4, "little")
    assert data[:4] == (b"HEAD" if kernel else crc)
    assert data[4:8] == zlib.crc32(array.astype(np.float16).tobytes()).to_bytes(4, "little")


@pytest.mark.parametrize("cloned", [True, False])
def test_every_crc(cloned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are shared all the same, and read for their CRC."""
    asked: list[int] = []
    if cloned:
        clones(monkeypatch, asked)
    array = noise((64, 64), "float32")
    ref = store(tmp_path / "a", array, "float32", 22)
    tensor = OutputTensor("t", "float32", (64, 64), (box(ref),), crc_at=(0,))
    plan = plan_of(tensor, head=b"HEAD01")  # at byte 6: as far into a block of 4 as byte 22
    result = execute(plan, str(tmp_path / "out"), every_crc=True)
    data = (tmp_path / "out/sub/file").read_bytes()
    assert data[:4] == zlib.crc32(array.tobytes()).to_bytes(4, "little")
    assert asked == ([array.nbytes - 4] if cloned else [])
    assert (result.shared, result.copied) == (
        (array.nbytes - 4, 6 + 4) if cloned else (0, 6 + array.nbytes)
    )


@pytest.mark.parametrize(
    ("code", "calls"), [(errno.EOPNOTSUPP, 1), (errno.EXDEV, 1), (errno.EINVAL, 4)]
)
def test_a_disk_that_shares_nothing_is_asked_once(
    code: int, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL is about one range; the others are about the two disks."""
    asked = []

    def ioctl(*args: Any) -> int:
        asked.append(args)
        raise OSError(code, "no")

    clones(monkeypatch, [])
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    array = noise((8, 8), "float32")
    pieces = [box(store(tmp_path / str(i), array, "float32")) for i in range(4)]
    tensors = [OutputTensor(str(i), "float32", (8, 8), (p,)) for i, p in enumerate(pieces)]
    assert run(tmp_path, *tensors, workers=1) == array.tobytes() * 4
    assert len(asked) == calls


def test_a_full_disk_is_no_reason_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "no")

    clones(monkeypatch, [])
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    ref = store(tmp_path / "a", noise((8, 8), "float32"), "float32")
    with pytest.raises(BridgeError, match="No space left"):
        run(tmp_path, OutputTensor("t", "float32", (8, 8), (box(ref),)))


def test_inline_and_empty(tmp_path: Path) -> None:
    inline = OutputTensor("t", "uint8", (5,), inline=b"12345")
    empty = OutputTensor("e", "float32", (0, 4), (constant((0, 4), 0.0),))
    assert run(tmp_path, inline, empty) == b"12345"


def test_scalars(tmp_path: Path) -> None:
    ref = store(tmp_path / "a", np.array(1.5, np.float32), "float32")
    same = OutputTensor("s", "float32", (), (box(ref),))
    cast = OutputTensor("c", "float16", (), (box(ref),))
    assert run(tmp_path, same, cast) == np.float32(1.5).tobytes() + np.float16(1.5).tobytes()


def test_copies_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"tokenizer")
    plan = Plan({}, {}, (OutputFile("t/tokenizer.json", 9, copy_of=str(tmp_path / "a")),))
    result = execute(plan, str(tmp_path / "out"))
    assert (tmp_path / "out/t/tokenizer.json").read_bytes() == b"tokenizer"
    assert (result.files, result.size, result.copied) == (1, 9, 9)


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    array = noise((64, 64), "float32")
    ref = store(tmp_path / "a", array, "float32")
    plan = plan_of(
        OutputTensor("t", "float32", (64, 64), (box(ref),)),
        OutputTensor("u", "float16", (64, 64), (box(ref),)),
    )
    told: list[int] = []
    result = execute(plan, str(tmp_path / "out"), progress=told.append)
    assert sum(told) == plan.size == result.copied + result.transformed


def test_a_copy_of_a_file_that_grew_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"tokenizer")
    plan = Plan({}, {}, (OutputFile("tokenizer.json", 8, copy_of=str(tmp_path / "s")),))
    with pytest.raises(BridgeError, match="had 8 bytes and has 9"):
        execute(plan, str(tmp_path / "out"))
    assert left(tmp_path) == []


def test_no_crc_is_made_that_nobody_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crc32(*args: Any) -> int:
        raise AssertionError

    no_kernel(monkeypatch)
    monkeypatch.setattr(movers, "crc32", crc32)
    monkeypatch.setattr(write_tensor, "crc32", crc32)
    array = noise((8, 8), "float32")
    pieces = (box(store(tmp_path / "s", array, "float32")), constant((2, 8), 0.0, (8, 0)))
    inline = OutputTensor("i", "uint8", (5,), inline=b"12345")
    cast = OutputTensor("c", "float16", (8, 8), pieces[:1])
    run(tmp_path, OutputTensor("t", "float32", (10, 8), pieces), inline, cast)


def test_few_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LIMIT", 3)
    real, counts = os.pwrite, []

    def count(*args: Any) -> int:
        counts.append(len(os.listdir("/proc/self/fd")))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", count)
    before = len(os.listdir("/proc/self/fd"))
    execute(simple(tmp_path, 40), str(tmp_path / "out"), workers=1)
    assert max(counts) <= before + 4
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_in_use_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LIMIT", 1)
    for name in "ab":
        (tmp_path / name).write_text(name)
    opened = files.Files()
    with opened.reading(str(tmp_path / "a")) as one, opened.reading(str(tmp_path / "b")) as two:
        assert (os.pread(one, 1, 0), os.pread(two, 1, 0)) == (b"a", b"b")
    opened.close()


def test_a_failure_stops_the_others_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "STEP_BYTES", 64)
    monkeypatch.setattr("neox_bridge.execution.threads._BATCH_BYTES", 1)
    real, calls = os.pwrite, []

    def slow(*args: Any) -> int:
        calls.append(threading.get_ident())
        time.sleep(0.001)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    long = store(tmp_path / "s0", noise((64, 64), "float32"), "float32")
    bad = store(tmp_path / "s1", noise((8, 8), "float32"), "float32")
    os.truncate(bad.file, 100)
    tensors = [
        OutputTensor("a", "float16", (64, 64), (box(long),)),
        OutputTensor("b", "float16", (8, 8), (box(bad),)),
    ]
    with pytest.raises(BridgeError, match="s1 ended"):
        run(tmp_path, *tensors, workers=2)
    assert len(calls) < 256
    assert left(tmp_path) == []


def test_the_umask_is_honoured(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run(tmp_path, OutputTensor("i", "uint8", (1,), inline=b"1"))
    finally:
        os.umask(before)
    modes = [(tmp_path / p).stat().st_mode & 0o777 for p in ("out", "out/sub", "out/sub/file")]
    assert modes == [0o750, 0o750, 0o640]


def simple(tmp_path: Path, count: int = 20) -> Plan:
    array = noise((64, 64), "float32")
    tensors = []
    for number in range(count):
        ref = store(tmp_path / f"s{number}", array, "float32")
        tensors.append(OutputTensor(f"t{number}", "float16", (64, 64), (box(ref),)))
    return plan_of(*tensors)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("s"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing(
    overwrite: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = simple(tmp_path)
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "README.md").write_text("old")
    real, calls = os.pwrite, []

    def fail(*args: Any) -> int:
        calls.append(1)
        if len(calls) > 7:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", fail)
    words = "No space left while writing .*163,848 bytes" if code == errno.ENOSPC else "error"
    with pytest.raises(BridgeError, match=words):
        execute(plan, str(tmp_path / "out"), overwrite=overwrite)
    assert left(tmp_path) == (["out"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "out" / "README.md").read_text() == "old"


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    plan = simple(tmp_path)

    once = iter([None])

    def interrupt(_count: int) -> None:
        if threading.active_count() > 1 and next(once, True) is None:
            import _thread

            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        execute(plan, str(tmp_path / "out"), progress=interrupt)
    assert left(tmp_path) == []


@pytest.mark.parametrize("step", ["aside", "in"])
def test_an_interrupt_between_two_renames(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is the old one or the new one; the new one's files aren't lost."""
    plan = simple(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("old")
    real = os.rename

    def rename(source: str, target: str) -> None:
        real(source, target)
        if target.endswith(".old") == (step == "aside") and not source.endswith(".old"):
            raise KeyboardInterrupt

    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", rename)
        execute(plan, str(tmp_path / "out"), overwrite=True)
    assert os.listdir(tmp_path / "out") == (["README.md"] if step == "aside" else ["sub"])
    result = execute(plan, str(tmp_path / "out"), overwrite=True)
    assert result.kept == (plan.size if step == "aside" else 0)
    assert left(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["sub"]


def test_a_target_that_appears_meanwhile_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = simple(tmp_path)

    def appear(_folder: str) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("other")

    with (
        monkeypatch.context() as patch,
        pytest.raises(BridgeError, match=r"exists.* kept in"),
    ):
        patch.setattr("neox_bridge.execution.disk.flush_folders", appear)
        execute(plan, str(tmp_path / "out"))
    assert (tmp_path / "out" / "other").read_text() == "other"
    with pytest.raises(Refused, match=r"not part of a checkpoint.*: other\."):
        execute(plan, str(tmp_path / "out"), overwrite=True)
    (tmp_path / "out" / "other").rename(tmp_path / "out" / "README.md")
    assert execute(plan, str(tmp_path / "out"), overwrite=True).kept == plan.size
    assert left(tmp_path) == ["out"]


def test_a_source_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_kernel(monkeypatch, errno.EIO)

    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    ref = store(tmp_path / "s", noise((64, 64), "float32"), "float32")
    with pytest.raises(BridgeError, match=r"/s cannot be read"):
        run(tmp_path, OutputTensor("t", "float32", (64, 64), (box(ref),)))
    assert left(tmp_path) == []


def test_a_source_that_changes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = simple(tmp_path)
    os.utime(tmp_path / "s3", ns=(1, 1))
    real = flushing.flush_folders

    def touch(folder: str) -> None:
        real(folder)
        os.utime(tmp_path / "s3", ns=(2, 2))

    monkeypatch.setattr("neox_bridge.execution.disk.flush_folders", touch)
    with pytest.raises(BridgeError, match="s3 changed"):
        execute(plan, str(tmp_path / "out"))
    assert left(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("gaps", [0, 4])
def test_a_source_that_is_too_short(
    gaps: int, kernel: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transform, "GAPS", gaps)
    if not kernel:
        no_kernel(monkeypatch)
    ref = store(tmp_path / "s", noise((64, 64), "float32"), "float32")
    os.truncate(ref.file, 9000)
    plan = plan_of(OutputTensor("t", dtype, (64, 64), (box(ref),)))
    with pytest.raises(BridgeError, match=r"/s "):
        execute(plan, str(tmp_path / "out"))
    assert left(tmp_path) == []


def in_source(tmp_path: Path) -> Path:
    return tmp_path


def make(name: str, content: str | None) -> Callable[[Path], Path]:
    def build(tmp_path: Path) -> Path:
        target = tmp_path / name
        if content is None:
            target.write_text("file")
        else:
            target.mkdir()
            (target / "x").write_text(content)
        return target

    return build


@pytest.mark.parametrize(
    ("build", "overwrite", "message"),
    [
        (in_source, True, "contains the source"),
        (make("file", None), True, "is a file"),
        (make("full", "x"), False, "`overwrite=True`"),
        (lambda t: make("file", None)(t) / "below", False, "is a file"),
    ],
)
def test_targets_that_cannot_be(
    build: Callable[[Path], Path], overwrite: bool, message: str, tmp_path: Path
) -> None:
    plan = simple(tmp_path, 1)
    target = build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    told: list[int] = []
    with pytest.raises(BridgeError, match=message):
        execute(plan, str(target), overwrite=overwrite, progress=told.append)
    assert sorted(tmp_path.rglob("*")) == before
    assert not told  # known before a byte is written


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: path != str(tmp_path))
    with pytest.raises(BridgeError, match="is not writable"):
        execute(simple(tmp_path, 1), str(tmp_path / "a" / "b"))
    assert left(tmp_path) == []


def test_targets_that_can_be(tmp_path: Path) -> None:
    plan = simple(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    execute(plan, str(tmp_path / "empty"))
    execute(plan, str(tmp_path / "a" / "b" / "c"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("old")
    execute(plan, str(tmp_path / "full"), overwrite=True)
    assert os.listdir(tmp_path / "full") == ["sub"]
    assert left(tmp_path) == ["a", "empty", "full"]


def test_a_target_of_links_to_the_source(tmp_path: Path) -> None:
    """A snapshot in the Hugging Face cache: the files are links to blobs elsewhere."""
    array = noise((4, 4), "float32")
    blob = store(tmp_path / "sblob", array, "float32")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model").symlink_to(tmp_path / "sblob")
    ref = replace(blob, file=str(tmp_path / "snapshot/model"))
    plan = plan_of(OutputTensor("t", "float32", (4, 4), (box(ref),)))
    with pytest.raises(BridgeError, match="contains the source"):
        execute(plan, str(tmp_path / "snapshot"), overwrite=True)


def test_a_target_that_is_a_link_to_a_folder(tmp_path: Path) -> None:
    plan = simple(tmp_path, 1)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for overwrite in (False, True):
        execute(plan, str(tmp_path / "link"), overwrite=overwrite)
        assert os.listdir(tmp_path / "real") == ["sub"]
        assert left(tmp_path) == ["link", "real"]


def test_a_mount_point_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "out"))
    with pytest.raises(BridgeError, match="mount point"):
        execute(simple(tmp_path, 1), str(tmp_path / "out"))


def test_no_space_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = staging.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(BridgeError, match="100 are free"):
        execute(simple(tmp_path, 1), str(tmp_path / "out"))
    assert left(tmp_path) == []


def test_folders_made_for_a_failed_target_go_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_kernel(monkeypatch, errno.ENOSPC)
    ref = store(tmp_path / "s", noise((64, 64), "float32"), "float32")
    with pytest.raises(BridgeError, match="No space"):
        execute(
            plan_of(OutputTensor("t", "float32", (64, 64), (box(ref),))),
            str(tmp_path / "a" / "b" / "out"),
        )
    assert left(tmp_path) == []


def test_chunks_are_bounded() -> None:
    assert movers.BUFFER_BYTES <= transform.BLOCK_BYTES <= 8 << 20
    assert transform.STEP_BYTES * transform.GAPS <= transform.BLOCK_BYTES


def test_nothing_heavy_is_imported() -> None:
    import subprocess
    import sys

    code = "import neox_bridge.execution.execute, sys; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("seed", range(8))
def test_a_hash_follows_what_is_written(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order tensors are written, and though a zip's directory changes until the end."""
    monkeypatch.setattr(trailing_hashes, "_LEAST_BYTES", 1)
    sizes = [3000, 1, 70_000, 4096, 12, 500]
    offsets = [100 + sum(sizes[:n]) + 10 * n for n in range(len(sizes))]
    data = bytearray(random.Random(seed).randbytes(offsets[-1] + sizes[-1] + 200))
    tensors = tuple(
        OutputTensor(f"t{n}", "uint8", (size,), offset=at)
        for n, (size, at) in enumerate(zip(sizes, offsets, strict=True))
    )
    path = tmp_path / "file"
    path.write_bytes(bytes(len(data)))
    file = OutputFile("file", len(data), (), tensors)
    trail = trailing_hashes.Trail(file, str(path), Context(), "xxh3_128", True)
    with path.open("r+b") as stream:
        stream.write(data[:100])
        for number in random.Random(seed).sample(range(len(sizes)), len(sizes)):
            end = offsets[number] + sizes[number] + 10
            stream.seek(offsets[number])
            stream.write(data[offsets[number] : end])
            stream.flush()
            trail.written(number)
        stream.seek(end := offsets[-1] + sizes[-1])
        stream.write(data[end:])
    assert trail.digest() == xxhash.xxh3_128(bytes(data)).hexdigest()


@pytest.mark.parametrize("seed", range(8))
def test_shared_blocks_are_hashed_as_the_source_has_them(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not read from the target's file, in which they are other bytes here."""
    monkeypatch.setattr(trailing_hashes, "_LEAST_BYTES", 1)
    rng = random.Random(seed)
    data = rng.randbytes(60_000)
    starts = sorted(rng.sample(range(1, 59), 12))
    tensors = tuple(OutputTensor(f"t{at}", "uint8", (900,), offset=1000 * at + 50) for at in starts)
    path, context, written = tmp_path / "file", Context(), bytearray(data)
    source = tmp_path / "source"
    source.write_bytes(b"ahead" + data)
    path.write_bytes(data)
    status = path.stat()
    trail = trailing_hashes.Trail(
        OutputFile("file", len(data), (), tensors), str(path), context, "xxh3_128", True
    )
    for number in rng.sample(range(len(tensors)), len(tensors)):
        for part in range(rng.randrange(3)):
            at = tensors[number].offset + 300 * part
            span = Shared(at, rng.randrange(1, 300), str(source), 5 + at)
            context.share((status.st_dev, status.st_ino), span)
            written[at : at + span.size] = bytes(span.size)
            path.write_bytes(written)
        trail.written(number)
    assert trail.digest() == xxhash.xxh3_128(data).hexdigest()
    assert written != data
