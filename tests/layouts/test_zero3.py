"""Weights of ZeRO stage 3, which lie in parts in the optimizer states of all ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zero_writer
from click.testing import CliRunner
from common import assert_same, convert, hf_tensors
from zero3_writer import Zero3, edit, write
from zero_writer import Model, made_up

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError

SAVES = {
    "one rank": Zero3(dp=1),
    "three ranks": Zero3(dp=3),
    "more ranks than rows": Zero3(dp=7),
    "sub-groups": Zero3(dp=3, sub_group=500),
}


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, done.output
    return done.output


def as_stage_1(model: Model, folder: Path) -> Path:
    """The same model, whole in the files of another stage."""
    return zero_writer.write(model, zero_writer.Save(stages=[]), folder)


@pytest.mark.parametrize("name", SAVES)
def test_its_weights_are_those_of_any_other_stage(name: str, tmp_path: Path) -> None:
    model = made_up()
    root, other = write(model, SAVES[name], tmp_path / "run"), as_stage_1(model, tmp_path / "one")
    convert(root, tmp_path / "hf")
    convert(other, tmp_path / "want")
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "want"))


@pytest.mark.parametrize("name", SAVES)
def test_its_masters(name: str, tmp_path: Path) -> None:
    model = made_up()
    root = write(model, SAVES[name], tmp_path / "run")
    run("convert", root, tmp_path / "hf", "--weights", "masters")
    tensors = hf_tensors(tmp_path / "hf")
    for hf, place in {
        "gpt_neox.embed_in.weight": (0, "word_embeddings.weight"),
        "gpt_neox.layers.1.attention.query_key_value.bias": (3, "attention.query_key_value.bias"),
        "gpt_neox.layers.1.mlp.dense_4h_to_h.weight": (3, "mlp.dense_4h_to_h.weight"),
        "gpt_neox.final_layer_norm.bias": (7, "norm.bias"),
    }.items():
        assert tensors[hf].numpy().tobytes() == model.ranks[0][place]["fp32"].tobytes()


def test_with_tensor_parallel_ranks(tmp_path: Path) -> None:
    """GPT-NeoX of 2024-03 trains so; later ones refuse to."""
    model = made_up(tp=2)
    first, second = model.ranks
    for place in first:
        if place[1] in ("attention.dense.bias", "mlp.dense_4h_to_h.bias"):
            second[place] = first[place]
    root, other = write(model, Zero3(dp=3), tmp_path / "run"), as_stage_1(model, tmp_path / "one")
    for target in ("hf", "neox"):
        convert(root, tmp_path / target, to=target)
        convert(other, tmp_path / f"want {target}", to=target)
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "want hf"))
    names = sorted(p.name for p in (tmp_path / "neox").rglob("mp_rank_*"))
    assert names == ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]
    for name in names:
        mine, wanted = (
            torch.load(next((tmp_path / folder).rglob(name)), weights_only=False)["module"]
            for folder in ("neox", "want neox")
        )
        assert_same(mine, wanted)


def test_drifted_biases_are_reported(tmp_path: Path) -> None:
    """The ranks' biases of made_up are random, so they differ, and no single model equals them."""
    root = write(made_up(tp=2), Zero3(dp=2), tmp_path / "run")
    out = run("convert", root, tmp_path / "hf")
    assert "the tensor-parallel ranks differ in 8 biases" in out


def test_frozen_parameters_are_in_the_model_files(tmp_path: Path) -> None:
    model = made_up()
    frozen = [
        (2, "attention.dense.weight"),
        (2, "attention.dense.bias"),
        (3, "mlp.dense_h_to_4h.weight"),
    ]
    root = write(model, Zero3(dp=3, frozen=frozen), tmp_path / "run")
    convert(root, tmp_path / "hf")
    convert(as_stage_1(model, tmp_path / "one"), tmp_path / "want")
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "want"))
    words = ("convert", root, tmp_path / "masters", "--weights", "masters")
    assert "may have been frozen" in run(*words, code=1)


def test_inspect_says_what_it_is(tmp_path: Path) -> None:
    root = write(made_up(), Zero3(dp=3), tmp_path / "run")
    out = run("inspect", root)
    assert "ZeRO stage 3, ranks, TP 1" in out
    assert "rigid ZeRO 3 states of 3 data-parallel ranks" in out
    facts = json.loads(run("inspect", root, "--json"))
    assert facts["neox"]["zero_stage"] == 3
    assert facts["dtype"] == "float16"
    assert facts["parameters"] == sum(states["fp32"].size for states in made_up().ranks[0].values())


