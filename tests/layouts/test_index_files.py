"""Index files of sharded Hugging Face models that contradict the folder, and files in its place."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, tensors, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.layouts import same_values
from neox_bridge.layouts.copies import copy_findings
from neox_bridge.layouts.folder_kinds import ForeignFolder
from neox_bridge.layouts.head import head_findings
from neox_bridge.layouts.stored_reader import open_stored

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD = "embed_out.weight"
EMBEDDINGS = "gpt_neox.embed_in.weight"


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


# --- findings, with a family and without one

INDEX = "model.safetensors.index.json"


def by_family(folder: Path) -> tuple[Finding, ...]:
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.index_findings) <= set(checkpoint.findings)
    return checkpoint.index_findings


def by_names(folder: Path) -> tuple[Finding, ...]:
    model = open_stored(str(folder), "")
    assert model is not None
    assert set(model.index_findings) <= set(model.findings)
    return model.index_findings


READERS = pytest.mark.parametrize("read", [by_family, by_names])
Read = Callable[[Path], tuple[Finding, ...]]


def size_of(folder: Path) -> int:
    files = (load_file(folder / name) for name in SHARDS)
    return sum(array.nbytes for tensors in files for array in tensors.values())


def put_head_in_the_first_shard(folder: Path) -> None:
    save_file(load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1]), folder / SHARDS[0])


@READERS
def test_an_index_that_is_right_has_no_findings(read: Read, tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "hf")
    for metadata in ({}, {"total_size": size_of(tmp_path / "hf")}):
        write_index(tmp_path / "hf", {"metadata": metadata, "weight_map": weight_map})
        assert read(tmp_path / "hf") == ()


@READERS
def test_a_total_size_that_the_tensors_do_not_have(read: Read, tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "hf")
    size = size_of(tmp_path / "hf")
    content = {"metadata": {"total_size": size + 2}, "weight_map": weight_map}
    write_index(tmp_path / "hf", content)
    (finding,) = read(tmp_path / "hf")
    assert (finding.code, finding.severity) == ("wrong-total-size", "warning")
    for word in (INDEX, f"{size + 2:,}", f"{size:,} bytes"):
        assert word in finding.message


@READERS
def test_a_tensor_that_the_index_does_not_name(read: Read, tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "hf")
    del weight_map[HEAD]
    put_head_in_the_first_shard(tmp_path / "hf")
    (tmp_path / "hf" / SHARDS[1]).unlink()
    write_index(tmp_path / "hf", {"weight_map": weight_map})
    (finding,) = read(tmp_path / "hf")
    assert finding.code == "not-in-index"
    assert f"{HEAD} ({SHARDS[0]})" in finding.message


@READERS
def test_a_shard_that_the_index_does_not_name(read: Read, tmp_path: Path) -> None:
    sharded(tmp_path / "hf")
    (tmp_path / "hf" / "model-00001-of-00003.safetensors").write_bytes(b"not read")
    (finding,) = read(tmp_path / "hf")
    assert (finding.code, finding.severity) == ("shard-not-in-index", "warning")
    assert f"{INDEX} does not name model-00001-of-00003.safetensors" in finding.message


@READERS
def test_a_second_copy_in_a_shard_that_the_index_does_not_name(read: Read, tmp_path: Path) -> None:
    sharded(tmp_path / "hf")
    put_head_in_the_first_shard(tmp_path / "hf")
    (finding,) = read(tmp_path / "hf")
    assert finding.code == "second-copy"
    assert f"{HEAD} ({SHARDS[0]})" in finding.message


def test_another_shard_than_the_index_names(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "hf")
    write_index(tmp_path / "hf", {"weight_map": {**weight_map, EMBEDDINGS: SHARDS[1]}})
    (finding,) = by_names(tmp_path / "hf")
    assert finding.code == "index-wrong-shard"
    assert f"{EMBEDDINGS} (in {SHARDS[0]})" in finding.message


def test_sizes_as_transformers_has_counted_them(tmp_path: Path) -> None:
    """Shared storage counts once, or as often as it has a name; a bool as a bit, or as a byte."""
    shared = torch.arange(12.0)
    tensors = {"a": shared, "b": shared, "mask": torch.ones(16, dtype=torch.bool)}
    name = "pytorch_model-00001-of-00001.bin"
    torch.save(tensors, tmp_path / name)
    verdicts = {}
    for size in (48 + 2, 48 + 16, 96 + 2, 96 + 16, 48, 96, 144):
        content = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, name)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        verdicts[size] = [finding.code for finding in by_names(tmp_path)]
    assert [size for size, codes in verdicts.items() if not codes] == [50, 64, 98, 112]
    assert verdicts[48] == ["wrong-total-size"]


@pytest.mark.parametrize("size", ["12", None, float("inf"), [1]])
def test_a_total_size_that_is_no_number_is_not_compared(size: object, tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, "float32")}, tmp_path / SHARDS[0])
    content = {"metadata": {"total_size": size}, "weight_map": {"a": SHARDS[0]}}
    write_index(tmp_path, content)
    assert by_names(tmp_path) == ()
