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
from neox_bridge.execution import extents, movers
from neox_bridge.execution.execute import execute
from neox_bridge.execution.extents import same_blocks
from neox_bridge.execution.result import Result
from neox_bridge.formats.safetensors import layout_safetensors, read_safetensors
from neox_bridge.tensors.pieces import OutputTensor, Piece, box
from neox_bridge.tensors.sharing import BLOCK_BYTES as BLOCK
from neox_bridge.tensors.sharing import arranged, residue, shared_together, whole_blocks
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.toy import plan_toy
from neox_bridge.verification.sealed import check_seal, find_record
from neox_bridge.verification.verify import verify

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


@pytest.mark.parametrize(
    ("start", "to", "size", "found"),
    [
        (64, BLOCK + 64, 3 * BLOCK, (BLOCK - 64, 3 * BLOCK - 64)),
        (0, 5 * BLOCK, 2 * BLOCK + 1, (0, 2 * BLOCK)),
        (64, 64, 2 * BLOCK - 65, (0, 0)),
        (64, 128, 9 * BLOCK, (0, 0)),
    ],
)
def test_whole_blocks(start: int, to: int, size: int, found: tuple[int, int]) -> None:
    assert whole_blocks(start, to, size) == found


Extent = tuple[int, int, int, int]  # in the file, on the disk, bytes, flags
SHARED, LAST, MERGED = 0x2000, 0x1, 0x1000


def told(monkeypatch: pytest.MonkeyPatch, files: list[list[Extent]]) -> None:
    """Have file systems say this of files; the list's index is the descriptor."""

    def ioctl(fd: int, request: int, answer: bytearray) -> int:
        assert request == extents._FIEMAP
        start, length, flags, _, room, _ = extents._QUERY.unpack_from(answer)
        assert flags == extents._SYNC
        within = [e for e in files[fd] if e[0] < start + length and e[0] + e[2] > start][:room]
        extents._QUERY.pack_into(answer, 0, start, length, flags, len(within), room, 0)
        for number, extent in enumerate(within):
            at = extents._QUERY.size + number * extents._EXTENT.size
            extents._EXTENT.pack_into(answer, at, *extent)
        return 0

    monkeypatch.setattr(extents.fcntl, "ioctl", ioctl)
    monkeypatch.setattr(extents, "_disk", lambda fd: 7)


