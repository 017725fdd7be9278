"""One tensor in two files, or under two names: the same bits, or two models in one folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from common import convert, hf_tensors, make_hf, plan_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.verification.diff import diff
from neox_bridge.verification.verify import verify

RUNNER = CliRunner()
NAME = "gpt_neox.layers.0.attention.dense.weight"
Tensors = dict[str, torch.Tensor]


def run(*args: object) -> Any:
    return RUNNER.invoke(app, [str(arg) for arg in args])


def sharded(folder: Path, kind: str, **config: Any) -> Path:
    """A model in several shards, of safetensors or torch's own."""
    make_hf(folder, **config)
    tensors = hf_tensors(folder)
    (folder / "model.safetensors").unlink()
    stem, ending = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[kind]
    weight_map = {}
    order = sorted(tensors)
    for number in range(3):
        part = {name: tensors[name] for name in order[number::3]}
        shard = f"{stem}-{number + 1:05d}-of-00003.{ending}"
        save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def save(tensors: Tensors, path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})


def load(path: Path) -> Tensors:
    return torch.load(path) if path.suffix == ".bin" else load_file(path)


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if "-of-" in path.name)


def index_of(folder: Path) -> dict[str, str]:
    (path,) = folder.glob("*.index.json")
    weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
    return weight_map


def put_copy(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, str]:
    """A second copy of a tensor in another shard. Returns the index's file, and the other."""
    own = index_of(folder)[NAME]
    other = next(path for path in reversed(shards(folder)) if path.name != own)
    value = load(folder / own)[NAME]
    save({**load(other), NAME: change(value.clone())}, other)
    return own, other.name


def last_bit(value: torch.Tensor) -> torch.Tensor:
    value.view(torch.int32)[-1, -1] ^= 1
    return value


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_copies_that_differ_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", kind)
    convert(source, tmp_path / "sound")
    own, other = put_copy(source, last_bit)
    for to in ("neox", "hf"):
        refused = run("convert", source, tmp_path / "out", "--to", to)
        assert refused.exit_code == 4
        for word in (NAME, own, other, "transformers"):
            assert word in refused.stderr
        assert not (tmp_path / "out").exists()
    for command in ("verify", "diff"):
        refused = run(command, source, tmp_path / "sound")
        assert refused.exit_code == 4, refused.output
        assert NAME in refused.stderr
    assert run("verify", tmp_path / "sound", source, "--logits").exit_code == 4
    failed = run("batch", source, tmp_path / "many")
    assert failed.exit_code == 1
    assert NAME in failed.stderr


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_equal_copies_are_said_and_converted(kind: str, tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", kind)
    sound = open_checkpoint(str(convert_copy(source, tmp_path / "sound")))
    own, other = put_copy(source, lambda value: value)
    done = run("convert", source, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "with identical bytes" in done.stderr
    assert own in done.stderr
    assert other in done.stderr
    assert all(one.kind == "equal" for one in diff(sound, open_checkpoint(str(tmp_path / "out"))))
    assert run("verify", source, tmp_path / "out").exit_code == 0


def convert_copy(source: Path, target: Path) -> Path:
    convert(source, target)
    return target


def test_a_copy_in_another_dtype_differs(tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", "safetensors")
    put_copy(source, lambda value: value.bfloat16())
    with pytest.raises(Refused, match=NAME):
        plan_of(source, tmp_path / "out")


def test_copies_that_the_index_does_not_name_count_too(tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", "safetensors")
    put_copy(source, last_bit)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][NAME]
    path.write_text(json.dumps(index))
    with pytest.raises(Refused, match=NAME):
        plan_of(source, tmp_path / "out")


def test_a_buffer_that_goes_may_be_there_twice(tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", "safetensors")
    for number, path in enumerate(shards(source)[:2]):
        buffer = torch.full((3,), float(number))
        save({**load(path), "gpt_neox.layers.0.attention.rotary_emb.inv_freq": buffer}, path)
    plan_of(source, tmp_path / "out")


@pytest.mark.parametrize("names", [("embed_out.weight", "lm_head.weight"), (NAME, NAME[9:])])
def test_two_names_of_one_tensor(names: tuple[str, str], tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    tensors = hf_tensors(source)
    first, second = names
    save({**tensors, second: tensors[first].clone()}, source / "model.safetensors")
    done = run("convert", source, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert second in done.stderr
    assert verify(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "out"))).holds
    save({**tensors, second: last_bit(tensors[first].clone())}, source / "model.safetensors")
    refused = run("convert", source, tmp_path / "again")
    assert refused.exit_code == 4
    assert first in refused.stderr
    assert second in refused.stderr


def test_doctor_and_inspect_say_it(tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", "safetensors")
    own, other = put_copy(source, last_bit)
    told = run("doctor", source)
    assert told.exit_code == 4
    assert own in told.stdout
    assert other in told.stdout
    inspected = run("inspect", source)
    assert inspected.exit_code == 0
    assert "different values" in inspected.stdout
    shutil.rmtree(source)
    source = sharded(tmp_path / "hf", "safetensors")
    put_copy(source, lambda value: value)
    told = run("doctor", source, "--for", "transformers@5.24")
    assert told.exit_code == 0
    assert "with identical bytes" in told.stdout


def test_a_single_file_beside_an_index_is_what_transformers_reads(tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf", "safetensors")
    other = make_hf(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", source)
    done = run("convert", source, tmp_path / "out")
    assert done.exit_code == 0
    assert "model.safetensors.index.json" in done.stderr
    assert verify(open_checkpoint(str(other)), open_checkpoint(str(tmp_path / "out"))).holds
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(model.state_dict()[NAME], hf_tensors(other)[NAME])


def test_weights_in_both_layouts_of_gpt_neox(tmp_path: Path) -> None:
    """GPT-NeoX reads layer files or mp_rank files, as pipe_parallel_size says."""
    for seed, layout in ((0, "layers"), (1, "ranks")):
        convert(make_hf(tmp_path / f"hf{seed}", seed=seed), tmp_path / layout, layout=layout)
    rank = "global_step0/mp_rank_00_model_states.pt"
    shutil.copy(tmp_path / "ranks" / rank, tmp_path / "layers" / rank)
    refused = run("convert", tmp_path / "layers", tmp_path / "out")
    assert refused.exit_code == 4
    assert "both layouts" in refused.stderr
    assert "mp_rank_00_model_states.pt" in refused.stderr


@pytest.mark.parametrize(
    ("layout", "name", "other"),
    [
        ("layers", "layer_02-model_00-model_states.pt", "layer_2-model_00-model_states.pt"),
        ("ranks", "mp_rank_00_model_states.pt", "mp_rank_0_model_states.pt"),
    ],
)
def test_two_files_of_one_layer_and_rank(
    layout: str, name: str, other: str, tmp_path: Path
) -> None:
    convert(make_hf(tmp_path / "hf"), tmp_path / "neox", layout=layout)
    step = tmp_path / "neox" / "global_step0"
    shutil.copy(step / name, step / other)
    with pytest.raises(Refused, match="two files"):
        open_checkpoint(str(tmp_path / "neox"))
