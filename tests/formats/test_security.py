"""``neox-bridge inspect --security``: what would run is named, what only builds values is known."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_pickles import REFUSED, WORK, running
from attack_torch import GOOD, MAGIC, PICKLE, STREAMS, ZIPS, legacy, stored, zipped
from click.testing import CliRunner
from common import FIXTURES
from pt_files import tar_header

import neox_bridge
from neox_bridge.cli.app import app
from neox_bridge.formats.pickle_security import scan
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch

FILES = sorted(FIXTURES.glob("*/checkpoints/*/*.pt"))
SPECIAL = [path for path in FILES if "optim" in path.name or path.name.startswith("mp_rank")]


def look(path: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["inspect", "--security", str(path), *more])


def names(path: Path, data: bytes) -> dict[str, str]:
    """What would happen to each name that isn't known to be harmless."""
    path.write_bytes(data)
    report = scan(str(path))
    return {
        use.name: "changed" if use.changed else "called" if use.called else "imported"
        for use in report.uses
        if not use.harmless
    }


# --- genuine files --------------------------------------------------------------------------


def test_genuine_files_are_harmless() -> None:
    for path in FILES:
        report = scan(str(path))
        assert report.harmless, report
        assert (report.container, report.pickles) == ("zip", 1)
        assert report.uses


