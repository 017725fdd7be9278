"""A file's place on the disk is set aside before it is written, where that is of use."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from neox_bridge.execution import movers, reserving
from neox_bridge.execution.context import Context
from neox_bridge.execution.output import begin_large
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, box
from neox_bridge.tensors.tensor_ref import TensorRef

MB = 1 << 20


def file_of(source: Path, dtype: str) -> OutputFile:
    """4 MB of a source, 8 MB of zeros, 2 MB of the source; the source's data are int8."""
    source.write_bytes(bytes(4 * MB))
    own = OutputTensor("a", dtype, (4 * MB,), (box(TensorRef(str(source), 0, "int8", (4 * MB,))),))
    zeros = OutputTensor("z", dtype, (8 * MB,), (constant((8 * MB,), 0.0),), offset=4 * MB)
    less = replace(own, shape=(2 * MB,), offset=12 * MB)
    less = replace(less, pieces=(replace(own.pieces[0], shape=(2 * MB,)),))
    return OutputFile("out", 14 * MB, ((0, b"head"),), (own, zeros, less))


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(begin, bytes) of what is asked for."""
    found: list[tuple[int, int]] = []

    def ask(_fd: int, mode: int, start: int, size: int) -> int:
        assert mode == 0
        found.append((start, size))
        return -1

    monkeypatch.setattr(reserving, "_fallocate", lambda: ask)
    return found


def begin(file: OutputFile, folder: Path) -> os.stat_result:
    path = folder / "out"
    begin_large(file, str(path), Context(), None, False)
    return path.stat()


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("shares", [True, False])
def test_all_but_holes_and_what_will_be_shared(
    shares: bool,
    dtype: str,
    reserved: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cast shares nothing, whatever the disk can do."""
    monkeypatch.setattr(reserving, "can_share", lambda *_: shares)
    begin(file_of(tmp_path / "a", dtype), tmp_path)
    both = [(0, 4 * MB), (12 * MB, 2 * MB)]
    assert reserved == ([] if shares and dtype == "int8" else both)


def test_a_copied_file(reserved: list[tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(3 * MB))
    begin(OutputFile("out", 3 * MB, copy_of=str(tmp_path / "a")), tmp_path)
    shares = movers.can_share(str(tmp_path / "a"), str(tmp_path), Context())
    assert reserved == ([] if shares else [(0, 3 * MB)])


def test_the_disk_does_it(tmp_path: Path) -> None:
    """Through Linux's own call: the file has its blocks before anything is written into them."""
    found = begin(file_of(tmp_path / "a", "uint8"), tmp_path)
    assert found.st_size == 14 * MB
    (tmp_path / "trial").write_bytes(b"")
    with (tmp_path / "trial").open("r+b") as trial:
        if reserving._fallocate()(trial.fileno(), 0, 0, MB):
            pytest.skip("this file system can't reserve")
    assert 6 * MB <= found.st_blocks * 512 < 7 * MB
