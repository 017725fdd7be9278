"""Optimizer states of ZeRO stage 3: read, exported, and written for other stages and ranks."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from published import differing
from resharding import logical, reshard
from safetensors.numpy import load_file
from zero3_writer import Zero3, deepspeed_names, edit, write
from zero_writer import Model, made_up

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.frameworks.eras import era_named
from neox_bridge.layouts.transformer_engine import te_name
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.states import Optimizer

SAVES = {"three ranks": Zero3(dp=3), "sub-groups": Zero3(dp=6, sub_group=200)}


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, done.output
    return done.output


def read(root: Path) -> Optimizer:
    return read_optimizer(open_checkpoint(str(root)))


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("tp", [1, 2])
def test_states_are_those_that_were_saved(name: str, tp: int, tmp_path: Path) -> None:
    model = made_up(tp=tp)
    optimizer = read(write(model, SAVES[name], tmp_path / "run"))
    for rank, want in enumerate(model.ranks):
        assert differing(optimizer, want, rank) == []
    assert (optimizer.stage, optimizer.dp) == (3, SAVES[name].dp)
    assert [group.settings["name"] for group in optimizer.groups] == [
        "weight_decay_params",
        "no_weight_decay_params",
    ]


TARGETS: dict[str, dict[str, Any]] = {
    "other ranks": {"dp": 2},
    "one rank": {"dp": 1},
    "stage 2": {"zero": 2},
    "stage 1": {"zero": 1, "dp": 2},
    "stage 1 in layers": {"zero": 1, "tp": 2, "pp": 2},
    "stage 0": {"zero": 0},
    "universal": {"zero": 1, "universal": True},
}


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("target", TARGETS)
def test_there_and_back(name: str, target: str, tmp_path: Path) -> None:
    """Every state stays the same, bit for bit, in every form."""
    model = made_up()
    root = write(model, SAVES[name], tmp_path / "run")
    want = logical(root)
    reshard(root, tmp_path / "there", **TARGETS[target])
    have = logical(tmp_path / "there")
    assert sorted(have) == sorted(want)
    for key, tensors in want.items():
        assert all(torch.equal(tensors[n], have[key][n]) for n in tensors), key
    back = {"zero": 3, "dp": SAVES[name].dp, "tp": 1, "pp": 0}
    reshard(tmp_path / "there", tmp_path / "back", **back)
    assert differing(read(tmp_path / "back"), model.ranks[0], 0) == []


def saved(root: Path, pattern: str) -> dict[str, Any]:
    (step,) = root.glob("global_step*")
    with deepspeed_names():
        return {
            path.name: torch.load(path, weights_only=False) for path in sorted(step.glob(pattern))
        }


@pytest.mark.parametrize("name", SAVES)
def test_what_is_written_is_what_deepspeed_writes(name: str, tmp_path: Path) -> None:
    """On the ranks of the source, the files have the same values, except for the padding."""
    root = write(made_up(), SAVES[name], tmp_path / "run")
    reshard(root, tmp_path / "new")
    states, written = (saved(folder, "*optim*") for folder in (root, tmp_path / "new"))
    assert list(states) == list(written)
    for path, value in states.items():
        have, want = written[path]["optimizer_state_dict"], value["optimizer_state_dict"]
        assert list(have) == list(want)
        assert int(have["zero_stage"]) == 3
        assert have["partition_count"] == SAVES[name].dp
        assert vars(have["loss_scaler"]) == vars(want["loss_scaler"])
        base, wanted = have["optimizer_state_dict"], want["optimizer_state_dict"]
        assert base["param_groups"] == wanted["param_groups"]
        assert list(base["state"]) == list(wanted["state"])
        pairs = list(zip(have["fp32_flat_groups"], want["fp32_flat_groups"], strict=True))
        for number, entry in wanted["state"].items():
            assert set(base["state"][number]) == set(entry)
            pairs += [(base["state"][number][key], entry[key]) for key in entry]
        for mine, theirs in pairs:
            assert mine.shape == theirs.shape
            padding = theirs == 7.0
            assert torch.equal(mine[~padding], theirs[~padding])
            assert not mine[padding].any()
    models, others = (saved(folder, "*model_states*") for folder in (root, tmp_path / "new"))
    assert list(models) == list(others)
    for path, value in models.items():
        have = others[path]
        assert list(have["module"]) == list(value["module"])
        for key, tensor in value["module"].items():
            assert torch.equal(have["module"][key], tensor), key
            assert have["module"][key].dtype == tensor.dtype
        for key in ("param_shapes", "buffer_names", "dp_world_size", "frozen_param_shapes"):
            assert have[key] == value[key]


def test_keys_that_deepspeed_gathers_with(tmp_path: Path) -> None:
    """zero_to_fp32.py fails without them, and runs of other stages may not have them."""
    keys = ("shared_params", "frozen_param_shapes", "frozen_param_fragments")
    root = write(made_up(), Zero3(dp=2), tmp_path / "run")
    reshard(root, tmp_path / "one", zero=1)
    rank_0 = tmp_path / "one" / "global_step8" / "mp_rank_00_model_states.pt"
    edit(rank_0, lambda value: [value.pop(key) for key in keys])
    reshard(tmp_path / "one", tmp_path / "three", zero=3)
    for value in saved(tmp_path / "three", "*model_states*").values():
        assert [value[key] for key in keys] == [{}, {}, {}]


def test_export(tmp_path: Path) -> None:
    model = made_up()
    root = write(model, Zero3(dp=3), tmp_path / "run")
    run("export-optimizer", root, tmp_path / "out")
    for key, kind in {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}.items():
        values = load_file(tmp_path / "out" / f"{key}.safetensors")
        want = model.ranks[0][3, "mlp.dense_4h_to_h.weight"][kind]
        assert values["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"].tobytes() == want.tobytes()


def test_commands_that_read_states(tmp_path: Path) -> None:
    root = write(made_up(), Zero3(dp=3), tmp_path / "run")
    assert "ZeRO 3, 3 data-parallel ranks: master, exp_avg, exp_avg_sq" in run(
        "inspect", root, "--optimizer"
    )
    assert "0 errors" in run("audit", root, "--optimizer", "--cache", "none")
    reshard(root, tmp_path / "new", dp=2)
    assert "equal" in run("verify", root, tmp_path / "new")


@pytest.mark.parametrize(
    ("tp", "options", "part"),
    [
        (1, {"pp": 1}, "ZeRO stage 3 with pipe_parallel_size 1 or more"),
        (1, {"universal": True}, "only at ZeRO stages 1 and 2"),
        (1, {"tp": 2, "era": era_named("today")}, "more than one tensor-parallel rank"),
        (2, {"era": era_named("2024-09")}, "more than one tensor-parallel rank"),
        (1, {"era": era_named("v1.0")}, "does not support ZeRO stage 3"),
    ],
)
def test_what_no_gpt_neox_runs(tp: int, options: dict[str, Any], part: str, tmp_path: Path) -> None:
    root = write(made_up(tp=tp), Zero3(dp=2), tmp_path / "run")
    with pytest.raises(Refused, match=part):
        reshard(root, tmp_path / "new", **options)


STATES_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
BASE = "optimizer_state_dict"
DAMAGE: dict[str, tuple[Callable[[Any], object], str]] = {
    "ranks": (lambda v: v[BASE].update(partition_count=5), "partition_count is 5"),
    "numbers": (
        lambda v: v[BASE][BASE]["param_groups"][1].update(params=[]),
        "refer to 1 sub-group, but the model file lists 2",
    ),
    "a state": (lambda v: v[BASE][BASE]["state"][0].pop("exp_avg"), "states of 2 of 3 data-parall"),
    "a size": (
        lambda v: v[BASE][BASE]["state"][0].update(exp_avg=torch.ones(5)),
        r"exp_avg\[0\] has 5 elements",
    ),
    "a setting": (lambda v: v[BASE][BASE]["param_groups"][0].update(lr=1.0), "lr differs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_states_are_refused(name: str, tmp_path: Path) -> None:
    root = write(made_up(), Zero3(dp=3), tmp_path / "run")
    damage, message = DAMAGE[name]
    edit(root / "global_step8" / STATES_1, damage)
    with pytest.raises(BridgeError, match=message):
        read(root)


def te_of(name: str) -> str:
    """Transformer Engine's name. name: before 2024-09, with or without the layer."""
    today = name.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2")
    layer, short = re.fullmatch(r"(sequential\.\d+\.)?(.+)", today).groups(default="")
    return layer + te_name(short)


