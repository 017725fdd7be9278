"""Index files of sharded Hugging Face models that contradict the folder, and files in its place."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from tiny import CONFIG, tensors, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.layouts import same_values
from neox_bridge.layouts.copies import copy_findings
from neox_bridge.layouts.folder_kinds import ForeignFolder
from neox_bridge.layouts.head import head_findings

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD = "embed_out.weight"


def sharded(folder: Path) -> dict[str, str]:
    """Write a model as two shards, of which the second holds the head. Returns the weight map."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    parts: list[dict[str, Any]] = [tensors(), {}]
    parts[1][HEAD] = parts[0].pop(HEAD)
    for name, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(SHARDS, parts, strict=True) for key in part}
    write_index(folder, {"weight_map": weight_map})
    return weight_map


def write_index(folder: Path, value: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def refused(folder: Path) -> str:
    with pytest.raises(BridgeError) as caught:
        open_checkpoint(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "its weight_map from tensors to files is missing"),
        ({HEAD: 2}, "its weight_map from tensors to files is missing"),
        ({HEAD: "../other.safetensors"}, "names '../other.safetensors', which is not a file in"),
        ({HEAD: "."}, "names '.', which is not a file in"),
        ({"embed_in.weight": SHARDS[1]}, "its files do not contain: embed_in.weight. Download"),
        ({HEAD: "model-00003-of-00003.safetensors"}, "of-00003.safetensors is missing, although"),
    ],
)
def test_an_index_that_contradicts_its_folder(
    changes: dict[str, Any] | None, words: str, tmp_path: Path
) -> None:
    weight_map = sharded(tmp_path / "hf")
    open_checkpoint(str(tmp_path / "hf"))
    write_index(tmp_path / "hf", {"weight_map": {**weight_map, **changes}} if changes else {})
    assert words in refused(tmp_path / "hf")


def test_shards_of_two_models_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    (tmp_path / "hf" / SHARDS[0]).rename(tmp_path / "hf" / "model-00001-of-00003.safetensors")
    assert "contains shards of different sets (model-00001-of-00003" in refused(tmp_path / "hf")


def test_an_archive_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps(CONFIG))
    with pytest.raises(ForeignFolder) as caught:
        open_checkpoint(str(path))
    assert caught.value.kind == "archive"
    assert (
        str(caught.value) == f"{path} is an archive, not a folder. Unpack it and name the folder."
    )


def test_of_large_copies_only_the_first_bytes_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_values, "BLOCK_BYTES", 64)
    weights = tensors()
    folder = write_hf(tmp_path / "hf", changed={"lm_head.weight": weights[HEAD]})
    checkpoint = open_checkpoint(str(folder))
    for most_bytes, code in ((64, "copies-not-compared"), (None, "copies-equal")):
        (finding,) = copy_findings(checkpoint, most_bytes)
        assert (finding.code, finding.severity) == (code, "info")
        assert f"{HEAD} and lm_head.weight in model.safetensors" in finding.message


def test_of_a_large_head_only_the_first_bytes_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_values, "BLOCK_BYTES", 64)
    embeddings = tensors()["gpt_neox.embed_in.weight"]
    folder = write_hf(tmp_path / "hf", changed={HEAD: embeddings}, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(folder))
    (finding,) = head_findings(checkpoint, 64)
    assert (finding.code, finding.severity) == ("head-not-compared", "info")
    assert f"the files also contain {HEAD}. Its first rows equal the embeddings" in finding.message
    assert head_findings(checkpoint) == []
