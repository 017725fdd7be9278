"""Optimizer states of DeepSpeed before 0.6, elastic and rigid, against the live optimizer's."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zero_writer
from click.testing import CliRunner
from published import NAMES, PUBLISHED, differing, facts, run_folder, truth
from safetensors.numpy import load_file
from zero_writer import FORMS, LR_SCHEDULER, STAGES, Model, Save, made_up, write

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.optimizer.derived_settings import annealed
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.saved_states import saved_states
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.optimizer.v1_form import SubPartitions


def read(folder: Path) -> Optimizer:
    return read_optimizer(open_checkpoint(str(folder)))


def wrong(model: Model, folder: Path) -> list[str]:
    """The states of all tensor-parallel ranks that are not the model's."""
    optimizer = read(folder)
    return [w for rank, want in enumerate(model.ranks) for w in differing(optimizer, want, rank)]


def run(*command: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == code, done.output
    return done.output


def codes(optimizer: Optimizer) -> dict[str, str]:
    return {f.code: f.severity for f in (*optimizer.findings, *optimizer.derived_findings)}


# ---- what GPT-NeoX v1.0 wrote


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flat", [True, False])
def test_published_states_are_the_live_optimizers(name: str, flat: bool, tmp_path: Path) -> None:
    folder = PUBLISHED / name / "flat" if flat else run_folder(name, tmp_path)
    optimizer = read(folder)
    assert differing(optimizer, truth(name)) == []
    live = facts(name)
    assert [dict(group.settings) for group in optimizer.groups] == live["param_groups"]
    assert optimizer.form is not None
    assert optimizer.form.intervals == tuple(live["num_comm_intervals_per_group"])
    assert optimizer.form.kind == ("elastic" if live["elastic_checkpoint"] else "rigid")
    assert (optimizer.stage, optimizer.dp) == (1, live["partition_count"])
    assert optimizer.head["loss_scaler"].state == live["scaler"]
    for index, names in enumerate(live["group_names"]):
        places = [tuple(name.removeprefix("sequential.").split(".", 1)) for name in names]
        members = [p for p, group in optimizer.members.items() if group == index]
        assert members == [(int(layer), short) for layer, short in places]


def test_settings_that_elastic_files_lack_are_said_to_be_derived() -> None:
    elastic, rigid = (read(PUBLISHED / name / "flat") for name in ("v1_dp2", "v1_dp2_rigid"))
    assert [list(group.settings) for group in elastic.groups] == [
        list(group.settings) for group in rigid.groups
    ]
    assert {d.key: d.source for d in elastic.derived} == {
        "lr": "lr_scheduler",
        "betas": "optimizer.params.betas of the yml",
        "eps": "optimizer.params.eps of the yml",
        "weight_decay": "weight_decay of the yml",
        "step": "1 + iteration - skipped_steps",
    }
    assert codes(elastic) == {"optimizer-settings-derived": "info", "adam-step-derived": "info"}
    assert (rigid.derived, codes(rigid)) == ((), {})


@pytest.mark.parametrize("dp", [11, 12, 13])
def test_rank_10_comes_after_rank_9(dp: int, tmp_path: Path) -> None:
    """The fixture with parts of 0 elements, split over more ranks: as text rank_10 is before 2."""
    model = Model(48, 3, 3, 256, [truth("v1_dp4_intervals")])
    folder = write(model, Save(dp=dp, bucket=25_000), tmp_path / "x")
    assert wrong(model, folder) == []
    optimizer = read(folder)
    assert optimizer.form is not None
    assert optimizer.form.intervals[0] > 1
    assert optimizer.dp == dp


# ---- every form, written anew


@pytest.mark.parametrize("dp", [1, 2, 3, 12])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, dp: int, tmp_path: Path) -> None:
    model, save = made_up(layers=2), replace(FORMS[form], dp=dp, bucket=1000)
    folder = write(model, save, tmp_path / "x")
    assert wrong(model, folder) == []
    optimizer = read(folder)
    assert (optimizer.stage, optimizer.wrapper) == (save.stage, "zero")
    assert [g.settings["step"] for g in optimizer.groups] == [9, 9]
    assert [g.settings["weight_decay"] for g in optimizer.groups] == [0.1, 0.0]


@pytest.mark.parametrize("dp", range(1, 18))
@pytest.mark.parametrize("align", [1, 2])
def test_partitions_of_every_number_of_ranks(align: int, dp: int, tmp_path: Path) -> None:
    """Parts of an odd size, and whole parts of padding, which DeepSpeed did not count as such."""
    model = made_up(layers=1, hidden=12, heads=3)
    folder = write(model, Save(form="lean", dp=dp, align=align, version="0.5.8"), tmp_path / "x")
    assert wrong(model, folder) == []