def with_te(model: Model) -> Model:
    """The model under the names of Transformer Engine's modules, whose norm is in the MLP."""
    ranks = [{(layer, te_of(n)): held for (layer, n), held in r.items()} for r in model.ranks]
    return replace(model, ranks=ranks)


def te_run(folder: Path) -> Path:
    """A run with ``te_mha`` and ``te_layernorm_mlp``."""
    root = write(with_te(made_up()), Zero3(dp=2), folder)
    (yml,) = root.glob("global_step8/configs/*.yml")
    settings = {"te_mha": True, "te_layernorm_mlp": True}
    yml.write_text(yml.read_text() + yaml.safe_dump(settings))
    for path in root.glob("global_step8/*model_states.pt"):
        edit(path, lambda value: value["module"].update({"sequential.2.mlp._extra_state": None}))
    return root


@pytest.mark.parametrize("asked", [{}, {"zero": 0, "dp": 1}, {"zero": 1, "tp": 2, "pp": 2}])
def test_modules_of_transformer_engine(asked: dict[str, Any], tmp_path: Path) -> None:
    """Their states are read under GPT-NeoX's own names, and their groups stay as they were."""
    root, plain = te_run(tmp_path / "te"), write(made_up(), Zero3(dp=2), tmp_path / "plain")
    reshard(root, tmp_path / "new", **asked)
    reshard(tmp_path / "new", tmp_path / "back", zero=3, pp=0, tp=1, dp=2)
    want = logical(plain)
    for folder in (root, tmp_path / "new", tmp_path / "back"):
        states = logical(folder)
        for key, tensors in states.items():
            assert tensors.keys() == want[key].keys()
            assert all(torch.equal(tensor, want[key][name]) for name, tensor in tensors.items())
    before, after = read(root), read(tmp_path / "back")
    assert list(after.members.items()) == list(before.members.items())
    decayed = [name for (layer, name), group in after.members.items() if layer == 2 and not group]
    assert "post_attention_layernorm.weight" in decayed
    assert "input_layernorm.weight" not in decayed