def test_genuine_files_open_with_nothing_imported() -> None:
    """Optimizer and mp_rank files name DeepSpeed's and numpy's classes: none is looked up."""
    assert len(SPECIAL) > 5
    script = (
        "import sys\n"
        "from neox_bridge.formats.torch_file import read_torch\n"
        "before = set(sys.modules)\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(event))\n"
        "for path in sys.argv[1:]: read_torch(path)\n"
        "print(sorted(set(sys.modules) - before), [e for e in seen if 'find_class' in e])\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'deepspeed')])\n"
    )
    source = str(Path(neox_bridge.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, SPECIAL)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.stderr == ""
    assert done.stdout == "[] []\n[]\n"


def test_what_deepspeed_saved_is_inert() -> None:
    """The loss scaler keeps its name and what it knew."""
    (path,) = FIXTURES.glob("pythia_fp16_pp1_tp1/checkpoints/*/zero_pp_rank_0*_optim_states.pt")
    state: Any = read_torch(str(path))
    scaler = state["optimizer_state_dict"]["loss_scaler"]
    assert isinstance(scaler, Record)
    assert scaler.factory.name == "DynamicLossScaler"  # type: ignore[attr-defined]
    assert isinstance(scaler.state, dict)
    assert scaler.state["cur_scale"] > 0


@pytest.mark.parametrize("zipped_", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_harmless(zipped_: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    value = [module.state_dict(), optimizer.state_dict(), torch.bfloat16, torch.device("cpu")]
    torch.save(value, path, _use_new_zipfile_serialization=zipped_)
    report = scan(str(path))
    assert report.harmless, report
    assert report.pickles == (1 if zipped_ else 5)


# --- hostile files --------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda data: data, zipped, legacy], ids=["raw", "zip", "legacy"])
@pytest.mark.parametrize("name", running(""))
def test_what_would_run_is_named(name: str, wrap: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(wrap(running("exit 3")[name]))
    assert not scan(str(path)).harmless
    done = look(path)
    assert done.exit_code == 1
    assert "may run code" in done.stderr


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (running("x")["reduce"], {"os.system": "called"}),
        (running("x")["popped"], {"os.system": "called"}),
        (running("x")["memo overwritten"], {"builtins.len": "imported", "os.system": "called"}),
        (running("x")["then damaged"], {"os.system": "called"}),
        (WORK["an import"](), {"canary_module.Thing": "imported"}),
        (WORK["an environment"](), {"os.environ": "changed"}),
        (WORK["a path"](), {"sys.path": "changed"}),
        (WORK["a module's attributes"](), {"os.path": "changed"}),
        (WORK["a type rebuilt by a call"](), {"os.system": "called"}),
        (
            b"\x80\x02ccopy_reg\n_reconstructor\n(ca\nB\nca\nC\nNtR.",
            {"a.B": "called", "a.C": "called"},
        ),
        (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(ca\nB\nK\x00\x85C\x01btR.",
            {"a.B": "called"},
        ),
        (
            b"\x80\x02cfunctools\npartial\n)R)R.",
            {"functools.partial": "called", "what functools.partial returns": "called"},
        ),
        (
            b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0aNsb.",
            {"collections.OrderedDict": "changed"},
        ),
        (
            b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
            {"collections.OrderedDict.fromkeys": "imported"},
        ),
        (b"\x80\x04\x8c\x01a\x8c\x01b\x93)}\x92.", {"a.b": "called"}),
        (b"(K\x01ia\nb\n.", {"a.b": "called"}),
        (b"(ca\nb\nK\x01o.", {"a.b": "called"}),
    ],
)
def test_deeds(data: bytes, want: dict[str, str], tmp_path: Path) -> None:
    assert names(tmp_path / "x.pkl", data) == want
    assert names(tmp_path / "x.pt", zipped(data)) == want


def test_all_five_pickles_of_an_old_file_are_read(tmp_path: Path) -> None:
    for name in ("a call as magic number", "a call as protocol", "a call as system"):
        assert names(tmp_path / "x.pt", STREAMS[name]()) == {"os.system": "called"}, name
    assert names(tmp_path / "x.pt", STREAMS["keys that are a call"]()) == {"os.system": "called"}


def test_a_second_pickle_of_another_stream_is_not_loaded(tmp_path: Path) -> None:
    assert names(tmp_path / "x.pkl", b"\x80\x02N." + running("x")["reduce"]) == {}
    assert names(tmp_path / "x.pkl", pickle.dumps(MAGIC) + running("x")["reduce"]) != {}


def test_compressed_pickles_are_read(tmp_path: Path) -> None:
    """torch loads them, though this converter doesn't."""
    hostile = [("x/data.pkl", running("x")["reduce"]), *GOOD[1:]]
    data = stored(hostile, zipfile.ZIP_DEFLATED)
    assert names(tmp_path / "x.pt", data) == {"os.system": "called"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_not_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for first, second in ((PICKLE, running("x")["reduce"]), (running("x")["reduce"], PICKLE)):
        path.write_bytes(stored([("x/data.pkl", first), ("x/data.pkl", second)]))
        assert "appears twice" in scan(str(path)).problem


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x", "x.dat"])
@pytest.mark.parametrize("magic", [b"ustar\x0000", b"ustar  \0", b""], ids=["posix", "gnu", "v7"])
def test_a_tar_is_known_by_its_checksum(magic: bytes, name: str, tmp_path: Path) -> None:
    """Whatever its name in a folder; also one whose first file's name is a pickle."""
    for first in (b"storages", b"\x80\x02N.", b"PK\x01"):
        (tmp_path / name).write_bytes(tar_header(first, magic) + bytes(1024))
        done = look(tmp_path)
        assert done.exit_code == 1
        assert f"{name}: 0 pickles\n  not fully read: it is a tar" in done.stdout


def test_a_zip_behind_a_pickle_is_not_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for raw in (pickle.dumps([1], 2), legacy(PICKLE)):
        path.write_bytes(raw)
        assert scan(str(path)).harmless
        path.write_bytes(raw + stored(GOOD))
        assert "a zip archive follows its pickle" in scan(str(path)).problem


def test_zips_that_are_none_of_ours_are_looked_into(tmp_path: Path) -> None:
    """In a folder, zips of any name: those with pickles, and those that nobody can be sure of."""
    import numpy

    numpy.savez(tmp_path / "x.npz", a=numpy.ones(3))
    with zipfile.ZipFile(tmp_path / "notes.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("notes.txt", "hello" * 99)
    done = look(tmp_path)
    assert (done.exit_code, done.stdout) == (0, "")
    (tmp_path / "odd.zip").write_bytes(stored(GOOD)[:-2] + b"\x01\0x")
    assert look(tmp_path).exit_code == 1


@pytest.mark.parametrize("name", ["compressed by lzma", "a program", "a directory of 4 GB"])
def test_zips_that_cannot_be_read_are_not_harmless(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(ZIPS[name]())
    report = scan(str(path))
    assert report.problem
    assert not report.harmless


def test_an_encrypted_pickle_is_not_harmless(tmp_path: Path) -> None:
    path, raw = tmp_path / "x.pt", bytearray(stored(GOOD))
    raw[6] = raw[raw.index(b"PK\x01\x02") + 8] = 1
    path.write_bytes(raw)
    assert not scan(str(path)).harmless


@pytest.mark.parametrize(
    "name", ["ext1", "no end", "100 MB string", "unknown opcode", "wide tuple as key"]
)
def test_what_is_not_read_to_its_end_is_not_harmless(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(REFUSED[name])
    done = look(path)
    assert done.exit_code == 1
    assert "not fully read" in done.stdout


def test_names_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + b"".join(b"ca\nb%d\n0" % i for i in range(6000)) + b"N.")
    report = scan(str(path))
    assert len(report.uses) == 5000
    assert "5,000" in report.problem
    path.write_bytes(b"\x80\x02c" + b"a" * 9999 + b"\nb\n.")
    assert len(scan(str(path)).uses[0].name) == 200


# --- folders and output ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "run"
    (found / "deep").mkdir(parents=True)
    (found / "config.json").write_text("{}")
    (found / "model.safetensors").write_bytes(bytes(8))
    (found / "notes.bin").write_bytes(b"\xff\xfe nothing")
    (found / "deep" / "hidden").write_bytes(running("x")["stack global"])
    for rank in range(3):
        torch.save({"a": torch.ones(2)}, found / f"mp_rank_0{rank}_model_states.pt")
    return found


def test_a_folder(folder: Path) -> None:
    done = look(folder)
    assert done.exit_code == 1
    assert "mp_rank_00_model_states.pt and 2 more files like it: 1 pickle" in done.stdout
    assert "deep/hidden: 1 pickle\n  UNKNOWN called   os.system\n" in done.stdout
    assert "5 files scanned, 1 of them may run code" in done.stderr
    (folder / "deep" / "hidden").unlink()
    done = look(folder)
    assert done.exit_code == 0
    assert "only builds values" in done.stderr


def test_json(folder: Path) -> None:
    done = look(folder, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["harmless"] is False
    by_name = {file["file"]: file for file in found["files"]}
    assert sorted(by_name) == [
        "deep/hidden", *(f"mp_rank_0{n}_model_states.pt" for n in range(3)), "notes.bin",
    ]  # fmt: skip
    assert by_name["deep/hidden"]["names"] == [
        {"name": "os.system", "known": False, "imported": 1, "called": 1, "changed": 0}
    ]
    assert by_name["notes.bin"]["container"] == "none"
    assert by_name["mp_rank_00_model_states.pt"]["harmless"] is True


def test_links_are_followed_to_files_only(folder: Path, tmp_path: Path) -> None:
    """The Hub's cache has links to files; a link to a folder may lead anywhere, or in circles."""
    (tmp_path / "blob").write_bytes(running("x")["reduce"])
    (folder / "deep" / "hidden").unlink()
    (folder / "around").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.pt").write_bytes(running("x")["reduce"])
    (folder / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.pt").symlink_to(tmp_path / "none")
    assert look(folder).exit_code == 0
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "blob")
    assert look(folder).exit_code == 1


def test_what_is_not_there_and_what_does_not_go_with_it(tmp_path: Path) -> None:
    done = look(tmp_path / "none")
    assert (done.exit_code, "no such file" in done.stderr) == (1, True)
    assert look(tmp_path, "--stats").exit_code == 2
    assert look(tmp_path).exit_code == 0


def test_a_tar_is_not_harmless(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        info = tarfile.TarInfo("pickle")
        data = running("x")["reduce"]
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    assert look(tmp_path / "x.pt").exit_code == 1
