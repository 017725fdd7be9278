"""Where tensors are placed so that a file system can share their blocks, and that XFS does."""

import contextlib
import os
import random
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import assert_same, hf_tensors, step_of

import neox_bridge
from neox_bridge import BridgeError
from neox_bridge.execution.result import Result
from neox_bridge.formats.safetensors import layout_safetensors, read_safetensors
from neox_bridge.formats.tensor_ref import TensorRef
from neox_bridge.planning.pieces import OutputTensor, Piece, box
from neox_bridge.planning.sharing import BLOCK, arranged, residue, shared_together
from neox_bridge.toy import plan_toy

MB = 1 << 20


def tensor(size: int, *offsets: int, name: str = "t", dtype: str = "uint8") -> OutputTensor:
    """In equal parts from files, at these offsets of each; without any, of zeros."""
    part = size // max(1, len(offsets))
    pieces = tuple(
        Piece(TensorRef(f"{name}{i}", at, "uint8", (part,)), (0,), (part * i,), (part,))
        for i, at in enumerate(offsets)
    )
    return OutputTensor(name, dtype, (size,), pieces or (Piece(None, (0,), (0,), (size,)),))


def test_residues() -> None:
    assert residue(tensor(MB, 5 * BLOCK + 64)) == 64
    assert residue(tensor(2 * MB, 64, 64)) == 64
    assert residue(tensor(4 * MB, 64, 128, 128, 192)) == 128, "what most bytes want"
    assert residue(tensor(2 * (MB + 8), 64 + 16, 64 + 24)) == 64 + 16
    assert residue(tensor(MB)) is None
    assert residue(tensor(1000, 64)) is None, "too small to be worth it"
    assert residue(tensor(MB, 63)) is None, "no place for elements of 8 bytes"
    assert residue(replace(tensor(MB, 64), dtype="int8")) is None, "a cast"
    assert residue(replace(tensor(MB, 64), divisor=2)) is None
    assert residue(replace(tensor(MB, 64), reduce="sum")) is None
    twice = replace(tensor(MB, 64), pieces=(box(TensorRef("a", 64, "uint8", (MB,))),) * 2)
    assert residue(replace(twice, reduce="replica")) == 64


def shared(first: int | None, order: list[OutputTensor]) -> int:
    """The bytes that lie where they can be shared."""
    at, found = first or 0, 0
    for one in order:
        found += one.nbytes if residue(one) == at % BLOCK else 0
        at += one.nbytes
    return found