@pytest.mark.parametrize("rank", [0, 2])
def test_a_partition_that_is_too_short(rank: int, tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(form="lean", dp=3), tmp_path / "x")

    def shorter(inner: dict[str, Any]) -> None:
        inner[LEAN][0] = inner[LEAN][0][:-2]
        for name, part in inner[BASE][0].items():
            inner[BASE][0][name] = part[:-2]

    change(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", shorter)
    with pytest.raises(BridgeError, match=rf"{LEAN}\[0\]: its parts on all ranks have"):
        read(folder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", ["v1", "v1 rigid", "0.5.4", "0.5.10"])
def test_two_tensor_parallel_ranks_in_two_stages(form: str, zipped: bool, tmp_path: Path) -> None:
    model = made_up(tp=2)
    save = replace(FORMS[form], stages=STAGES, zipped=zipped, bucket=700, skipped=4, dp=3)
    folder = write(model, save, tmp_path / "x")
    assert wrong(model, folder) == []
    optimizer = read(folder)
    elastic = form in ("v1", "0.5.4")
    assert [g.settings["step"] for g in optimizer.groups] == [5 if elastic else 9] * 2
    state = open_checkpoint(str(folder)).neox
    assert state is not None
    assert (state.tp, state.pp) == (2, 2)


@pytest.mark.parametrize("bucket", [50, 199, 500, 1234, 2000, 10_000, 500_000_000])
@pytest.mark.parametrize("form", ["v1", "v1 rigid"])
def test_communication_intervals(form: str, bucket: int, tmp_path: Path) -> None:
    model = made_up(layers=1)
    folder = write(model, replace(FORMS[form], bucket=bucket, dp=4), tmp_path / "x")
    assert wrong(model, folder) == []


@pytest.mark.parametrize("form", ["v1", "v1 rigid", "0.4.5", "0.5.10"])
def test_one_group_without_weight_decay(form: str, tmp_path: Path) -> None:
    model = made_up(layers=2)
    folder = write(model, replace(FORMS[form], weight_decay=0.0, bucket=900), tmp_path / "x")
    assert wrong(model, folder) == []
    (group,) = read(folder).groups
    assert group.settings["weight_decay"] == 0
    if form == "v1":  # the order in which GPT-NeoX builds it
        assert next(iter(group.settings)) == "weight_decay"


@pytest.mark.parametrize("stages", [[range(100)], STAGES])
def test_tied_embeddings(stages: list[range], tmp_path: Path) -> None:
    """They are in the optimizer of the first and of the last stage, and first in both."""
    model = made_up(tied=True)
    folder = write(model, Save(stages=stages, bucket=1500), tmp_path / "x")
    assert wrong(model, folder) == []


@pytest.mark.parametrize("form", ["v1", "v1 rigid", "0.4.5", "0.5.10"])
def test_without_pipeline_stages(form: str, tmp_path: Path) -> None:
    model = made_up(tp=2)
    folder = write(model, replace(FORMS[form], stages=[], bucket=900), tmp_path / "x")
    assert wrong(model, folder) == []


@pytest.mark.parametrize("stages", [[range(100)], STAGES, []])
def test_files_before_param_shapes(stages: list[range], tmp_path: Path) -> None:
    """DeepSpeed before 0.3.14: no underscore in the name, and no names of parameters at all."""
    model = made_up()
    save = Save(stages=stages, shapes="none", underscore=False, bucket=900)
    folder = write(model, save, tmp_path / "x")
    assert (folder / "zero_pp_rank_0_mp_rank_00optim_states.pt").exists()
    assert wrong(model, folder) == []
    assert codes(read(folder))["parameter-order-derived"] == "warning"


# ---- what is derived


def test_step_0(tmp_path: Path) -> None:
    model = made_up(layers=1)
    save = Save(iteration=0, schedule={**LR_SCHEDULER, "num_iters": 0})
    folder = write(model, save, tmp_path / "x")
    assert wrong(model, folder) == []
    group = read(folder).groups[0].settings
    assert (group["step"], group["lr"]) == (1, 0.0)


@pytest.mark.parametrize(
    ("version", "step", "rule"),
    [("0.13.1", 5, "1 + iteration - skipped_steps"), ("0.13.2", 4, "iteration - skipped_steps")],
)
def test_the_step_before_training_ended(version: str, step: int, rule: str, tmp_path: Path) -> None:
    """DeepSpeed 0.13.2 makes no step on zero gradients any more."""
    save = Save(form="lean", version=version, shapes="groups", align=2, skipped=4)
    optimizer = read(write(made_up(layers=1), save, tmp_path / "x"))
    assert optimizer.groups[0].settings["step"] == step
    assert optimizer.derived[-1].source == rule


def test_a_step_that_later_elastic_files_hold(tmp_path: Path) -> None:
    folder = write(
        made_up(layers=1), replace(FORMS["0.5.10 elastic"], version="0.14.0"), tmp_path / "x"
    )
    change_all(folder, lambda inner: inner.update(base_optimizer_state_step=7))
    optimizer = read(folder)
    assert [group.scalars for group in optimizer.groups] == [{"step": 7}] * 2
    assert "step" not in {d.key for d in optimizer.derived}


def test_a_count_of_another_run_is_a_warning(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(skipped=50), tmp_path / "x")
    optimizer = read(folder)
    assert (optimizer.derived[-1].value, optimizer.derived[-1].source) == (9, "1 + iteration")
    assert codes(optimizer)["adam-step-derived"] == "warning"


@pytest.mark.parametrize(
    ("style", "done", "rate"),
    [
        ("cosine", 8, 0.01 / 2 * (np.cos(np.pi * 7 / 100) + 1)),
        ("linear", 8, 0.01 * 93 / 100),
        ("exponential", 8, 0.01 * np.exp(-0.693 * 7 / 100)),
        ("constant", 8, 0.01),
        ("linear", 0, 0.0),
        ("linear", 99999, 0.001),
        ("cosine", 99999, 0.001),
    ],
)
def test_the_learning_rate_of_a_schedule(style: str, done: int, rate: float) -> None:
    schedule = {**LR_SCHEDULER, "decay_style": style, "num_iters": done}
    assert annealed(schedule, "x") == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("end_iter", 0, "lr_scheduler.end_iter is 0, not a number of iterations"),
        ("start_lr", None, "lr_scheduler.start_lr is empty, not a number"),
    ],
)
def test_a_schedule_that_cannot_be(key: str, value: Any, message: str, tmp_path: Path) -> None:
    save = Save(schedule={**LR_SCHEDULER, key: value})
    folder = write(made_up(layers=1), save, tmp_path / "x")
    with pytest.raises(BridgeError, match=rf"mp_rank_00_model_states\.pt: {message}"):
        read(folder)


