"""``neox-bridge toy``: random checkpoints of a Pythia's exact shape."""

import json
from math import prod
from pathlib import Path

import pytest
from click.testing import CliRunner

from neox_bridge import BridgeError, open_checkpoint
from neox_bridge.architectures import shapes
from neox_bridge.cli.app import app
from neox_bridge.cli.toy import NAMES
from neox_bridge.toy import plan_toy, toy_checkpoint

TINY = shapes.ModelSize(2, 32, 4, 128)
# parameters as Pythia's paper has them (arXiv 2304.01373, table 1: all, and without embeddings)
PAPER = {
    "pythia-70m": (70_426_624, 18_915_328),
    "pythia-160m": (162_322_944, 85_056_000),
    "pythia-410m": (405_334_016, 302_311_424),
    "pythia-1b": (1_011_781_632, 805_736_448),
    "pythia-1.4b": (1_414_647_808, 1_208_602_624),
    "pythia-2.8b": (2_775_208_960, 2_517_652_480),
    "pythia-6.9b": (6_857_302_016, 6_444_163_072),
    "pythia-12b": (11_846_072_320, 11_327_027_200),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.PYTHIA, "pythia-70m", TINY)
    monkeypatch.setattr("neox_bridge.toy.TOKENIZER_SIZE", 120)


def write(folder: Path, kind: str, *more: object) -> None:
    args = ["toy", "pythia-70m", str(folder), "--as", kind, "-q", *map(str, more)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output


def test_the_names() -> None:
    assert tuple(shapes.PYTHIA) == NAMES
    with pytest.raises(BridgeError, match="pythia-70m"):
        toy_checkpoint("pythia-3b")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_paper(name: str) -> None:
    tensors = toy_checkpoint(name).tensors
    total = sum(prod(whole.shape) for whole in tensors.values())
    embeddings = sum(prod(w.shape) for key, w in tensors.items() if "embed" in key)
    assert (total, total - embeddings) == PAPER[name]


@pytest.mark.parametrize("name", NAMES)
def test_as_neox_keeps_the_rows(name: str) -> None:
    target = plan_toy(name, "out", "neox").target
    assert target["vocab_rows"] == shapes.PYTHIA[name].rows
    assert (target["tensor_parallel"], target["layout"]) == (1, "layers")
    assert target["vocab_multiple"] == {"pythia-6.9b": 256, "pythia-12b": 512}.get(name, 128)


@pytest.mark.usefixtures("tiny")
def test_as_hugging_face(tmp_path: Path) -> None:
    write(tmp_path / "toy", "hf")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "toy", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert str(model.dtype) == "torch.float16"
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert model.config.use_parallel_residual is True
    weights = [value for key, value in model.state_dict().items() if key.endswith("dense.weight")]
    assert not (weights[0] == weights[1]).any()
    card = (tmp_path / "toy" / "README.md").read_text()
    assert "random" in card


@pytest.mark.usefixtures("tiny")
def test_as_neox(tmp_path: Path) -> None:
    write(tmp_path / "toy", "neox", "--layers", 3)
    step = (tmp_path / "toy" / "latest").read_text()
    assert (tmp_path / "toy" / step / "configs").is_dir()
    checkpoint = open_checkpoint(str(tmp_path / "toy"))
    assert checkpoint.neox is not None
    assert (checkpoint.neox.tp, checkpoint.config.layers) == (1, 3)
    assert checkpoint.config.dims["vocab"] == 128


@pytest.mark.usefixtures("tiny")
def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write(tmp_path / name, "hf", "--seed", seed)
    contents = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in "abc"}
    assert contents["a"] == contents["b"]
    assert contents["a"] != contents["c"]


@pytest.mark.usefixtures("tiny")
def test_both_kinds_are_the_same_model(tmp_path: Path) -> None:
    write(tmp_path / "hf", "hf")
    write(tmp_path / "neox", "neox")
    args = ["convert", str(tmp_path / "neox"), str(tmp_path / "back"), "-q"]
    assert CliRunner().invoke(app, args).exit_code == 0
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.usefixtures("tiny")
def test_json(tmp_path: Path) -> None:
    args = ["toy", "pythia-70m", str(tmp_path / "toy"), "--as", "neox", "--json"]
    document = json.loads(CliRunner().invoke(app, args).stdout)
    assert document["target"]["parameters"] == document["summary"]["parameters"]
    assert document["result"]["files"] == document["summary"]["files"]
