"""Optimizer states that are damaged, or of another model: the error names the file and the key."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resharding import DATA, inside, reshard, rewritten
from tiny import convert, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.execute import execute
from neox_bridge.optimizer.parameter_order import source_bounds
from neox_bridge.optimizer.read_export import read_export
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.write_export import plan_export

Edit = Callable[[Any], object]
RANK = "mp_rank_00_model_states.pt"
ZERO = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def read(root: Path) -> Any:
    return read_optimizer(open_checkpoint(str(root)))


def states_of(value: Any) -> Any:
    """The states by parameter of an optimizer of stage 0."""
    return value["optimizer"].get("state") or value["optimizer"]["optimizer_state_dict"]["state"]


def group_of(value: Any, index: int = 0) -> Any:
    return value["optimizer"]["param_groups"][index]


def short_state(value: Any) -> None:
    """A moment of 20 elements beside masters of thousands."""
    state = value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["exp_avg"] = replace(state["exp_avg"], shape=(20,))


def transposed(value: Any) -> None:
    state = states_of(value)[0]
    state["exp_avg"] = replace(state["exp_avg"], shape=state["exp_avg"].shape[::-1])


def shorter_masters(value: Any) -> None:
    masters = value["optimizer"]["fp32_groups_flat"]
    masters[0] = replace(masters[0], shape=(masters[0].shape[0] - 1,))


CASES: dict[str, tuple[str, str, Edit, type[BridgeError], str]] = {
    "no states": ("fp32", ZERO, lambda v: v.pop("optimizer_state_dict"), BridgeError, "no optimi"),
    "a small tensor": ("fp32", ZERO, short_state, Refused, r"a tensor with the shape \[20\]"),
    "settings that are a number": (
        *("fp32", ZERO, lambda v: v.update(ds_config=7), BridgeError),
        "ds_config is 7, not a mapping of names to values",
    ),
    "mappings that are a number": (
        *("fp32", ZERO),
        lambda v: v["optimizer_state_dict"].update(param_slice_mappings=[7, 7]),
        BridgeError,
        r"param_slice_mappings\[0\] is 7, not a mapping",
    ),
    "stage 0: fewer parameters": (
        *("fp32_stage0", RANK, lambda v: group_of(v)["params"].pop(), BridgeError),
        "group 0 of its optimizer has .* Part of the model may have been frozen",
    ),
    "stage 0: a parameter without states": (
        *("fp32_stage0", RANK, lambda v: states_of(v).pop(0), BridgeError),
        r"the optimizer has no exp_avg for layer 0: word_embeddings\.weight",
    ),
    "stage 0: another shape": (
        *("fp32_stage0", RANK, transposed, BridgeError),
        r"exp_avg of parameter 0 has the shape .*, and layer 0: word_embeddings\.weight has",
    ),
    "stage 0: no masters": (
        *("fp16_stage0", RANK),
        lambda v: v["optimizer"].update(fp32_groups_flat=[]),
        BridgeError,
        "fp32_groups_flat has no tensor for the parameter group 0",
    ),
    "stage 0: shorter masters": (
        *("fp16_stage0", RANK, shorter_masters, BridgeError),
        "master of group 0 has .* elements, but by the model it should have",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_states(name: str, tmp_path: Path) -> None:
    source, file, edit, error, message = CASES[name]
    root = Path(shutil.copytree(DATA / source, tmp_path / "run"))
    (path,) = root.glob(f"global_step*/{file}")
    rewritten(path, edit)
    with pytest.raises(error, match=message) as raised:
        read(root)
    assert type(raised.value) is error
    assert str(path.parent) in str(raised.value)


def test_more_stages_than_layers(tmp_path: Path) -> None:
    root = convert(write_hf(tmp_path / "hf"), tmp_path / "run")
    (path,) = root.glob(f"global_step*/{RANK}")
    for number in range(1, 7):
        shutil.copy(path, path.with_name(f"mp_rank_{number:02d}_model_states.pt"))
    message = f"{path.parent} has the mp_rank files of 7 pipeline stages, but .* into 6 layers"
    with pytest.raises(BridgeError, match=message):
        source_bounds(open_checkpoint(str(root)))


def test_groups_of_a_universal_checkpoint_of_another_save(tmp_path: Path) -> None:
    run = convert(write_hf(tmp_path / "hf"), tmp_path / "run", optimizer="fresh")
    reshard(run, tmp_path / "universal", universal=True)
    step = inside(tmp_path / "universal")
    rewritten(step / RANK, lambda value: value["param_shapes"].append({}))
    with pytest.raises(BridgeError, match=f"{RANK} has 3 parameter groups and .* 2") as raised:
        read(tmp_path / "universal")
    assert str(step / "zero" / "optimizer_state.pt") in str(raised.value)


def test_a_hugging_face_model_has_none(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="is a Hugging Face model, so it has no optimizer states"):
        read(write_hf(tmp_path / "hf"))


def test_an_export_of_a_model_with_fewer_layers(tmp_path: Path) -> None:
    source = open_checkpoint(str(DATA / "fp32"))
    execute(plan_export(source, read_optimizer(source)), str(tmp_path / "export"))
    other = open_checkpoint(str(write_hf(tmp_path / "hf")))
    with pytest.raises(BridgeError, match=r"does not have the same tensors .* Only one of them"):
        read_export(str(tmp_path / "export"), other)