def test_without_a_schedule_the_yml_counts(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(schedule={}), tmp_path / "x")
    optimizer = read(folder)
    assert optimizer.groups[0].settings["lr"] == 0.01
    assert "there is no schedule" in optimizer.derived[0].source


def test_defaults_of_a_yml_without_an_optimizer(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(), tmp_path / "x")
    lines = (folder / "run.yml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("optimizer", "weight-decay"))]
    (folder / "run.yml").write_text("\n".join(kept))
    optimizer = read(folder)
    first = optimizer.groups[0].settings
    assert (first["betas"], first["eps"], first["weight_decay"]) == ([0.9, 0.999], 1e-8, 0.01)
    assert sum("default" in derived.source for derived in optimizer.derived) == 3


def test_a_wrong_setting_is_named_with_the_folder_of_its_yml(tmp_path: Path) -> None:
    """Rigid states hold their hyperparameters, and v1.0 is written those of the yml."""
    step = write(made_up(layers=1), FORMS["v1 rigid"], tmp_path / "run" / "global_step8")
    yml = step / "run.yml"
    settings = yaml.safe_load(yml.read_text())
    settings["optimizer"]["params"]["betas"] = True
    yml.write_text(yaml.safe_dump(settings))
    error = run("reshard", step, tmp_path / "new", "--for", "v1.0", code=1)
    assert f"{step}/configs: optimizer.params.betas is True" in error


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(), tmp_path / "x")
    yml = folder / "run.yml"
    yml.write_text(yml.read_text().replace("Adam", "sm3"))
    with pytest.raises(Refused, match=r"optimizer\.type is 'sm3'"):
        read(folder)


# ---- damaged and hostile files


def change(path: Path, edit: Callable[[dict[str, Any]], object], *, outer: bool = False) -> None:
    """A file with its optimizer_state_dict, or what is around that, changed."""
    with zero_writer.scaler_module():
        value = torch.load(path, "cpu", weights_only=False)
        edit(value if outer else value["optimizer_state_dict"])
        torch.save(value, path)