def mixed(seed: int) -> list[OutputTensor]:
    rng = random.Random(seed)
    sizes = [MB, 2 * MB, MB + 64, 2048, 6144, 0, 100 * BLOCK + 2048]
    places = [64, 128, 2112, 2176]
    return [
        tensor(size, *([rng.choice(places)] if size > BLOCK and rng.random() < 0.8 else []))
        for size in rng.choices(sizes, k=rng.randrange(40))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_an_order_loses_nothing_and_wins_something(seed: int) -> None:
    tensors = mixed(seed)
    first, order = arranged(tensors)
    assert sorted(map(id, order)) == sorted(map(id, tensors))
    if first is None:
        assert order == tensors
        assert not any(residue(one) for one in tensors)
        return
    assert shared(first, order) >= sum(
        one.nbytes for one in tensors if residue(one) == first and one.nbytes % BLOCK == 0
    )


def test_small_tensors_stand_where_they_lead_to_more() -> None:
    large = [tensor(MB, at) for at in (64, 64 + 2048)] * 3
    first, order = arranged([*large, *(tensor(2048) for _ in range(3))])
    assert shared(first, order) == 6 * MB
    assert first == 64


def test_files_of_what_goes_together() -> None:
    a, b = [tensor(3 * MB, 64)] * 3, [tensor(MB, 128)] * 2
    rest, few = tensor(100), tensor(70_000, 256)
    groups = shared_together([a[0], b[0], rest, few, *a[1:], b[1]])
    assert groups == [[*a, rest, few], b]
    assert shared_together([rest]) == [[rest]]


@pytest.mark.parametrize("first", [None, 0, 8, 64, 4088])
def test_the_header_brings_the_data_to_its_place(first: int | None, tmp_path: Path) -> None:
    file = layout_safetensors("x", [tensor(64)], first)
    (tmp_path / "x").write_bytes(file.literals[0][1] + bytes(64))
    (ref,) = read_safetensors(str(tmp_path / "x")).values()
    assert ref.offset == file.tensors[0].offset
    assert ref.offset % BLOCK == first if first is not None else ref.offset < 200


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def mount(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A file system that shares blocks."""
    make = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
    command = make[request.param]
    if os.geteuid() or not shutil.which(command[0]):
        pytest.skip(f"needs root and {command[0]}")
    folder = tmp_path_factory.mktemp(request.param)
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(1500 << 20)
    subprocess.run([*command, image], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop mount here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)
        image.unlink()


@pytest.fixture
def disk(mount: Path) -> Iterator[Path]:
    """A folder on it, with a toy of Pythia-70M's shape and one block."""
    folder = mount / "folder"
    hf = str(folder / "hf")
    try:
        neox_bridge.execute(plan_toy("pythia-70m", hf, "hf", layers=1), hf)
        yield folder
    finally:
        shutil.rmtree(folder)


def convert(source: Path, target: Path, every_crc: bool = False, **options: object) -> Result:
    checkpoint = neox_bridge.open_checkpoint(str(source))
    plan = neox_bridge.make_plan(checkpoint, neox_bridge.Options(**options), str(target))  # type: ignore[arg-type]
    return neox_bridge.execute(plan, str(target), every_crc=every_crc)


def used(mount: Path) -> int:
    os.sync()
    found = os.statvfs(mount)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@contextlib.contextmanager
def room_for(mount: Path, limit: int) -> Iterator[None]:
    before = used(mount)
    yield
    assert used(mount) - before < limit


def test_blocks_are_shared_there_and_back(disk: Path) -> None:
    """All but edges and small tensors, and the disk is as full as before."""
    with room_for(disk, 8 * MB):
        there = convert(disk / "hf", disk / "neox")
        back = convert(disk / "neox", disk / "back")
    for result in (there, back):
        assert result.shared > 0.99 * result.size
    assert_same(hf_tensors(disk / "hf"), hf_tensors(disk / "back"))


def test_rows_of_ranks_are_shared(disk: Path) -> None:
    there = convert(disk / "hf", disk / "neox", tp=2, layout="ranks")
    assert 0.9 < there.shared / there.size < 1, "only two matrices a block are split by columns"
    back = convert(disk / "neox", disk / "back")
    assert 0.9 < back.shared / back.size < 1
    assert_same(hf_tensors(disk / "hf"), hf_tensors(disk / "back"))


def test_files_as_torch_writes_them(disk: Path) -> None:
    """Each tensor lies wherever torch put it: in one file few can be shared, in several all."""
    convert(disk / "hf", disk / "neox")
    for path in step_of(disk / "neox").glob("*.pt"):
        torch.save(torch.load(path, weights_only=False), path)
    os.sync()
    one = convert(disk / "neox", disk / "one")
    with room_for(disk, 8 * MB):
        more = convert(disk / "neox", disk / "more", shards="clone")
    assert one.shared < 0.96 * one.size
    assert more.shared > 0.99 * more.size
    assert len(list((disk / "more").glob("*.safetensors"))) > 1
    for name in ("one", "more"):
        assert_same(hf_tensors(disk / "hf"), hf_tensors(disk / name))


def test_a_full_disk_has_room_for_what_is_shared(disk: Path) -> None:
    size = sum(path.stat().st_size for path in (disk / "hf").iterdir())
    os.sync()  # what other tests removed is free only then
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - size // 2)
    os.sync()
    try:
        there = convert(disk / "hf", disk / "neox")
        assert there.shared > 0.99 * there.size
        with pytest.raises(BridgeError, match="No space left"):
            convert(disk / "hf", disk / "cast", dtype="bfloat16")
    finally:
        os.truncate(disk / "ballast", 0)  # at once, where XFS removes files some time later
        (disk / "ballast").unlink()


def test_every_crc_of_shared_blocks(disk: Path) -> None:
    wrong = []
    for every_crc in (False, True):
        there = convert(disk / "hf", disk / "neox", every_crc=every_crc)
        assert there.shared > 0.99 * there.size
        (file,) = step_of(disk / "neox").glob("layer_00*.pt")
        with zipfile.ZipFile(file) as archive:
            wrong.append(archive.testzip())
        shutil.rmtree(disk / "neox")
    assert wrong == ["layer_00-model_00-model_states/data/0", None]
