"""Zips on which two readers could disagree are refused; all others are read as torch reads them."""

import io
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from attack_checkpoints import LAYER, checkpoint_with
from attack_zip import CANARY, DISAGREED, EVIL, SOUND, built, parts
from click.testing import CliRunner
from common import FIXTURES, fixture, step_of

from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickle_security import scan
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.formats.zip_directory import ZipError, data_places, read_directory

FILES = sorted(FIXTURES.glob("*/checkpoints/*/*.pt"))


def ours(path: Path) -> dict[str, bytes] | None:
    """The records as this reader finds them; None where it refuses the zip."""
    with path.open("rb") as file:
        try:
            entries, end = read_directory(file)
            places = data_places(file, entries, end)
        except ZipError:
            return None
        records = {}
        for entry, start in zip(entries, places, strict=True):
            file.seek(start)
            records[entry.name] = file.read(entry.packed)
    return records


def of_torch(path: Path) -> dict[str, bytes] | None:
    """The records as torch finds them below its folder; None where it refuses the zip."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        return {name: reader.get_record(name) for name in reader.get_all_records()}
    except (RuntimeError, UnicodeDecodeError):
        return None


def below(records: dict[str, bytes]) -> dict[str, bytes]:
    """The records without the name of their folder."""
    return {name.partition("/")[2]: data for name, data in records.items()}


def of_python(path: Path) -> dict[str, bytes] | None:
    """The records as zipfile finds them, which checks their CRC too."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                info.CRC = None  # type: ignore[assignment]
                records[info.orig_filename] = archive.read(info)
    except Exception:
        return None
    return records


def faults(path: Path) -> list[str]:
    """Where this reader accepts a zip and another one sees something else in it."""
    mine = ours(path)
    if mine is None:
        return []
    wrong = []
    if (theirs := of_torch(path)) is not None and theirs != below(mine):
        wrong.append(f"torch reads {sorted(theirs)} and this reader {sorted(mine)}")
    if (theirs := of_python(path)) is not None and theirs != mine:
        wrong.append(f"Python reads {sorted(theirs)} and this reader {sorted(mine)}")
    return wrong


# --- what is sound is read -----------------------------------------------------------------


@pytest.mark.parametrize("name", SOUND)
def test_sound_zips_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(SOUND[name]())
    records = ours(path)
    assert records is not None
    assert of_torch(path) == below(records)
    assert of_python(path) == records
    assert set(read_torch(str(path))) == {"a"}  # type: ignore[call-overload]
    assert scan(str(path)).harmless


def test_genuine_files_are_read_as_torch_reads_them() -> None:
    for path in FILES[::7]:
        records = ours(path)
        assert records is not None
        assert of_torch(path) == below(records)
        assert of_python(path) == records


@pytest.mark.parametrize("crc", [True, False])
def test_what_torch_saves_is_read(crc: bool, tmp_path: Path) -> None:
    """With checksums or without, in memory or to a path, with any alignment."""
    from torch.utils.serialization import config

    value = {"a": torch.ones(3), "none": torch.ones(0), "b": torch.arange(5000.0)}
    before = config.save.storage_alignment
    torch.serialization.set_crc32_options(crc)
    try:
        for alignment in (64, 4096):
            config.save.storage_alignment = alignment
            torch.save(value, tmp_path / "x.pt")
            buffer = io.BytesIO()
            torch.save(value, buffer)
            (tmp_path / "y.pt").write_bytes(buffer.getvalue())
            for name in ("x.pt", "y.pt"):
                assert of_torch(tmp_path / name) == below(ours(tmp_path / name) or {})
    finally:
        torch.serialization.set_crc32_options(True)
        config.save.storage_alignment = before


def test_what_older_torch_wrote_is_read(tmp_path: Path) -> None:
    """torch 1.x: a folder "archive", keys that are addresses, no byteorder; version first."""
    target = tmp_path / "x.pt"
    writer = torch._C.PyTorchFileWriter(str(target))
    writer.write_record("data.pkl", parts()[0].data, len(parts()[0].data))
    writer.write_record("data/0", bytes(16), 16)
    writer.write_end_of_file()
    assert of_torch(target) == below(ours(target) or {})
    assert set(read_torch(str(target))) == {"a"}  # type: ignore[call-overload]


# --- what isn't is refused -----------------------------------------------------------------


@pytest.mark.parametrize("name", DISAGREED)
def test_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(DISAGREED[name]())
    with pytest.raises(BridgeError) as caught:
        read_torch(str(path))
    assert str(path) in str(caught.value)
    done = CliRunner().invoke(app, ["inspect", "--security", str(path)])
    assert done.exit_code == 1
    assert "x.pt" in done.stdout
    assert "not fully read" in done.stdout
    assert "may run code" in done.stderr
    assert not (tmp_path / CANARY).exists()


def test_they_are_refused_for_what_they_are(tmp_path: Path) -> None:
    """Not because the files of this test are broken in another way: ``SOUND`` are built alike."""
    path = tmp_path / "x.pt"
    for name, make in DISAGREED.items():
        path.write_bytes(make())
        with pytest.raises(BridgeError, match="different programs could read different contents"):
            read_torch(str(path))
        with path.open("rb") as file, pytest.raises(ZipError):
            data_places(file, *read_directory(file))
        assert name