def test_extents_that_are_cut_otherwise_are_the_same_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = [(BLOCK * i, 50 * BLOCK * (i // 3) + BLOCK * i, BLOCK, SHARED) for i in range(500)]
    wholes = [(BLOCK * i, 50 * BLOCK * (i // 3) + BLOCK * i, 3 * BLOCK) for i in range(0, 500, 3)]
    told(monkeypatch, [pieces, [(at + BLOCK, *e, SHARED | LAST | MERGED) for at, *e in wholes]])
    assert same_blocks(0, 0, 1, BLOCK, 500 * BLOCK)
    assert same_blocks(0, 100 * BLOCK + 5, 1, 101 * BLOCK + 5, 333 * BLOCK)
    assert not same_blocks(0, 0, 1, 0, BLOCK)
    assert not same_blocks(0, 0, 1, BLOCK, 501 * BLOCK), "beyond its end"


@pytest.mark.parametrize("flags", [0, 0x2, 0x4 | 0x2, 0x8, 0x80, 0x100, 0x200, 0x400, 0x800])
def test_what_may_differ_although_it_has_one_place(
    flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not shared, unwritten, compressed, encrypted, in memory only, inline …"""
    plain = [(0, BLOCK, 9 * BLOCK, SHARED)]
    odd = [(0, BLOCK, 9 * BLOCK, flags | SHARED if flags else 0)]
    told(monkeypatch, [plain, odd, odd])
    assert same_blocks(0, 0, 0, 0, 9 * BLOCK)
    assert not same_blocks(0, 0, 1, 0, 9 * BLOCK)
    assert not same_blocks(1, 0, 2, 0, 9 * BLOCK)


def test_holes_have_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    holes = [(BLOCK, BLOCK, BLOCK, SHARED), (3 * BLOCK, 9 * BLOCK, BLOCK, SHARED)]
    told(monkeypatch, [holes, holes, []])
    assert same_blocks(0, BLOCK, 1, BLOCK, BLOCK)
    for start, size in ((0, 2), (1, 3), (2, 1), (3, 2)):
        assert not same_blocks(0, start * BLOCK, 1, start * BLOCK, size * BLOCK)
    assert not same_blocks(2, 0, 2, 0, BLOCK)


def test_places_on_two_disks_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, [[(0, BLOCK, BLOCK, SHARED)]] * 2)
    assert same_blocks(0, 0, 1, 0, BLOCK)
    monkeypatch.setattr(extents, "_disk", lambda fd: fd)
    assert not same_blocks(0, 0, 1, 0, BLOCK)
    monkeypatch.setattr(extents, "_disk", lambda fd: None)
    assert not same_blocks(0, 0, 1, 0, BLOCK)


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
        execute(plan_toy("pythia-70m", hf, "hf", layers=1), hf)
        yield folder
    finally:
        shutil.rmtree(folder)


def convert(source: Path, target: Path, every_crc: bool = False, **options: object) -> Result:
    checkpoint = neox_bridge.open_checkpoint(str(source))
    plan = neox_bridge.plan(checkpoint, neox_bridge.Options(**options), str(target))  # type: ignore[arg-type]
    return execute(plan, str(target), every_crc=every_crc)


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


def test_shared_blocks_are_verified_unread(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk would be asked for: few bytes; and the hash is still that of the file."""
    seen = []
    read = movers.read

    def counted(fd: int, path: str, buffer: memoryview, start: int) -> None:
        seen.append(len(buffer))
        read(fd, path, buffer, start)

    monkeypatch.setattr(movers, "read", counted)
    for source, target in (("hf", "neox"), ("neox", "back")):
        checkpoint = neox_bridge.open_checkpoint(str(disk / source))
        plan = neox_bridge.plan(checkpoint, neox_bridge.Options(), str(disk / target))
        execute(plan, str(disk / target), hash_shared=True)
        seal = check_seal(find_record(str(disk / target)))
        assert seal.holds
        assert not seal.unhashed
        seen.clear()
        assert verify(checkpoint, neox_bridge.open_checkpoint(str(disk / target))).holds
        assert 0 < sum(seen) < 0.01 * plan.size


@pytest.mark.parametrize("changed", ["hf", "neox"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_byte_that_was_changed_is_found(changed: str, on_disk: bool, disk: Path) -> None:
    """Also while the change is in memory only, where the file's place is still the old one."""
    convert(disk / "hf", disk / "neox")
    source = neox_bridge.open_checkpoint(str(disk / "hf"))
    target = neox_bridge.open_checkpoint(str(disk / "neox"))
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    whole = (source if changed == "hf" else target).tensors[name]
    (ref,) = {piece.source for piece in whole.pieces if piece.source is not None}
    with open(ref.file, "r+b") as file:
        file.seek(ref.offset + 1 * MB)
        (byte,) = file.read(1)
        file.seek(ref.offset + 1 * MB)
        file.write(bytes([byte ^ 1]))
        file.flush()
        if on_disk:
            os.fsync(file.fileno())
        (difference,) = verify(source, target).differences
    assert difference.name == name
    assert difference.differing == 1


def test_blocks_of_a_copy_are_not_shared(disk: Path) -> None:
    (disk / "a").write_bytes(os.urandom(MB))
    subprocess.run(["cp", "--reflink=never", disk / "a", disk / "b"], check=True)
    subprocess.run(["cp", "--reflink=always", disk / "a", disk / "c"], check=True)
    with (disk / "a").open() as a, (disk / "b").open() as b, (disk / "c").open() as c:
        assert same_blocks(a.fileno(), 0, c.fileno(), 0, MB)
        assert not same_blocks(a.fileno(), 0, c.fileno(), BLOCK, MB - BLOCK)
        assert not same_blocks(a.fileno(), 0, b.fileno(), 0, MB)
        assert not same_blocks(b.fileno(), 0, b.fileno(), 0, MB), "not shared, so not known"
