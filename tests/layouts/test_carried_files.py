"""Licenses, notices and other small texts travel to GPT-NeoX and back, byte for byte."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from click.testing import CliRunner
from tiny import convert, plan_of, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.carried_names import FOLDER, MOST_BYTES, is_carried
from neox_bridge.verification.sealed import check_seal, find_record

TEXTS = {
    "LICENSE": b"Apache License\r\nwithout a last line end, \xe2\x82\xac",
    "NOTICE.txt": b"made by many\n",
    "Use_Policy.md": b"# Use it well\n",
    "LICENSE-MODEL": b"",
    "COPYING": b"copy it\n",
    "CITATION.cff": b"cff-version: 1.2.0\n",
    "generation_config.json": b'{"temperature": 0.5,\n "bos_token_id": 0}',
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
}
CARD = b"---\nlicense: mit\nbase_model: org/base\n---\n# A model\n\nWhat it is.\n"
OTHERS = ["modeling_x.py", "install.sh", "tool.so", "head.pkl", "picture.png", "onnx/"]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = write_hf(tmp_path / "hf")
    for name, data in {**TEXTS, "README.md": CARD}.items():
        (folder / name).write_bytes(data)
    return folder


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in TEXTS}


def run(*words: str) -> Any:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done


def test_there_and_back(hf: Path, tmp_path: Path) -> None:
    neox = convert(hf, tmp_path / "neox", tp=2)
    assert texts(neox / FOLDER) == TEXTS
    assert (neox / FOLDER / "README.md").read_bytes() == CARD
    assert {p.name for p in (neox / FOLDER).iterdir()} == {*TEXTS, "README.md"}
    back = convert(neox, tmp_path / "back")
    assert texts(back) == TEXTS
    card = (back / "README.md").read_bytes()
    assert card.startswith(CARD)
    other = convert(neox, tmp_path / "tp1", to="neox", tp=1)
    assert texts(other / FOLDER) == TEXTS
    again = convert(convert(back, tmp_path / "neox2", tp=2), tmp_path / "again")
    assert texts(again) == TEXTS
    cast = convert(hf, tmp_path / "cast", to="hf", dtype="float16")
    assert texts(cast) == TEXTS


def test_the_record_knows_them(hf: Path, tmp_path: Path) -> None:
    for target in (convert(hf, tmp_path / "neox"), convert(tmp_path / "neox", tmp_path / "back")):
        record = find_record(str(target))
        written = json.loads(Path(record).read_bytes())["written"]["files"]
        prefix = "" if target.name == "back" else f"../{FOLDER}/"
        assert {f"{prefix}{name}" for name in TEXTS} <= set(written)
        assert check_seal(record).changes == ()
    (tmp_path / "back" / "LICENSE").write_bytes(b"another")
    assert not check_seal(find_record(str(tmp_path / "back"))).holds
    (tmp_path / "neox" / FOLDER / "LICENSE").write_bytes(b"another")
    (change,) = check_seal(find_record(str(tmp_path / "neox"))).changes
    assert (change.path, change.kind) == (f"../{FOLDER}/LICENSE", "edited")


def test_what_does_not_travel_is_listed(hf: Path, tmp_path: Path) -> None:
    for name in OTHERS:
        (hf / name).mkdir() if name.endswith("/") else (hf / name).write_text("text")
    (hf / "CHANGELOG.md").write_bytes(b"x" * (MOST_BYTES + 1))
    (hf / "AUTHORS").write_bytes(b"\0\1")
    (hf / "NOTICE").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (hf / ".gitattributes").write_text("")
    code = ["head.pkl", "install.sh", "modeling_x.py", "tool.so"]
    expected = {
        **dict.fromkeys(code, "code"),
        **dict.fromkeys(["onnx/", "picture.png"], "not on the list"),
        "CHANGELOG.md": "too large",
        "AUTHORS": "not text",
        "NOTICE": "not text",
    }
    for command in ([], ["--dry-run"]):
        target = str(tmp_path / f"out{len(command)}")
        value = json.loads(run("convert", str(hf), target, "--json", "-q", *command).stdout)
        assert {one["name"]: one["reason"] for one in value["not_carried"]} == expected
        assert sorted(value["carried"]) == sorted([*TEXTS, "README.md"])
        out = run("convert", str(hf), f"{target}-text", *command).output
        assert "9 files of the source not copied: AUTHORS (not text), CHANGELOG.md (too" in out
    assert {p.name for p in (tmp_path / "out0" / FOLDER).iterdir()} == {*TEXTS, "README.md"}
    assert not list(tmp_path.glob("out0/**/*.py"))


@pytest.mark.parametrize(
    "name", "LICENSE.py NOTICE.sh LICENSE.so readme.py copying.pkl LICENSE.md.py NOTICE/x".split()
)
def test_code_is_never_on_the_list(name: str) -> None:
    assert not is_carried(name)


@pytest.mark.parametrize("name", "licence Licenses.TXT MODEL_LICENSE.md COPYING.LESSER".split())
def test_names_in_any_case(name: str) -> None:
    assert is_carried(name)


def test_a_link_out_of_the_folder_is_an_error(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (hf / "NOTICE").symlink_to(tmp_path / "key")
    with pytest.raises(BridgeError, match="NOTICE is a symbolic link to"):
        open_checkpoint(str(hf))
    (hf / "NOTICE").unlink()
    (hf / "NOTICE").symlink_to("LICENSE")
    neox = convert(hf, tmp_path / "neox")
    assert (neox / FOLDER / "NOTICE").read_bytes() == TEXTS["LICENSE"]
    (neox / FOLDER / "PATENTS").symlink_to(tmp_path / "key")
    with pytest.raises(BridgeError, match="PATENTS is a symbolic link to"):
        open_checkpoint(str(neox))


def test_what_is_no_file_is_not_read(hf: Path, tmp_path: Path) -> None:
    (hf / "NOTICE").mkdir()
    os.mkfifo(hf / "COPYRIGHT")
    plan = plan_of(hf, tmp_path / "out")
    assert [file.name for file in plan.left] == ["COPYRIGHT", "NOTICE/"]


def trained(root: Path, saved: Path) -> Path:
    """What GPT-NeoX leaves when it saves a later step: no record, and the yml in ``configs``."""
    shutil.copytree(root / "global_step0", saved / "global_step7")
    (saved / "global_step7" / "neox_bridge.json").unlink()
    (saved / "latest").write_text("global_step7")
    for path in (saved / "global_step7" / "configs").iterdir():
        path.unlink()
    shutil.copy(root / "finetune.yml", saved / "global_step7" / "configs" / "finetune.yml")
    return saved


def test_steps_that_gpt_neox_saves_later_bring_them_back(hf: Path, tmp_path: Path) -> None:
    root = convert(hf, tmp_path / "neox")
    back = convert(trained(root, root), tmp_path / "back")
    assert texts(back) == TEXTS
    card = (back / "README.md").read_text()
    assert "**Trained:**" in card
    codes = [finding.code for finding in plan_of(root, tmp_path / "x").findings]
    assert "card-of-the-source" in codes
    assert (
        "**Trained:**"
        not in (convert(convert(hf, tmp_path / "b"), tmp_path / "c") / "README.md").read_text()
    )


def test_from_a_folder_of_their_own_too(hf: Path, tmp_path: Path) -> None:
    root = convert(hf, tmp_path / "neox")
    (root / FOLDER / "PATENTS").write_text("no record names this")
    saved = trained(root, tmp_path / "saved")
    assert texts(convert(saved, tmp_path / "back")) == TEXTS
    assert not (tmp_path / "back" / "PATENTS").exists()
    settings = saved / "global_step7" / "configs" / "finetune.yml"
    yml = yaml.safe_load(settings.read_text())
    settings.write_text(yaml.safe_dump({**yml, "load": str(saved)}))
    assert set(texts(convert(saved, tmp_path / "lost"))) == {"generation_config.json"}


def test_a_license_beside_latest(hf: Path, tmp_path: Path) -> None:
    """But not where the run lies in the source tree of GPT-NeoX."""
    for name in TEXTS:
        (hf / name).unlink()
    root = convert(hf, tmp_path / "neox")
    (root / "License.txt").write_text("mine")
    (root / "setup.py").write_text("")
    back = convert(root, tmp_path / "back")
    assert (back / "License.txt").read_text() == "mine"
    (root / "megatron").mkdir()
    assert open_checkpoint(str(root)).carried.names == ("README.md",)


def test_through_an_object_store(hf: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for path in hf.iterdir():
        fs.pipe_file(f"/carried/hf/{path.name}", path.read_bytes())
    run("convert", "memory://carried/hf", "memory://carried/neox", "--tp", "2")
    for name, data in TEXTS.items():
        assert fs.cat_file(f"/carried/neox/{FOLDER}/{name}") == data
    run("convert", "memory://carried/neox", str(tmp_path / "back"))
    assert texts(tmp_path / "back") == TEXTS
    run("convert", "memory://carried/neox", "memory://carried/back")
    assert fs.cat_file("/carried/back/LICENSE") == TEXTS["LICENSE"]


def test_beside_the_steps_of_a_run(hf: Path, tmp_path: Path) -> None:
    """Ours are replaced, edited ones stay, and those of another model are not passed on."""
    root = convert(hf, tmp_path / "run")
    (hf / "NOTICE.txt").write_text("new")
    (hf / "COPYING").unlink()
    convert(hf, root, iteration=5)
    assert (root / FOLDER / "NOTICE.txt").read_text() == "new"
    assert not (root / FOLDER / "COPYING").exists()
    (root / FOLDER / "LICENSE").write_text("edited")
    convert(hf, root, iteration=6)
    assert (root / FOLDER / "LICENSE").read_text() == "edited"
    (hf / "NOTICE.txt").write_text("newer")
    convert(hf, root, iteration=7)
    assert (root / FOLDER / "NOTICE.txt").read_text() == "new"
    other = write_hf(tmp_path / "other", layer_norm_eps=1e-6)
    with pytest.raises(BridgeError, match="license or the card of another model"):
        convert(other, root, iteration=8, overwrite=True)
    shutil.copytree(root, tmp_path / "elsewhere")
    (root / FOLDER / "LICENSE").write_bytes(TEXTS["LICENSE"])
    convert(other, root, iteration=8, overwrite=True)
    assert not (root / FOLDER).exists()


def test_overwriting_deletes_them_as_ours(hf: Path, tmp_path: Path) -> None:
    neox = convert(hf, tmp_path / "out")
    shutil.rmtree(neox / "global_step0")
    (neox / "latest").unlink()
    (neox / "finetune.yml").unlink()
    convert(write_hf(tmp_path / "plain"), neox, overwrite=True)
    assert not (neox / FOLDER).exists()
