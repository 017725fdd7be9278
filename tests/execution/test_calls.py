"""What a conversion costs in system calls and in bytes that pass through the process: counts."""

import fcntl
import os
import struct
import threading
import time
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from common import make_hf, plan_of

from neox_bridge.execution import output
from neox_bridge.execution.execute import execute

BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 1024}
BLOCKS = 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls by their name, and the bytes of reads and writes."""
    found: Counter[str] = Counter()

    def counted(name: str, size: bool = False) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            result = real(*args, **kwargs)
            if size:
                found[name + " bytes"] += result
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("open", "fsync", "ftruncate", "mkdir", "rename", "posix_fadvise"):
        counted(name)
    for name in ("preadv", "pwrite", "copy_file_range"):
        counted(name, size=True)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls") / "hf"
    return make_hf(folder, torch.float16, num_hidden_layers=BLOCKS, **BIG)


def refuse(*args: Any) -> Any:
    raise OSError(95, "not supported")


def test_what_stays_is_moved_by_the_kernel(
    source: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte of a large tensor passes through, and each costs one call and no other."""
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    plan = plan_of(source, tmp_path / "out")
    calls.clear()
    result = execute(plan, str(tmp_path / "out"), workers=1, hash_name=None)
    large = [t for file in plan.files for t in file.tensors if t.nbytes >= 1 << 16]
    assert len(large) == 4 * BLOCKS + 2
    assert calls["copy_file_range"] == len(large)
    assert calls["copy_file_range bytes"] == sum(tensor.nbytes for tensor in large)
    small = result.size - sum(tensor.nbytes for tensor in large)
    assert calls["preadv bytes"] + calls["pwrite bytes"] < 2 * small
    assert calls["fsync"] <= len(plan.files) + 7, "each file once, the folders, and the moves"
    # of files with large tensors: their small tensors and CRCs, and what lies between tensors
    pieces = sum(
        len(f.tensors) * 4 + len(f.literals) for f in plan.files if f.size > output.SMALL_BYTES
    )
    assert calls["pwrite"] <= pieces + len(plan.files)


def test_what_can_be_shared_is_not_moved(
    source: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each large tensor an edge of two blocks at most."""
    shared = []

    def share(target: int, request: int, argument: bytes) -> int:
        fd, start, size, to = struct.unpack("qQQQ", argument)
        shared.append(size)
        os.pwrite(target, os.pread(fd, size, start), to)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", share)
    plan = plan_of(source, tmp_path / "out")
    calls.clear()
    result = execute(plan, str(tmp_path / "out"), workers=1, hash_name=None)
    count = 4 * BLOCKS + 2
    assert len(shared) == count + 1, "one block of them on trial"
    assert result.shared == sum(shared) - shared[0]
    assert calls["copy_file_range bytes"] <= 2 * 4096 * count
    assert calls["pwrite bytes"] - result.shared < result.size - result.shared + 8 * 4096


def test_columns_are_read_in_large_blocks(
    source: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    """A matrix split by columns: not a call a row, but a few a megabyte."""
    plan = plan_of(source, tmp_path / "out", tp=2)
    matrices = [t for file in plan.files for t in file.tensors if len(t.shape) == 2]
    rows = sum(t.shape[0] for t in matrices if t.pieces[0].source.shape[1] > t.shape[1])  # type: ignore[union-attr]
    calls.clear()
    execute(plan, str(tmp_path / "out"), workers=1, hash_name=None)
    assert rows == 2 * 2 * 512 * BLOCKS
    assert calls["preadv"] < rows / 10


def test_many_ranks_cost_no_more_calls_a_tensor(tmp_path: Path, calls: Counter[str]) -> None:
    """A small file is opened, written and flushed once, however many tensors it holds."""
    hf = make_hf(tmp_path / "hf", num_hidden_layers=4, hidden_size=64, num_attention_heads=16)
    plan = plan_of(hf, tmp_path / "out", tp=16)
    small = [file for file in plan.files if file.size <= output.SMALL_BYTES]
    tensors = [tensor for file in small for tensor in file.tensors]
    assert len(small) == len(plan.files) > 16 * 6
    calls.clear()
    execute(plan, str(tmp_path / "out"), workers=2)
    assert calls["pwrite"] == len(small) + 1, "and who holds the lock"
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written <= calls["pwrite bytes"] < written + 200
    pieces = sum(1 for t in tensors for piece in t.pieces if piece.source and prod(piece.shape))
    assert calls["preadv"] <= 2 * pieces


def test_small_files_are_one_threads_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would take turns with the interpreter, and twice as long in all."""
    plan = plan_of(make_hf(tmp_path / "hf"), tmp_path / "out", tp=2)
    real, threads = output.write_small, []

    def small(*args: Any) -> Any:
        threads.append(threading.get_ident())
        time.sleep(0.005)  # so that another thread would take the next one
        return real(*args)

    monkeypatch.setattr(output, "write_small", small)
    execute(plan, str(tmp_path / "out"), workers=3)
    assert len(threads) > 4
    assert len(set(threads)) == 1


def test_a_hash_reads_each_byte_once_more(
    source: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    """Of files that were put together in memory not even that."""
    read = []
    for name in (None, "xxh3_128"):
        plan = plan_of(source, tmp_path / str(name))
        calls.clear()
        execute(plan, str(tmp_path / str(name)), workers=1, hash_name=name)  # type: ignore[arg-type]
        read.append(calls["preadv bytes"])
        if name is None:  # what stands beside a step has a hash all the same
            read[0] -= sum(f.size for f in plan.files if not f.path.startswith("global_step"))
    large = sum(file.size for file in plan.files if file.size > output.SMALL_BYTES)
    assert read[1] - read[0] == large