@pytest.mark.parametrize("name", ["two directories", "two zip64 ends"])
def test_two_readers_do_read_two_things(name: str, tmp_path: Path) -> None:
    """The attacks mean something: torch and Python each find another pickle."""
    path = tmp_path / "x.pt"
    path.write_bytes(DISAGREED[f"{name}, torch's runs"]())
    assert of_torch(path)["data.pkl"] == EVIL  # type: ignore[index]
    assert of_python(path)["x/data.pkl"] != EVIL  # type: ignore[index]
    path.write_bytes(DISAGREED[f"{name}, Python's runs"]())
    assert of_torch(path)["data.pkl"] != EVIL  # type: ignore[index]
    assert of_python(path)["x/data.pkl"] == EVIL  # type: ignore[index]


@pytest.mark.parametrize("command", ["convert", "inspect", "verify", "doctor", "reshard"])
def test_every_command_refuses_them(command: str, tmp_path: Path) -> None:
    source = checkpoint_with(tmp_path, LAYER, DISAGREED["two tensors"]())
    sound, out = str(fixture("pythia_fp32_pp1_tp2")), str(tmp_path / "out")
    arguments = {
        "convert": [str(source), out],
        "inspect": ["--tensors", str(source)],
        "verify": [sound, str(source)],
        "doctor": [str(source)],
        "reshard": [str(source), out, "--tp", "1"],
    }[command]
    done = CliRunner().invoke(app, [command, *arguments])
    assert done.exit_code in (1, 4), done.output
    assert str(step_of(source) / LAYER) in done.output.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_names_are_those_of_torch_whatever_their_case(tmp_path: Path) -> None:
    """torch finds x/BYTEORDER and x/Constants.pkl, so this reader does."""
    from attack_zip import Part

    path = tmp_path / "x.pt"
    path.write_bytes(built(parts(order=Part(b"x/ByteOrder", b"big"))))
    with pytest.raises(BridgeError, match="big-endian"):
        read_torch(str(path))
    path.write_bytes(built([*parts(), Part(b"x/Code/a.py", b"1")]))
    with pytest.raises(BridgeError, match="TorchScript"):
        read_torch(str(path))
    assert not scan(str(path)).harmless
    path.write_bytes(built(parts(tensor=Part(b"x/DATA/0", bytes(16)))))
    assert torch.load(path, weights_only=False)["a"].shape == (4,)
    assert set(read_torch(str(path))) == {"a"}  # type: ignore[call-overload]


# --- generated -----------------------------------------------------------------------------


def _sources() -> list[bytes]:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "e": torch.ones(0)}, buffer)
    return [buffer.getvalue(), *(make() for make in SOUND.values())]


def _regions(raw: bytes) -> list[int]:
    """The bytes of headers, where changes mean something."""
    places = set[int]()
    for signature, size in (
        *((b"PK\3\4", 60), (b"PK\1\2", 70), (b"PK\5\6", 22), (b"PK\6\6", 56), (b"PK\6\7", 20)),
        (b"PK\7\10", 24),
    ):
        at = raw.find(signature)
        while at >= 0:
            places.update(range(at, min(len(raw), at + size)))
            at = raw.find(signature, at + 1)
    return sorted(places)


def _mutated(raw: bytes, chance: random.Random) -> bytes:
    data, places = bytearray(raw), _regions(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.choice(places)
        match chance.randrange(6):
            case 0:
                data[at % len(data)] = chance.randrange(256)
            case 1:  # a number a little off, or another file's
                at = min(at, len(data) - 4)
                (value,) = struct.unpack_from("<I", data, at)
                value = chance.choice(
                    (value + chance.choice((1, 2, 16, 46)), value - 1, 0, 2**32 - 1)
                )
                struct.pack_into("<I", data, at, value % 2**32)
            case 2:
                at = min(at, len(data) - 2)
                struct.pack_into("<H", data, at, chance.choice((0, 1, 8, 2048, 0xFFFF)))
            case 3:
                data[at:at] = bytes(chance.randrange(1, 30))
            case 4:  # a piece twice
                to = min(len(data), at + chance.choice((22, 46, 56, 76, 98)))
                data[at:at] = data[at:to]
            case _:
                del data[at : at + chance.choice((1, 2, 20, 22, 46, 56))]
        if len(data) < 30:
            break
    return bytes(data)


def test_generated_zips_are_read_as_others_read_them_or_refused(tmp_path: Path) -> None:
    """2,500 zips with other headers, of which torch or Python accept some hundreds."""
    path, chance, sources = tmp_path / "x.pt", random.Random(19), _sources()
    accepted, refused = 0, 0
    for _ in range(2500):
        path.write_bytes(_mutated(chance.choice(sources), chance))
        assert faults(path) == [], path.read_bytes()
        mine = ours(path)
        accepted += mine is not None
        refused += mine is None and of_torch(path) is not None
    assert accepted > 50
    assert refused > 200


def test_every_field_of_every_header(tmp_path: Path) -> None:
    """Each byte of the headers of a small file, changed in three ways."""
    path, raw = tmp_path / "x.pt", built(parts())
    for at in _regions(raw):
        for change in (1, 8, 255):
            data = bytearray(raw)
            data[at] ^= change
            path.write_bytes(data)
            assert faults(path) == [], (at, change)


def test_any_difference_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeps mean something: a reader that trusts Python's zipfile fails them."""
    path = tmp_path / "x.pt"
    path.write_bytes(DISAGREED["two directories, torch's runs"]())
    monkeypatch.setattr(f"{__name__}.ours", of_python)
    assert faults(path)