def test_states_of_transformer_engine_stay_with_its_modules(tmp_path: Path) -> None:
    root = te_run(tmp_path / "te")
    for options, reason in (
        ({"era": era_named("2024-10")}, "weight decay to other parameters"),
        ({"zero": 1, "universal": True}, "not supported for modules of Transformer Engine"),
    ):
        with pytest.raises(Refused, match=reason):
            reshard(root, tmp_path / "new", **options)
    run("export-optimizer", root, tmp_path / "exported")
    run("inspect", root)


def test_parameters_that_the_model_does_not_contain_are_refused(tmp_path: Path) -> None:
    """Biases of zeros that the yml turns off are left out of the model."""
    model = with_te(made_up())
    for place, states in model.ranks[0].items():
        if place[1] in ("mlp.fc1_bias", "mlp.fc2_bias"):
            states["fp32"][:] = 0
    root = te_run(tmp_path / "te")
    write(model, Zero3(dp=2), tmp_path / "zeros")
    (yml,) = root.glob("global_step8/configs/*.yml")
    (other,) = (tmp_path / "zeros").glob("global_step8/configs/*.yml")
    other.write_text(yml.read_text() + "use_bias_in_mlp: false\n")
    with pytest.raises(Refused, match=r"trains layer 2: mlp\.linear1\.bias.*does not contain"):
        read(tmp_path / "zeros")


def test_universal_states_of_transformer_engine_are_refused(tmp_path: Path) -> None:
    run_folder = write(made_up(), Zero3(dp=2), tmp_path / "run")
    reshard(run_folder, tmp_path / "universal", zero=1, universal=True)
    step = tmp_path / "universal" / "global_step8_universal"
    for folder in step.glob("zero/sequential.*"):
        folder.rename(folder.with_name(te_of(folder.name)))

    def renamed(value: dict[str, Any]) -> None:
        value["param_shapes"] = [
            {te_of(name): shape for name, shape in group.items()} for group in value["param_shapes"]
        ]

    edit(step / "mp_rank_00_model_states.pt", renamed)
    with pytest.raises(Refused, match="Transformer Engine, and the states of such a universal"):
        read(step)
