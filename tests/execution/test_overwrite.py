"""--overwrite deletes checkpoints, and nothing that isn't part of one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from common import convert, make_hf, plan_of

from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.execute import execute
from neox_bridge.layouts import known_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overwrite")
    make_hf(folder / "source", num_hidden_layers=1)
    convert(folder / "source", folder / "neox")
    convert(folder / "neox", folder / "hf")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    for name in ("source", "neox", "hf"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


FOREIGN = [
    *(".git/HEAD", "photos/cat.jpg", "notes.txt", "train.py", "thesis.pdf", "data.json"),
    *("checkpoint-500/config.json", "optimizer.pt", "adapter_model.safetensors", "runs/a/b/c"),
    *(".cache/own", "global_step3/notes.txt", "tokenizer/words.txt", "zero", ".gitignore"),
    "config.json.orig",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_a_foreign_file_is_left_alone(name: str, home: Path) -> None:
    path = home / "hf" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = tree(home)
    code, words = run("convert", home / "neox", home / "hf", "--overwrite", "-q")
    assert code == 4
    assert "Nothing was deleted" in words
    parts = Path(name).parts
    top = name if parts[0] in ("global_step3", "tokenizer") else parts[0]
    assert any(f"them: {shown}" in words for shown in (name, f"{top}/", top, ".cache/own"))
    assert tree(home) == before
    assert not list(home.glob(".*"))


def test_five_are_named(home: Path) -> None:
    for number in range(8):
        (home / "hf" / f"notes{number}.txt").write_text("")
    code, words = run("convert", home / "neox", home / "hf", "--overwrite")
    assert code == 4
    assert "notes0.txt, notes1.txt, notes2.txt, notes3.txt, notes4.txt and 3 more." in words


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "{}/neox", "{}/hf"),
        ("convert", "{}/source", "{}/neox", "--to", "neox"),
        ("toy", "pythia-70m", "{}/hf", "--as", "hf", "--layers", "1"),
        ("doctor", "{}/source", "--for", "transformers@4.48", "--fix", "{}/neox"),
    ],
)
def test_every_command(command: tuple[str, ...], home: Path) -> None:
    for place in (home / "hf", home / "neox" / "global_step0"):
        (place / "photos").mkdir()
    before = tree(home)
    arguments = [argument.format(home) for argument in command]
    overwrite = [] if command[0] == "doctor" else ["--overwrite"]
    assert run(*arguments, *overwrite)[0] == (1 if command[0] == "doctor" else 4)
    assert tree(home) == before
    for place in (home / "hf", home / "neox" / "global_step0"):
        (place / "photos").rmdir()
    if command[0] != "doctor":
        assert run(*arguments, *overwrite)[0] == 0


@pytest.mark.parametrize("options", [[], ["--to", "neox", "--tp", "2"]])
def test_a_batch(options: list[str], home: Path) -> None:
    command = ["batch", home / "neox", home / "many", "--max-workers", 1, *options]
    assert run(*command)[0] == 0
    step = home / "many" / "step0"
    place = step / "global_step0" if options else step
    (place / "photos").mkdir()
    before = tree(home)
    assert run(*command, "--overwrite")[0] in (1, 4)
    assert tree(home) == before
    (place / "photos").rmdir()
    assert run(*command, "--overwrite")[0] == 0


def test_bookkeeping_and_the_files_of_a_checkpoint_make_room(home: Path) -> None:
    names = [
        *(".DS_Store", "._config.json", "__pycache__/a.pyc", ".cache/huggingface/download/x.lock"),
        *("model-00001-of-00009.safetensors", "pytorch_model.bin.index.json", "LICENSE.txt"),
        *(".gitattributes", "tokenizer.model", "original/consolidated.00.pth", "latest"),
        *("global_step7/configs/own.yml", "global_step7/layer_00-model_00-model_states.pt"),
        *("global_step7/zero/word_embeddings.weight/fp32.pt", "zero_to_fp32.py", "resume.yml"),
        *("global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt", "tokenizer/vocab.json"),
    ]
    for name in names:
        path = home / "hf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (home / "hf" / "latest").write_text("global_step7")
    plan = plan_of(home / "neox", home / "hf")
    execute(plan, str(home / "hf"), overwrite=True)
    assert set(tree(home / "hf")) == {file.path for file in plan.files}


def test_a_file_of_our_record_makes_room_whatever_its_name(home: Path) -> None:
    record = home / "hf" / "neox_bridge.json"
    record.write_text(record.read_text().replace('"config.json"', '"parts/words.of.mine"'))
    (home / "hf" / "parts").mkdir()
    (home / "hf" / "parts" / "words.of.mine").write_text("")
    execute(plan_of(home / "neox", home / "hf"), str(home / "hf"), overwrite=True)
    assert not (home / "hf" / "parts").exists()


def test_links(home: Path) -> None:
    """Of what a link leads to nothing is deleted; a link of a name that no checkpoint has stays."""
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / "photo").write_text("mine")
    (home / "hf" / "global_step9").symlink_to(home / "elsewhere")
    (home / "hf" / "config.json").unlink()
    (home / "hf" / "config.json").symlink_to(home / "elsewhere" / "photo")
    (home / "hf" / "mine").symlink_to(home / "elsewhere")
    plan = plan_of(home / "neox", home / "hf")
    with pytest.raises(Refused, match=r"them: mine\."):
        execute(plan, str(home / "hf"), overwrite=True)
    (home / "hf" / "mine").unlink()
    (home / "link").symlink_to(home / "hf")
    execute(plan, str(home / "link"), overwrite=True)
    assert (home / "link").is_symlink()
    assert not (home / "hf" / "global_step9").exists()
    assert (home / "elsewhere" / "photo").read_text() == "mine"


def strange(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "generation_config.json").unlink(missing_ok=True)
        make(folder / "generation_config.json")

    return build


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_foreign_whatever_its_name(
    make: Callable[[Path], object], home: Path
) -> None:
    strange(make)(home / "hf")
    with pytest.raises(Refused, match=r"generation_config\.json"):
        execute(plan_of(home / "neox", home / "hf"), str(home / "hf"), overwrite=True)


def test_what_is_mounted_below_is_foreign(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "hf" / "original").mkdir()
    mounts = frozenset({str(home / "hf" / "original")})
    monkeypatch.setattr(known_files, "_mounts_below", lambda _folder: mounts)
    with pytest.raises(Refused, match="original/"):
        execute(plan_of(home / "neox", home / "hf"), str(home / "hf"), overwrite=True)


def test_what_comes_during_a_conversion_is_not_deleted(home: Path) -> None:
    plan = plan_of(home / "neox", home / "hf")

    def check(_folder: str) -> None:
        (home / "hf" / "notes.txt").write_text("mine")

    with pytest.raises(Refused, match=r"notes\.txt.*kept in"):
        execute(plan, str(home / "hf"), overwrite=True, check=check)
    (home / "hf" / "notes.txt").unlink()
    assert execute(plan, str(home / "hf"), overwrite=True).kept


def test_an_empty_folder_needs_no_overwrite(home: Path) -> None:
    (home / "empty").mkdir()
    execute(plan_of(home / "neox", home / "empty"), str(home / "empty"))


def test_a_folder_that_holds_the_source(home: Path) -> None:
    with pytest.raises(BridgeError, match="contains the source"):
        execute(plan_of(home / "neox", home), str(home), overwrite=True)


def test_in_a_store(home: Path) -> None:
    fs = fsspec.filesystem("memory")
    url = "memory://overwrite/hf"
    plan = plan_of(home / "neox", home / "x")
    execute(plan, url)
    fs.pipe_file("/overwrite/hf/photos/cat.jpg", b"mine")
    fs.pipe_file("/overwrite/hf/.DS_Store", b"")
    before = {name: fs.cat_file(name) for name in fs.find("/overwrite")}
    with pytest.raises(Refused, match=r"them: photos/\. Nothing was deleted"):
        execute(plan, url, overwrite=True)
    assert {name: fs.cat_file(name) for name in fs.find("/overwrite")} == before
    fs.rm_file("/overwrite/hf/photos/cat.jpg")
    fs.pipe_file("/overwrite/hf/model-00001-of-00002.safetensors", b"old")
    execute(plan, url, overwrite=True)
    assert "/overwrite/hf/model-00001-of-00002.safetensors" not in fs.find("/overwrite")


@pytest.mark.parametrize("name", [".git/HEAD", "empty", "linked"])
def test_in_place_keeps_what_it_cannot_copy(name: str, home: Path) -> None:
    config = home / "source" / "config.json"
    place = home / "source" / name
    if name == "linked":
        place.symlink_to(home / "hf")
    elif name == "empty":
        place.mkdir()
    else:
        place.parent.mkdir()
        place.write_text("")
    before = config.read_bytes()
    code, words = run("doctor", home / "source", "--for", "transformers@4.48", "--in-place")
    assert code == 4
    assert name.split("/")[0] in words
    assert config.read_bytes() == before