def change_all(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    for path in folder.glob("*optim_states.pt"):
        change(path, edit)


MASTERS = "local_sub_partitions_of_fp32_groups"
BASE = "base_optimizer_state"
LEAN = "single_partition_of_fp32_groups"
Edit = Callable[[dict[str, Any]], object]


def set_at(*keys: Any, to: Any) -> Edit:
    def edit(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return edit


def cut_short(value: Any) -> None:
    """One element less in a part, of every state."""
    value[MASTERS][0][0] = value[MASTERS][0][0][:-1]
    for name, part in value[BASE][0][0].items():
        value[BASE][0][0][name] = part[:-1]


def moved(value: Any) -> None:
    """An element that is in the next part: the sum is right, the parts are not."""
    cut_short(value)
    first, second = value[MASTERS][0], value[BASE][0][1]
    first[1] = torch.cat([first[1], first[1][:1]])
    for name, part in second.items():
        second[name] = torch.cat([part, part[:1]])


def one_tensor_for_many(value: Any) -> None:
    """A small file with millions of parts, which a pickle can say in a few bytes."""
    groups = 60
    value[BASE] = [[value[BASE][0][0]] * 30_000] * groups
    value[MASTERS] = [[value[MASTERS][0][0]] * 30_000] * groups
    value["num_comm_intervals_per_group"] = [30_000] * groups


HOSTILE: dict[str, tuple[Edit, str]] = {
    "one tensor for many parts": (one_tensor_for_many, "1,800,000 parts, more than a file of this"),
    "no masters": (set_at(MASTERS, to=None), rf"{MASTERS} is empty"),
    "masters of another kind": (set_at(MASTERS, to={}), rf"{MASTERS} is a mapping"),
    "no group": (set_at(MASTERS, to=[]), rf"{MASTERS} is a list, not a list of 1 to 64"),
    "many groups": (set_at(MASTERS, to=[[]] * 65), rf"{MASTERS} is a list, not"),
    "no interval": (set_at(MASTERS, 0, to=[]), rf"{MASTERS}\[0\] is a list, not a list of 1 to"),
    "many intervals": (
        set_at(MASTERS, 0, to=[torch.zeros(0)] * (1 + (1 << 16))),
        rf"{MASTERS}\[0\] is a list, not a list of 1 to 65,536",
    ),
    "an interval that is no tensor": (set_at(MASTERS, 0, 1, to=7), rf"{MASTERS}\[0\]\[1\] is 7"),
    "a part of two dimensions": (
        set_at(MASTERS, 0, 0, to=torch.zeros(5, 5)),
        rf"{MASTERS}\[0\]\[0\] has the shape \[5, 5\]",
    ),
    "a part with gaps": (
        set_at(MASTERS, 0, 0, to=torch.zeros(1000)[::2]),
        rf"{MASTERS}\[0\]\[0\] has the shape \[500\]",
    ),
    "whole numbers": (
        set_at(MASTERS, 0, 0, to=torch.zeros(5, dtype=torch.int32)),
        rf"{MASTERS}\[0\]\[0\] has the dtype int32",
    ),
    "other intervals": (
        set_at("num_comm_intervals_per_group", to=[1, 1]),
        "num_comm_intervals_per_group does not match",
    ),
    "intervals of another kind": (
        set_at("num_comm_intervals_per_group", to=torch.zeros(2)),
        "num_comm_intervals_per_group does not match",
    ),
    "other ranks": (set_at("partition_count", to=3), "partition_count is 3"),
    "ranks of another kind": (set_at("partition_count", to="many"), "partition_count is 'many'"),
    "fewer groups of states": (lambda v: v[BASE].pop(), f"{BASE} has 1 group,"),
    "fewer intervals of states": (lambda v: v[BASE][0].pop(), rf"{BASE}\[0\] is a list, not"),
    "states that are a list": (set_at(BASE, 0, 0, to=[]), rf"{BASE}\[0\] is a list, not states"),
    "a state without a name": (set_at(BASE, 0, 0, 5, to=1), rf"{BASE}\[0\] is a mapping, not"),
    "no states": (set_at(BASE, 0, 0, to={}), "contain no tensors"),
    "a state of another size": (
        set_at(BASE, 0, 0, "exp_avg", to=torch.zeros(3)),
        rf"exp_avg beside {MASTERS}\[0\]\[0\] has 3 elements",
    ),
    "a state that is a list": (
        set_at(BASE, 0, 0, "exp_avg", to=[1]),
        rf"exp_avg beside {MASTERS}\[0\]\[0\] is a list",
    ),
    "a state that is missing": (
        lambda v: v[BASE][0][0].pop("exp_avg_sq"),
        "exp_avg_sq in another dtype than",
    ),
    "a state of another dtype": (
        lambda v: v[BASE][0][0].update(exp_avg=v[BASE][0][0]["exp_avg"].half()),
        "exp_avg in another dtype than",
    ),
    "states that differ": (set_at(BASE, 0, 0, "step", to=3), "different values in interval 1"),
    "a part that is too short": (cut_short, rf"{MASTERS}\[0\]: its parts on all ranks have"),
    "parts of other sizes": (moved, rf"{MASTERS}\[0\]: part \d+ of the group has"),
    "a loss scaler of another kind": (set_at("loss_scaler", to=4), "loss_scaler is 4"),
    "rigid states": (set_at(BASE, to={"state": {}, "param_groups": []}), "param_groups has 0"),
    "states that are a number": (set_at(BASE, to=7), f"{BASE} is 7, not an optimizer's state dict"),
    "rigid states of other intervals": (
        set_at(BASE, to={"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}),
        r"param_groups\[0\]\.params and the group differ: 1 and \d+ intervals",
    ),
    "states of stage 3": (set_at("fp32_flat_groups", to=[]), "ZeRO stage 3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_refused_by_file_and_key(name: str, tmp_path: Path) -> None:
    edit, message = HOSTILE[name]
    folder = write(made_up(layers=1), Save(bucket=1000), tmp_path / "x")
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    change(path, edit)
    with pytest.raises(BridgeError, match=message) as raised:
        read(folder)
    assert str(folder) in str(raised.value)
    run("export-optimizer", folder, tmp_path / "out", code=4 if raised.type is Refused else 1)


def test_shapes_of_another_model(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(), tmp_path / "x")
    for edit, message in (
        (set_at("param_shapes", "0.word_embeddings.weight", to=(32, 17)), "the parameters of this"),
        (set_at("param_shapes", "0.word_embeddings.weight", to="x"), "is 'x', not a shape"),
        (set_at("param_shapes", "0.word_embeddings.weight", to=(-1,)), "not a shape"),
        (set_at("param_shapes", to=7), r"param_shapes\[0\] is 7"),
        (set_at("param_shapes", to=[{}]), "has 2 parameter groups, and param_shapes of"),
        (set_at("param_shapes", "sequential.0.word_embeddings.weight", to=(32, 16)), "two names"),
        (set_at("param_shapes", "embed", to=(1,)), "embed is not a parameter name of GPT-NeoX"),
        (set_at("param_shapes", "9" * 5000 + ".x", to=(1,)), "is not a parameter name of GPT-NeoX"),
    ):
        copied = Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))
        change(copied / "zero_pp_rank_0_mp_rank_00_optim_states.pt", edit, outer=True)
        with pytest.raises(BridgeError, match=message):
            read(copied)


def test_a_bucket_that_is_smaller_than_the_ranks() -> None:
    shapes = {"0.word_embeddings.weight": (32, 16)}
    assert SubPartitions(shapes, 4, 8).partition == 2
    with pytest.raises(Refused, match=r"reduce_bucket_size is 3, less than the number of .*, 4"):
        _ = SubPartitions(shapes, 4, 3).partition


def test_groups_that_gpt_neox_does_not_make(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(), tmp_path / "x")

    def third(inner: dict[str, Any]) -> None:
        inner[MASTERS].append([torch.zeros(0)])
        inner[BASE].append([{"exp_avg": torch.zeros(0), "exp_avg_sq": torch.zeros(0)}])
        inner["num_comm_intervals_per_group"].append(1)

    change_all(folder, third)
    with pytest.raises(Refused, match="3 parameter groups, but GPT-NeoX writes one or two"):
        read(folder)


def test_files_of_different_saves(tmp_path: Path) -> None:
    """Ranks that are rigid and elastic, or of other intervals, or of another step."""
    model = made_up(layers=1)
    elastic = write(model, Save(bucket=1000), tmp_path / "elastic")
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for other, message in (
        (Save(form="v1 rigid", bucket=1000), "holds rigid states of 2 groups"),
        (Save(bucket=600), "has .* communication intervals"),
        (Save(form="lean"), r"single_partition_of_fp32_groups.*are from different saves"),
    ):
        shutil.copy(write(model, other, tmp_path / message[:9]) / name, elastic / name)
        with pytest.raises(BridgeError, match=message):
            read(elastic)
    rigid = write(model, Save(form="v1 rigid"), tmp_path / "rigid")
    change(rigid / name, set_at(BASE, "param_groups", 0, "step", to=3))
    with pytest.raises(BridgeError, match="step differs between ranks"):
        read(rigid)


def test_ranks_that_are_missing_or_there_twice(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(dp=12), tmp_path / "x")
    name = "zero_pp_rank_10_mp_rank_00_optim_states.pt"
    shutil.copy(folder / name, folder / name.replace("_optim", "optim"))
    with pytest.raises(Refused, match="two optimizer state files of the same rank"):
        read(folder)
    (folder / name).unlink()
    assert wrong(made_up(layers=1), folder) == []
    (folder / name.replace("_optim", "optim")).unlink()
    with pytest.raises(BridgeError, match=r"zero_pp_rank_10_mp_rank_00_optim_states\.pt missing"):
        read(folder)


@pytest.mark.parametrize("form", ["v1 rigid", "0.5.4"])
def test_padding_that_is_not_zero(form: str, tmp_path: Path) -> None:
    model = made_up(layers=1, hidden=12, heads=3)
    save = replace(FORMS[form], dp=11, bucket=900)
    folder = write(model, save, tmp_path / "x")
    assert wrong(model, folder) == []

    def last(inner: dict[str, Any]) -> None:
        key = MASTERS if MASTERS in inner else LEAN
        part = inner[key][0][-1] if key == MASTERS else inner[key][0]
        part[-1] = 1.0

    change(folder / "zero_pp_rank_10_mp_rank_00_optim_states.pt", last)
    with pytest.raises(
        BridgeError, match=r"\[0\] contains non-zero values after the last parameter"
    ):
        read(folder)


def test_rigid_parts_of_another_model(tmp_path: Path) -> None:
    """As many intervals as the rule never gives: the sum is larger than the model."""
    folder = write(made_up(layers=1), Save(form="v1 rigid", bucket=1000), tmp_path / "x")

    def longer(inner: dict[str, Any]) -> None:
        for _ in range(2):
            inner[MASTERS][0].append(torch.zeros_like(inner[MASTERS][0][0]))
            number = len(inner[BASE]["state"])
            inner[BASE]["state"][number] = inner[BASE]["state"][0]
            inner[BASE]["param_groups"][0]["params"].append(number)

    change_all(folder, longer)
    with pytest.raises(BridgeError, match=r"\[0\]: its parts on all ranks have"):
        read(folder)


def test_rigid_parts_have_one_size(tmp_path: Path) -> None:
    """An element that is in the next part: the sum is right, the parts are not."""
    folder = write(made_up(layers=1), Save(form="v1 rigid", bucket=1000), tmp_path / "x")

    def shift(inner: dict[str, Any]) -> None:
        masters, (one, two) = inner[MASTERS][0], (inner[BASE]["state"][n] for n in (0, 1))
        for first, at, second, to in [(masters, 0, masters, 1), *((one, k, two, k) for k in one)]:
            second[to] = torch.cat([first[at][-1:], second[to]])
            first[at] = first[at][:-1]

    change(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", shift)
    with pytest.raises(BridgeError, match=r"\[0\]: its parts have different sizes"):
        read(folder)


def test_round_robin_is_refused(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), FORMS["0.4.5"], tmp_path / "x")
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    edit = set_at("ds_config", "zero_optimization", "round_robin_gradients", to=True)
    change(path, edit, outer=True)
    with pytest.raises(Refused, match="round_robin_gradients was on"):
        read(folder)


# ---- masters and weights


@pytest.mark.parametrize("form", FORMS)
def test_masters_of_another_step_are_a_warning(form: str, tmp_path: Path) -> None:
    model = made_up(layers=2)
    folder = write(model, FORMS[form], tmp_path / "x")
    states = model.ranks[0][3, "mlp.dense_4h_to_h.weight"]
    states["fp32"] = states["fp32"].copy()
    states["fp32"][-1, -1] += 1.0
    other = write(model, FORMS[form], tmp_path / "other")
    for path in other.glob("*optim_states.pt"):
        shutil.copy(path, folder)
    optimizer = read(folder)
    assert differing(optimizer, model.ranks[0]) == []
    if FORMS[form].form == "rigid":  # whose files hold the order of their parameters
        assert codes(optimizer) == {}
    else:
        assert codes(optimizer)["masters-not-weights"] == "warning"
    export = run("export-optimizer", folder, tmp_path / "export")
    masters = run("convert", folder, tmp_path / "hf", "--weights", "masters")
    warned = "fp32 master weights of the optimizer do not round to the weights" in export
    assert warned == (FORMS[form].form != "rigid")
    assert ("fp32 master weights of the optimizer do not round to the weights" in masters) == warned
    assert ("do not contain Adam's step" in export) == (FORMS[form].form in ("v1", "lean"))
    assert "do not contain Adam's step" not in masters
    report = json.loads(run("inspect", folder, "--optimizer", "--stats", "--json"))
    assert report["optimizer"]["masters"]["differing"] == ["layer 3: mlp.dense_4h_to_h.weight"]
    assert [f["severity"] for f in report["findings"] if f["code"] == "masters-not-weights"] == [
        "warning"
    ]


def test_masters_decayed_before_training(tmp_path: Path) -> None:
    """Without warmup the step on zero gradients decays the masters, and not yet the weights."""
    model = made_up(layers=1)
    save = Save(iteration=0, schedule={**LR_SCHEDULER, "warmup_iter": 0.0, "num_iters": 0})
    folder = write(model, save, tmp_path / "x")
    for (_, name), states in model.ranks[0].items():
        if "norm" not in name and not name.endswith("bias"):
            states["fp32"] = states["fp32"] * np.float32(1 - 0.01 * 0.1)
    other = write(model, save, tmp_path / "other")
    for path in other.glob("*optim_states.pt"):
        shutil.copy(path, folder)
    optimizer = read(folder)
    assert differing(optimizer, model.ranks[0]) == []
    assert (optimizer.groups[0].settings["step"], optimizer.groups[0].settings["lr"]) == (1, 0.01)
    (finding,) = optimizer.findings
    assert "no warmup, so its first step on zero gradients decayed them" in finding.message


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_its_master_rounded(name: str) -> None:
    folder = PUBLISHED / name / "flat"
    report = json.loads(run("inspect", folder, "--optimizer", "--stats", "--json"))
    assert report["optimizer"]["masters"] == {"compared": 40, "differing": []}
    assert {f["code"] for f in report["findings"]} >= (
        {"adam-step-derived"} if name != "v1_dp2_rigid" else set()
    )
    text = run("inspect", folder, "--optimizer", "--stats")
    assert "40 of 40 weights equal their rounded master weights" in text
    assert "exp_avg_sq: gpt_neox.layers.2.mlp.dense_4h_to_h.weight" in text


# ---- the commands


HF_NAMES = {
    "0.word_embeddings.weight": "gpt_neox.embed_in.weight",
    "6.norm.weight": "gpt_neox.final_layer_norm.weight",
    "6.norm.bias": "gpt_neox.final_layer_norm.bias",
    "7.final_linear.weight": "embed_out.weight",
}


def hf_name(layer: int, name: str) -> str:
    return HF_NAMES.get(f"{layer}.{name}") or f"gpt_neox.layers.{layer - 2}.{name}"


@pytest.mark.parametrize("name", NAMES)
def test_export_and_masters_are_the_live_optimizers(name: str, tmp_path: Path) -> None:
    source, states, hf = PUBLISHED / name / "flat", tmp_path / "states", tmp_path / "hf"
    assert "verified bit by bit" in run("export-optimizer", source, states)
    run("convert", source, hf, "--weights", "masters")
    want = truth(name)
    exported = {kind: load_file(states / f"{kind}.safetensors") for kind in ("exp_avg", "master")}
    exported["exp_avg_sq"] = load_file(states / "exp_avg_sq.safetensors")
    exported["weights"] = load_file(hf / "model.safetensors")
    for (layer, short), by_kind in want.items():
        key = hf_name(layer, short)
        for kind, theirs in (
            ("master", "fp32"),
            ("weights", "fp32"),
            ("exp_avg", "exp_avg"),
            ("exp_avg_sq", "exp_avg_sq"),
        ):
            assert exported[kind][key].tobytes() == by_kind[theirs].tobytes(), (kind, key)
    assert all(len(tensors) == len(want) for tensors in exported.values())
    written = json.loads((states / "optimizer.json").read_text())
    live = facts(name)
    for group, theirs in zip(written["groups"], live["param_groups"], strict=True):
        assert {key: group[key] for key in theirs} == theirs
    assert written["loss_scaler"] == live["scaler"]
    assert written["derived"].get("step") == (
        "1 + iteration - skipped_steps" if live["elastic_checkpoint"] else None
    )
    assert "unchanged since it was written" in run("verify", states)
    text = run("inspect", states, code=1)
    assert "contains optimizer states that export-optimizer wrote" in text
    command = shlex.split(re.findall(r"neox-bridge verify .*?(?=\. )", text)[0])
    assert "unchanged since it was written" in run(*command[1:])
    damaged = bytearray((states / "exp_avg.safetensors").read_bytes())
    damaged[-1] ^= 1
    (states / "exp_avg.safetensors").write_bytes(damaged)
    run("verify", states, code=3)


def test_diff_of_elastic_and_rigid_states(tmp_path: Path) -> None:
    elastic, rigid = (PUBLISHED / name / "flat" for name in ("v1_dp2", "v1_dp2_rigid"))
    assert "160 tensors: 160 equal" in run("diff", elastic, rigid, "--optimizer")
    folder = Path(shutil.copytree(elastic, tmp_path / "changed"))
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    change(path, lambda inner: inner[BASE][1][0]["exp_avg"].mul_(2))
    text = run("diff", elastic, folder, "--optimizer", code=3)
    assert "exp_avg: " in text
    assert "exp_avg_sq: gpt_neox" not in text


def test_audit_of_a_run(tmp_path: Path) -> None:
    """Two steps of one run: nothing is wrong; then the second has the first's optimizer."""
    first = made_up(layers=1)
    second = made_up(layers=1)
    for states in second.ranks[0].values():
        for kind in states:
            states[kind] = states[kind] * np.float32(1.1)
    root = tmp_path / "run"
    early = write(first, Save(iteration=8), root / "step8")
    late = write(second, Save(iteration=16), root / "step16")
    assert "0 errors, 0 warnings" in run("audit", root, "--optimizer")
    for path in early.glob("*optim_states.pt"):
        shutil.copy(path, late)
    text = run("audit", root, "--optimizer", code=3)
    assert "optimizer" in text


def test_what_kind_of_states_and_what_resumes_them() -> None:
    facts_of = {}
    for name in NAMES:
        folder = PUBLISHED / name / "flat"
        facts_of[name] = json.loads(run("inspect", folder, "--json"))["neox"]["optimizer_states"]
    assert facts_of["v1_dp4_intervals"] == {
        "kind": "elastic",
        "zero_stage": 1,
        "data_parallel": 4,
        "intervals": [5, 1],
        "deepspeed": None,
        "written_by": "DeepSpeed up to 0.3.16 and DeeperSpeed 0.3.15",
        "resumed_by": {
            "deepspeed": "DeepSpeed up to 0.3.16 and DeeperSpeed 0.3.15",
            "data_parallel": "any",
            "setting": None,
            "today": False,
            "keeps_step": False,
        },
        "complete": True,
    }
    rigid = facts_of["v1_dp2_rigid"]
    assert (rigid["kind"], rigid["data_parallel"], rigid["intervals"]) == ("rigid", 2, [2, 1])
    assert rigid["resumed_by"]["setting"] == "elastic_checkpoint: false"
    assert (rigid["resumed_by"]["data_parallel"], rigid["resumed_by"]["keeps_step"]) == (2, True)
    text = run("inspect", PUBLISHED / "v1_dp2" / "flat")
    assert "elastic ZeRO 1 states of 2 data-parallel ranks" in text
    assert "neox-bridge reshard" in text


@pytest.mark.parametrize(
    ("form", "refusal"),
    [
        ("v1", "Empty ds_version"),
        ("v1 rigid", "Empty ds_version"),
        ("stage 2 of 0.3.16", "Empty ds_version"),
        ("0.4.5", "KeyError: 'base_optimizer_state_step'"),
        ("0.5.10 elastic", "KeyError: 'base_optimizer_state_step'"),
        ("0.5.10", ""),
    ],
)
def test_what_today_s_gpt_neox_says_of_them(form: str, refusal: str, tmp_path: Path) -> None:
    folder = write(made_up(layers=1), FORMS[form], tmp_path / "x")
    states = saved_states(open_checkpoint(str(folder)))
    assert states is not None
    assert states.stage == FORMS[form].stage
    assert bool(states.refusal) == bool(refusal)
    assert refusal in states.refusal
    report = json.loads(run("doctor", folder, "--for", "today", "--json", code=4))
    text = json.dumps(report)
    assert ("optimizer-version" in text) == bool(refusal)
    assert ("neox-bridge reshard" in text) == bool(refusal)
    assert refusal in text


@pytest.mark.parametrize(
    ("form", "zero", "refusal"),
    [
        ("v1", {}, None),
        ("v1", {"elastic_checkpoint": False}, "says otherwise"),
        ("v1 rigid", {}, "KeyError: 0"),
        ("v1 rigid", {"elastic_checkpoint": False}, None),
        ("stage 2 of 0.3.16", {}, None),
        ("0.4.5", {}, "a later DeepSpeed"),
        ("0.5.10", {}, "KeyError: 'csr_tensor_module_names'"),
    ],
)
def test_what_v1_says_of_them(
    form: str, zero: dict[str, Any], refusal: str | None, tmp_path: Path
) -> None:
    """As a run of its own layout, so that nothing else keeps it from loading."""
    step = write(made_up(layers=1), FORMS[form], tmp_path / "run" / "global_step8")
    (step / "configs").mkdir()
    settings = yaml.safe_load((step / "run.yml").read_text())
    settings["zero_optimization"] |= zero
    settings["tokenizer_type"] = "HFTokenizer"
    (step / "run.yml").unlink()
    (step / "configs" / "run.yml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run" / "latest").write_text("global_step8")
    done = json.loads(
        run("doctor", step.parent, "--for", "neox@v1.0", "--json", code=4 if refusal else 0)
    )
    text = json.dumps(done)
    assert ("optimizer-version" in text) == bool(refusal)
    if refusal is None:
        assert "this GPT-NeoX resumes from them" in text
        return
    assert refusal in text
    (command,) = set(re.findall(r"neox-bridge reshard [^\"]*", text))
    run(*shlex.split(command)[1:])
    fixed = shlex.split(command)[3]
    run("doctor", fixed, "--for", "neox@v1.0")


@pytest.mark.parametrize("form", ["v1", "v1 rigid", "0.4.5", "stage 2 of 0.3.16"])
def test_the_command_that_inspect_prints(form: str, tmp_path: Path) -> None:
    folder = write(made_up(layers=2), replace(FORMS[form], bucket=1500), tmp_path / "x")
    (line,) = [line for line in run("inspect", folder).splitlines() if "to convert them" in line]
    command = shlex.split(line.partition("to convert them: ")[2])
    assert "verified bit by bit" in run(*command[1:])
    resharded = command[3]
    assert "112 tensors: 112 equal" in run("diff", folder, resharded, "--optimizer")
    report = json.loads(run("inspect", resharded, "--json"))
    assert report["neox"]["optimizer_states"]["resumed_by"]["today"] is True


def test_a_form_that_is_read_but_not_written(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), FORMS["0.5.4"], tmp_path / "x")
    out = run("reshard", folder, tmp_path / "new", "--dp", "1", code=4)
    assert f"{folder}: DeepSpeed 0.5.4 wrote its optimizer states" in out
    run("reshard", folder, tmp_path / "new", "--dp", "1", "--for", "today")  # as it advises


def test_inspect_opens_what_has_broken_states(tmp_path: Path) -> None:
    folder = write(made_up(layers=1), Save(), tmp_path / "x")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    report = json.loads(run("inspect", folder, "--json"))
    assert report["neox"]["optimizer_states"] is None
    assert "optimizer-unreadable" in {f["code"] for f in report["findings"]}


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_verify_compares_what_was_made_of_masters_with_the_masters(
    dtype: str, tmp_path: Path
) -> None:
    source = write(made_up(tp=2, layers=1), Save(), tmp_path / "source")
    hf = tmp_path / "hf"
    run("convert", source, hf, "--weights", "masters", "--dtype", dtype)
    text = run("verify", source, hf)
    assert (
        "converted with --weights masters, so it is compared with the fp32 master weights" in text
    )
    assert "equal" in text
    run("report", hf, "--source", source, "-o", tmp_path / "page.html")
    path = source / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with zero_writer.scaler_module():
        value = torch.load(path, weights_only=False)
        value["optimizer_state_dict"]["local_sub_partitions_of_fp32_groups"][0][0][5] += 1
        torch.save(value, path, _use_new_zipfile_serialization=False)
    assert "DIFFERS from the source" in run("verify", source, hf, code=3)
    for path in source.glob("zero_*"):
        path.unlink()
    refused = run("verify", source, hf, code=1)
    assert f"{source} contains no optimizer states" in refused
    assert "was converted from master weights: verify it with the run that has them" in refused
