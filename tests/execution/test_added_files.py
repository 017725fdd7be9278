"""`verify DST` names files that were added; exit code 3 where a reader could take them."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from common import convert, make_hf

from neox_bridge.cli.app import app

READ_IN_A_STEP = [
    *("configs/zz.yml", "configs/a.yaml", "configs/more.json", "layer_09-model_00-model_states.pt"),
    *("layer_02-model_01-model_states.pt", "mp_rank_07_model_states.pt", "zero/optimizer_state.pt"),
    *("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero/final_linear.weight/fp32.pt"),
    *(
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
    ),
    *("../latest_universal", "../tokenizer/tokenizer.json", "../tokenizer/chat_template.jinja"),
]
READ_IN_A_FOLDER = [
    *("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"),
    *("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *(
        "special_tokens_map.json",
        "chat_template.jinja",
        "tokenizer.json",
        "merges.txt",
        "vocab.txt",
    ),
    *("modeling_own.py", "tf_model.h5", "flax_model.msgpack", "model.gguf", "MODEL.SAFETENSORS"),
    *("latest", "original/params.json", "tokenizer.model", "consolidated.00.pth"),
]
BOOKKEEPING = [".DS_Store", "._config.json", "Thumbs.db", "__pycache__/x.pyc"]
NOT_READ = ["notes.txt", "photos/cat.json", ".git/config", "figure.png", "docs/"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("added")
    make_hf(folder / "source")
    convert(folder / "source", folder / "neox", tp=1)
    convert(folder / "neox", folder / "hf")
    return folder


@pytest.fixture
def copies(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "neox", tmp_path / "neox")
    shutil.copytree(made / "hf", tmp_path / "hf")
    return tmp_path


def verify(path: object) -> tuple[int, str, list[dict[str, str]]]:
    runner = CliRunner()
    plain = runner.invoke(app, ["verify", str(path)])
    as_json = runner.invoke(app, ["verify", str(path), "--json"])
    assert plain.exit_code == as_json.exit_code
    return plain.exit_code, plain.stdout, json.loads(as_json.stdout)["changes"]


def add(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if path.name == "docs" else path.write_text("{}")


@pytest.mark.parametrize(
    ("folder", "name"),
    [("neox", n) for n in READ_IN_A_STEP] + [("hf", n) for n in READ_IN_A_FOLDER],
)
def test_an_added_file_that_a_reader_takes_is_named(folder: str, name: str, copies: Path) -> None:
    place = copies / folder / "global_step0" if folder == "neox" else copies / folder
    add(place / name)
    code, text, changes = verify(copies / folder)
    assert code == 3
    assert changes == [{"path": name, "kind": "added"}]
    assert f"added: {name} (not in the record; frameworks that load the folder may read it)" in text
    assert "CHANGED since it was written" in text


@pytest.mark.parametrize("folder", ["neox/global_step0", "hf"])
def test_other_files_change_no_verdict(folder: str, copies: Path) -> None:
    for name in BOOKKEEPING + NOT_READ:
        add(copies / folder / name)
    (copies / folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    code, text, changes = verify(copies / folder)
    assert code == 0
    assert "unchanged since it was written" in text
    names = {change["path"] for change in changes}
    assert names == {"notes.txt", "photos/", ".git/", "figure.png", "docs/"}
    assert {change["kind"] for change in changes} == {"extra"}


def test_a_linked_folder_of_configs_is_looked_into(copies: Path) -> None:
    configs = copies / "neox" / "global_step0" / "configs"
    configs.rename(copies / "elsewhere")
    configs.symlink_to(copies / "elsewhere")
    assert verify(copies / "neox")[0] == 0
    add(copies / "elsewhere" / "zz.yml")
    assert verify(copies / "neox")[2] == [{"path": "configs/zz.yml", "kind": "added"}]


def test_what_another_step_brought_into_the_run_is_not_added(copies: Path) -> None:
    """Only steps that this tool wrote answer for what stands beside them."""
    convert(copies / "hf", copies / "neox", iteration=7)
    step = copies / "neox" / "global_step7"
    record = json.loads((step / "neox_bridge.json").read_text())
    (copies / "neox" / "latest_universal").write_text("global_step7_universal")
    assert verify(step)[0] == 3
    record["written"]["files"]["../latest_universal"] = [22, None]
    (copies / "neox" / "global_step9").mkdir()
    (copies / "neox" / "global_step9" / "neox_bridge.json").write_text(json.dumps(record))
    assert verify(step)[0] == 0


def test_in_a_store(made: Path) -> None:
    fs = fsspec.filesystem("memory")
    for folder in ("neox", "hf"):
        for path in (made / folder).rglob("*"):
            if path.is_file():
                fs.pipe_file(f"/added/{path.relative_to(made)}", path.read_bytes())
    assert verify("memory://added/neox")[0] == 0
    fs.pipe_file("/added/neox/global_step0/configs/zz.yml", b"rotary_emb_base: 77")
    fs.pipe_file("/added/neox/global_step0/notes.txt", b"")
    fs.pipe_file("/added/hf/adapter_config.json", b"{}")
    assert verify("memory://added/neox")[0] == 3
    assert verify("memory://added/neox")[2] == [
        {"path": "configs/zz.yml", "kind": "added"},
        {"path": "notes.txt", "kind": "extra"},
    ]
    assert verify("memory://added/hf")[2] == [{"path": "adapter_config.json", "kind": "added"}]
