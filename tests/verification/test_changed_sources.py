"""A conversion warns if its source changed after neox-bridge wrote it."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run
from resharding import DATA
from tiny import convert, plan_of, write_hf

from neox_bridge.execution.digests import hash_file
from neox_bridge.findings import Command, Finding
from neox_bridge.verification import sealed

LAYER = "layer_02-model_00-model_states.pt"


def flip(path: Path) -> None:
    """Change one byte in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def renamed_shard(folder: Path) -> None:
    """Store the weights in a shard with an index, as transformers writes them."""
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    names = [
        tensor.name
        for file in plan_of(folder, folder / "x", to="hf").files[:1]
        for tensor in file.tensors
    ]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def findings(source: Path, **options: Any) -> list[Finding]:
    codes = ("source-changed", "source-newer")
    plan = plan_of(source, source.parent / "again", **options)
    return [finding for finding in plan.findings if finding.code in codes]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return convert(write_hf(tmp_path / "source"), tmp_path / "hf", to="hf")


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return convert(write_hf(tmp_path / "model"), tmp_path / "run", tp=2) / "global_step0"


HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors has another hash"),
    "size": (lambda f: edited(f / "config.json", "}", " }"), "config.json has "),
    "config": (
        lambda f: edited(f / "config.json", "10000", "10001"),
        "config.json has another hash",
    ),
    "record": (
        lambda f: edited(f / "neox_bridge.json", "float32", "float64"),
        "neox_bridge.json was edited",
    ),
    "shards": (
        renamed_shard,
        "model-00001-of-00001.safetensors is not in neox_bridge.json",
    ),
}


@pytest.mark.parametrize("name", HF)
def test_a_changed_hugging_face_source_is_named(name: str, hf: Path) -> None:
    assert findings(hf) == []
    change, words = HF[name]
    change(hf)
    (finding,) = findings(hf)
    assert finding.severity == "warning"
    assert f"{hf} was changed after neox-bridge wrote it: {words}" in finding.message
    assert isinstance(finding.remedy, Command)
    checked = run(*shlex.split(finding.remedy, comments=True)[1:])
    assert checked.exit_code == 3


def test_a_changed_gpt_neox_source_is_named(step: Path) -> None:
    assert findings(step.parent) == []
    flip(step / LAYER)
    (yml,) = (step / "configs").iterdir()
    yml.unlink()
    (finding,) = findings(step.parent)
    assert finding.severity == "warning"
    assert f"{LAYER} has another hash" in finding.message
    assert f"configs/{yml.name} is missing" in finding.message


def test_what_a_user_may_change_is_no_warning(hf: Path, step: Path) -> None:
    (hf / "README.md").write_text("My card.\n")
    (step.parent / "finetune.yml").write_text(
        "# mine\n" + (step.parent / "finetune.yml").read_text()
    )
    assert findings(hf) == findings(step) == []


def test_a_large_file_is_not_read_again(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(path: str, *more: Any) -> str:
        hashed.append(Path(path).name)
        return hash_file(path, *more)

    monkeypatch.setattr(sealed, "_SMALL_BYTES", 4000)
    monkeypatch.setattr(sealed, "_HASHED_BYTES", 4000)
    monkeypatch.setattr(sealed, "hash_file", counted)
    assert findings(hf) == []
    flip(hf / "model.safetensors")
    (finding,) = findings(hf)
    assert finding.severity == "info"
    assert "model.safetensors was modified or copied after neox_bridge.json" in finding.message
    assert "config.json" in hashed
    assert "model.safetensors" not in hashed
    assert run(*shlex.split(finding.remedy, comments=True)[1:]).exit_code == 3


@pytest.mark.parametrize("command", ["convert", "reshard", "export-optimizer"])
def test_every_command_that_reads_a_run_warns(command: str, tmp_path: Path) -> None:
    source = tmp_path / "run"
    assert run("reshard", DATA / "bf16_tp2_dp2", source, "--dp", 1, "-q").exit_code == 0
    more = ["--to", "hf"] if command == "convert" else []
    quiet = run(command, source, tmp_path / "first", *more)
    assert quiet.exit_code == 0, quiet.output
    assert "was changed after" not in quiet.stderr
    name = "*optim_states.pt" if command == "export-optimizer" else LAYER
    changed = next(source.glob(f"global_step*/{name}"))
    flip(changed)
    result = run(command, source, tmp_path / "second", *more)
    assert result.exit_code == 0, result.output
    assert f"{changed.name} has another hash" in result.stderr
    shutil.rmtree(tmp_path / "second")
    planned = run(command, source, tmp_path / "second", "--dry-run", "--json", *more)
    codes = [finding["code"] for finding in json.loads(planned.stdout)["findings"]]
    assert codes[0] == "source-changed"