def test_a_conversion_does_not_ask_for_stage_3(tmp_path: Path) -> None:
    """GPT-NeoX would look for files of stage 3."""
    root = write(made_up(), Zero3(dp=3), tmp_path / "run")
    out = run("convert", root, tmp_path / "neox", "--to", "neox")
    assert "zero_optimization.stage is 1 in the yml, and was 3" in out
    for path in (tmp_path / "neox").rglob("*.yml"):
        assert yaml.safe_load(path.read_text())["zero_optimization"]["stage"] == 1, path
    assert "loads" in run("doctor", tmp_path / "neox", "--for", "neox@2024-03")


@pytest.mark.parametrize("is_stage_3", [True, False])
def test_doctor_finds_a_yml_of_another_stage(is_stage_3: bool, tmp_path: Path) -> None:
    root = write(made_up(), Zero3(dp=3), tmp_path / "run")
    if not is_stage_3:
        run("convert", root, tmp_path / "neox", "--to", "neox")
        root = tmp_path / "neox"
    command = ("doctor", root, "--for", "neox@2024-03")
    assert "check_ckpt_list" not in run(*command)
    stage, wanted = (1, 3) if is_stage_3 else (3, 1)
    for path in (root / "global_step8").rglob("*.yml"):
        settings = yaml.safe_load(path.read_text())
        settings["zero_optimization"]["stage"] = stage
        path.write_text(yaml.safe_dump(settings))
    out = run(*command, code=4)
    assert f"set stage: {wanted} in zero_optimization" in out
    assert "check_ckpt_list" in out


STATES_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL_0 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
MODEL_1 = "zero_pp_rank_1_mp_rank_00_model_states.pt"
QKV = "sequential.2.attention.query_key_value"


def without(*names: str) -> Callable[[Path], object]:
    return lambda step: [path.unlink() for name in names for path in step.glob(name)]


def edited(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda step: edit(step / name, change)


def inner(value: Any) -> Any:
    return value["optimizer_state_dict"]


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "states of a rank": (without(STATES_1), (STATES_1, "missing, of 3 data-parallel ranks")),
    "all states": (without("*optim*"), ("no *zero_pp_rank_*_optim_states.pt", "of 3 ranks")),
    "a model file": (without(MODEL_1), (MODEL_1, "missing, of 3 ranks")),
    "the first model file": (without(MODEL_0), (MODEL_0, "missing, of 3 ranks")),
    "a rank more": (
        lambda step: shutil.copy(step / MODEL_0, step / MODEL_0.replace("rank_0", "rank_3", 1)),
        ("more ranks than the 3", "rank_3"),
    ),
    "another stage": (
        lambda step: shutil.copy(step / MODEL_0, step / "mp_rank_00_model_states.pt"),
        ("of another stage", "mp_rank_00_model_states.pt"),
    ),
    "no shapes": (edited(MODEL_0, lambda v: v.pop("param_shapes")), (MODEL_0, "param_shapes")),
    "a shape more": (
        edited(MODEL_0, lambda v: v["module"].pop(f"{QKV}.bias")),
        ("does not list", f"{QKV}.bias"),
    ),
    "a shape less": (
        edited(MODEL_0, lambda v: v["param_shapes"][1].pop(f"{QKV}.bias")),
        (STATES_1.replace("rank_1", "rank_0", 1), "fp32_flat_groups[1] has", "should have"),
    ),
    "an unlisted parameter": (
        edited(MODEL_0, lambda v: v["module"].update({f"{QKV}.other": torch.empty(0)})),
        (f"{QKV}.other is empty", "param_shapes"),
    ),
    "not a tensor": (
        edited(MODEL_0, lambda v: v["module"].update({f"{QKV}.other": 3})),
        (f"module: {QKV}.other is 3, not a tensor",),
    ),
    "other states": (
        edited(STATES_1, lambda v: inner(v).pop("fp32_flat_groups")),
        (STATES_1, "no fp32_flat_groups"),
    ),
    "fewer flat tensors": (
        edited(STATES_1, lambda v: inner(v)["fp32_flat_groups"].pop()),
        (STATES_1, "fp32_flat_groups is a list, not a list of 2 tensors"),
    ),
    "two dimensions": (
        edited(STATES_1, lambda v: inner(v).update(fp32_flat_groups=[torch.ones(2, 2)] * 2)),
        ("fp32_flat_groups[0] is a tensor, not a tensor of one dimension",),
    ),
    "optimizer on NVMe": (
        edited(STATES_1, lambda v: inner(v).update(fp32_flat_groups=[torch.empty(0)] * 2)),
        ("NVMe", "offload_optimizer"),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_incomplete_or_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    root = write(made_up(), Zero3(dp=3), tmp_path / "run")
    damage, parts = DAMAGE[name]
    damage(root / "global_step8")
    with pytest.raises(BridgeError) as caught:
        open_checkpoint(str(root))
    for part in parts:
        assert part in str(caught.value)
