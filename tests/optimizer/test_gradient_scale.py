"""``reshard`` where gradient_accumulation_steps changes under an engine that sums gradients."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from common import FIXTURES, same_bits
from resharding import (
    DATA,
    FP16,
    RANDOM,
    compared,
    files,
    go_on,
    logical,
    reshard,
    rewritten,
    write,
)

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.deepspeed import pipeline_accumulation
from neox_bridge.optimizer.global_batch import Batch, spread
from neox_bridge.optimizer.gradient_scale import (
    Rescaling,
    Side,
    change_of_scale,
    kept_accumulation,
)
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.planning.plan import Plan

POWERS = {"master": 0, "exp_avg": 1, "exp_avg_sq": 2}


def run(*command: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == code, done.output
    return done.output


def yml(root: Path) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((root / "resume.yml").read_text())
    return value


def finding(plan: Plan, code: str) -> Finding | None:
    return next((found for found in plan.findings if found.code == code), None)


def source_with(
    root: Path,
    *,
    name: str = "fp32",
    settings: dict[str, Any] | None = None,
    meta: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A genuine run with other settings in its yml, and other values in its mp_rank files."""
    copytree(DATA / name if not Path(name).is_absolute() else name, root)
    step = root / (root / "latest").read_text()
    if settings:
        for path in (step / "configs").glob("*.yml"):
            kept = yaml.safe_load(path.read_text())
            kept = {k: v for k, v in kept.items() if k.replace("-", "_") not in settings}
            path.write_text(json.dumps(kept))
        (step / "configs" / "zz.yml").write_text(yaml.safe_dump(settings))
    for path in step.glob("mp_rank_*") if meta else ():
        assert meta is not None
        rewritten(path, meta)
    return root


# --- what is known of engines --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("0.9.3", "averages"),
        ("0.12.4+02e2ebf7", "averages"),
        ("0.15.4", "averages"),
        ("0.16.0", "sums"),
        ("0.16.5", "sums"),
        ("0.18.2", "sums"),
        ("0.18.3", "once a stage"),
        ("0.19.2", "once a stage"),
        ("0.19.3", "averages"),
        ("1.0.0", "averages"),
        ("main", None),
        (None, None),
    ],
)
def test_what_a_version_does(version: str | None, kind: str | None) -> None:
    assert pipeline_accumulation(version) == kind


@pytest.mark.parametrize(
    ("before", "after", "kept", "factor"),
    [
        (Side("sums", True, 1, 1), Side("sums", True, 1, 2), 1, Fraction(2)),
        (Side("sums", True, 1, 4), Side("sums", True, 2, 2), 4, Fraction(1, 2)),
        (Side("sums", False, 1, 4), Side("sums", True, 1, 4), 1, Fraction(4)),
        (Side("sums", True, 1, 4), Side("sums", False, 1, 4), None, Fraction(1, 4)),
        (Side("averages", True, 1, 4), Side("averages", True, 1, 2), None, Fraction(1)),
        (Side("averages", True, 1, 4), Side("sums", True, 1, 4), 1, Fraction(4)),
        (Side("sums", True, 1, 3), Side("averages", True, 1, 2), None, Fraction(1, 3)),
        (Side("once a stage", True, 1, 4), Side("once a stage", True, 1, 2), None, Fraction(1)),
        (Side("once a stage", True, 2, 4), Side("once a stage", True, 2, 4), 4, Fraction(1)),
        (Side("once a stage", True, 2, 1), Side("once a stage", True, 4, 1), 1, Fraction(1)),
    ],
)
def test_the_change_of_scale(before: Side, after: Side, kept: int | None, factor: Fraction) -> None:
    assert kept_accumulation(before, after) == kept
    assert change_of_scale(before, after, "") == factor


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Side("once a stage", True, 2, 4), Side("once a stage", True, 2, 2)),
        (Side("once a stage", True, 2, 4), Side("once a stage", True, 4, 4)),
        (Side("once a stage", True, 2, 4), Side("averages", True, 2, 4)),
        (Side("averages", True, 1, 2), Side("once a stage", True, 2, 2)),
    ],
)
def test_stages_of_different_scales_are_refused(before: Side, after: Side) -> None:
    with pytest.raises(Refused, match=r"once in each pipeline stage \(DeepSpeed#8152.*WAY OUT"):
        change_of_scale(before, after, "WAY OUT")


def test_the_accumulation_is_kept_where_no_forward_pass_grows() -> None:
    assert spread(Batch(16, 4, 2), 4, None, 2) == Batch(16, 2, 2)
    assert spread(Batch(16, 4, 2), 1, None, 2) == Batch(16, 4, 4)  # it would take passes of 8
    assert spread(Batch(16, 4, 2), 1, 8, 2) == Batch(16, 8, 2)
    assert spread(Batch(16, 4, 2), 4, None, 3) == Batch(16, 4, 1)
    assert spread(Batch(16, 4, 2), 4, 1, 2) == Batch(16, 1, 4)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "k"),
    [
        ("fp32", {"micro_batch": 1}, 2),
        ("fp32_pp2", {"micro_batch": 1, "pp": 1}, 2),
        ("fp32_pp0_dp2", {"pp": 1, "dp": 1}, 2),
        ("fp32_pp0_dp2", {"pp": 2, "dp": 1, "micro_batch": 1}, 4),
        ("fp32_stage0", {"micro_batch": 1}, 2),
        ("fp32_stage0", {"micro_batch": 1, "zero": 1}, 2),
        ("fp32", {"micro_batch": 1, "zero": 0}, 2),
        ("bf16_tp2_dp2", {"dp": 1}, 2),
        ("bf16_tp2_dp2", {"dp": 1, "universal": True}, 2),
        ("bf16_tp2", {"tp": 1, "micro_batch": 1}, 2),
        ("bf16_accumulated_dp3", {"dp": 1}, 3),
        ("fp16_stage0", {"micro_batch": 1}, 2),
        (str(FP16), {"micro_batch": 1}, 2),
        (str(FP16), {"micro_batch": 1, "zero": 0}, 2),
    ],
    ids=str,
)
def test_states_and_settings_are_scaled(
    name: str, asked: dict[str, Any], k: int, tmp_path: Path
) -> None:
    """Every state, hyperparameter and setting; masters and weights stay as they are."""
    source, new = DATA / name, tmp_path / "new"
    plan, result = reshard(source, new, **asked)
    warning = finding(plan, "gradient-scale")
    assert warning is not None
    assert warning.severity == "warning"
    assert f"the gradients are {k} x" in warning.message
    assert result.findings == ()
    old, scaled = logical(source), logical(new)
    for key in old.keys() & scaled.keys():
        for state, want in old[key].items():
            want = (want.double() * k ** POWERS[key]).float()
            assert same_bits(scaled[key][state], want), (key, state)
    settings = yml(new) if not asked.get("universal") else None
    checkpoint = open_checkpoint(str(new))
    settings = settings or checkpoint.raw
    assert settings["gradient_clipping"] == k
    assert settings["optimizer"]["params"]["eps"] == pytest.approx(k * 1e-8, rel=1e-15)
    before = read_optimizer(open_checkpoint(str(source)))
    after = read_optimizer(checkpoint)
    for a, b in zip(before.groups, after.groups, strict=True):
        assert b.settings == {**a.settings, "eps": k * a.settings["eps"]}
    if "clip_grad" in before.head and "clip_grad" in after.head:
        assert after.head["clip_grad"] == k * before.head["clip_grad"]
    told = before.metas[0].get("ds_config", {}), after.metas[0].get("ds_config", {})
    if "gradient_clipping" in told[0]:
        assert told[1]["gradient_clipping"] == k * told[0]["gradient_clipping"]


def test_no_key_is_scaled_without_need(tmp_path: Path) -> None:
    """The same accumulation: no finding, and the settings as they were."""
    plan, _ = reshard(DATA / "fp32", tmp_path / "new", dp=2)
    assert finding(plan, "gradient-scale") is None
    assert "gradient_clipping" not in yml(tmp_path / "new")


def test_adam_goes_on_as_before(tmp_path: Path) -> None:
    """With gradients of twice the size, to the last bit; and not with the states of the old."""
    reshard(DATA / "fp32", tmp_path / "new", micro_batch=1)
    want, found = go_on(DATA / "fp32"), go_on(tmp_path / "new", 2)
    assert [name for name in want if not same_bits(found[name], want[name])] == []
    reshard(DATA / "fp32", tmp_path / "wrong", micro_batch=1, engine="averages")
    wrong = go_on(tmp_path / "wrong", 2)
    assert all(not torch.equal(wrong[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["fp32", "fp32_stage0", "bf16_tp2", "fp16_stage0", str(FP16)])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """A factor of two changes no digit: the way back gives the same bits."""
    reshard(DATA / name, tmp_path / "there", micro_batch=1)
    reshard(tmp_path / "there", tmp_path / "back", micro_batch=2)
    leave = ("make_vocab_size_divisible_by", *RANDOM)
    assert compared(tmp_path / "back", DATA / name, leave) == []
    assert yml(tmp_path / "back")["gradient_clipping"] == 1


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("source", [DATA / "fp16_stage0", FP16], ids=lambda path: path.name)
def test_the_loss_scale_is_divided(source: Path, zero: int, tmp_path: Path) -> None:
    """So that scaled gradients are as large as before, at either stage."""

    def scale(root: Path) -> Any:
        head = read_optimizer(open_checkpoint(str(root))).head
        return {**head, **getattr(head.get("loss_scaler"), "state", {})}["cur_scale"]

    plan, _ = reshard(source, tmp_path / "new", micro_batch=1, zero=zero)
    assert scale(tmp_path / "new") == scale(source) / 2
    told = finding(plan, "loss-scale")
    assert told is not None
    assert "divided by 2 (no further than min_loss_scale)" in told.message
    plan, _ = reshard(tmp_path / "new", tmp_path / "back", micro_batch=2)
    assert scale(tmp_path / "back") == scale(source)
    told = finding(plan, "loss-scale")
    assert told is not None
    assert "multiplied by 2" in told.message


def test_a_loss_scale_goes_no_lower_than_its_minimum(tmp_path: Path) -> None:
    source = tmp_path / "old"
    copytree(FP16, source)

    def low(value: Any) -> None:
        state = value["optimizer_state_dict"]["loss_scaler"].state
        state["cur_scale"], state["min_scale"] = 1.5, 1

    rewritten(next(path for name, path in files(source).items() if "optim_states" in name), low)
    reshard(source, tmp_path / "new", micro_batch=1)
    head = read_optimizer(open_checkpoint(str(tmp_path / "new"))).head
    assert head["loss_scaler"].state["cur_scale"] == 1


def test_a_static_loss_scale(tmp_path: Path) -> None:
    half = {"enabled": True, "loss_scale": 64}
    source = source_with(tmp_path / "old", name=str(FP16), settings={"fp16": half})
    reshard(source, tmp_path / "new", micro_batch=1)
    assert yml(tmp_path / "new")["fp16"] == {"enabled": True, "loss_scale": 32}


def test_a_factor_that_is_no_power_of_two_is_named(tmp_path: Path) -> None:
    plan, _ = reshard(DATA / "fp32_dp3", tmp_path / "new", dp=1)
    warning = finding(plan, "gradient-scale")
    assert warning is not None
    assert (
        "exp_avg x 3, exp_avg_sq x 9 (rounded, because it is not a power of two)"
    ) in warning.message


def test_values_that_become_too_small_are_counted(tmp_path: Path) -> None:
    """A quarter of the smallest numbers of float32 is rounded, which is said."""
    source = tmp_path / "old"
    reshard(DATA / "fp32", source, micro_batch=1)
    shards = read_optimizer(open_checkpoint(str(source))).shards
    piece = shards[0, (2, "mlp.linear1.weight")]["exp_avg_sq"].pieces[0]
    assert piece.source is not None
    write(piece.source, torch.tensor([1e-45, 3e-45, 5.6e-45]).numpy().tobytes())
    _, result = reshard(source, tmp_path / "new", micro_batch=2)
    assert [found.code for found in result.findings] == ["scaled-states-rounded"]
    assert result.findings[0].message.startswith("2 values of 1 optimizer state ")


# --- engines, optimizers -------------------------------------------------------------------------


def test_into_an_engine_that_averages(tmp_path: Path) -> None:
    """Two micro-batches that were summed, from now on averaged."""
    reshard(DATA / "fp32", tmp_path / "two", micro_batch=1)
    plan, _ = reshard(tmp_path / "two", tmp_path / "new", engine="averages")
    warning = finding(plan, "gradient-scale")
    assert warning is not None
    assert "the gradients are 0.5 x" in warning.message
    assert compared(tmp_path / "new", DATA / "fp32") == []
    plan, _ = reshard(
        tmp_path / "two", tmp_path / "same", engine="averages", source_engine="averages"
    )
    warning = finding(plan, "gradient-scale")
    assert warning is not None
    assert warning.severity == "info"
    assert compared(tmp_path / "same", tmp_path / "two") == []


@pytest.mark.parametrize(
    ("version", "scaled"), [("0.12.4", False), ("0.16.5", True), ("0.19.8", False), (None, True)]
)
def test_the_version_of_the_run_decides(version: str | None, scaled: bool, tmp_path: Path) -> None:
    def set_version(value: dict[str, Any]) -> None:
        value["ds_version"] = version

    source = source_with(tmp_path / "old", meta=set_version)
    plan, _ = reshard(source, tmp_path / "new", micro_batch=1)
    told = finding(plan, "gradient-scale")
    assert told is not None
    assert (told.severity == "warning") is scaled
    assert (f"DeepSpeed {version}" if version else "unknown DeepSpeed version") in told.message
    plan, _ = reshard(source, tmp_path / "sums", micro_batch=1, engine="sums")
    told = finding(plan, "gradient-scale")
    assert told is not None
    assert told.severity == "warning"  # whatever the source did at accumulation 1


def test_engines_that_divide_once_a_stage(tmp_path: Path) -> None:
    def set_version(value: dict[str, Any]) -> None:
        value["ds_version"] = "0.18.9"
        value["ds_config"]["train_micro_batch_size_per_gpu"] = 1

    source = source_with(tmp_path / "old", name="fp32_pp2", meta=set_version)
    with pytest.raises(Refused, match=r"DeepSpeed#8152.*`source_engine=averages`"):
        reshard(source, tmp_path / "new", pp=1)
    reshard(source, tmp_path / "same")
    assert compared(tmp_path / "same", source) == []
    plan, _ = reshard(source, tmp_path / "new", pp=1, source_engine="averages", engine="averages")
    told = finding(plan, "gradient-scale")
    assert told is not None
    assert told.severity == "info"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "optimizer.type sgd"),
        ({"optimizer": {"type": "madgrad_wd", "params": {}}}, "optimizer.type madgrad_wd"),
        ({"optimizer": {"type": "OneBitAdam", "params": {}}}, "optimizer.type onebitadam"),
        ({"optimizer": {"type": "SM3", "params": {}}}, "optimizer.type sm3"),
        ({"optimizer": {"type": "Lion", "params": {}}}, "optimizer.type lion"),  # it has Adam's
        ({"use_bnb_optimizer": True}, "use_bnb_optimizer: true"),
    ],
)
def test_other_optimizers_are_refused_with_a_way_out(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    source, new = source_with(tmp_path / "old", name="bf16_tp2_dp2", settings=settings), "new"
    output = run("reshard", str(source), str(tmp_path / new), "--dp", "1", code=4)
    assert named in output
    assert "--micro-batch 4 keeps gradient_accumulation_steps 1" in output
    assert not (tmp_path / new).exists()
    run("reshard", str(source), str(tmp_path / new), "--dp", "1", "--micro-batch", "4")


def test_lion(tmp_path: Path) -> None:
    """Its update is the sign of its moment: only that is scaled, and the clipping."""
    lion = {"type": "Lion", "params": {"lr": 0.001, "betas": [0.9, 0.99]}}
    source = source_with(tmp_path / "old", settings={"optimizer": lion})

    def without_squares(value: Any) -> None:
        for state in value["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            del state["exp_avg_sq"]

    rewritten(files(source)["zero_pp_rank_0_mp_rank_00_optim_states.pt"], without_squares)
    reshard(source, tmp_path / "new", micro_batch=1)
    old, new = logical(source), logical(tmp_path / "new")
    assert all(same_bits(new["exp_avg"][n], 2 * t) for n, t in old["exp_avg"].items())
    assert yml(tmp_path / "new")["gradient_clipping"] == 2
    assert yml(tmp_path / "new")["optimizer"] == lion


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": {"type": "Adam", "params": {"lr": 0.003, "adam_w_mode": False}}},
        {"optimizer": {"type": "cpu_adam", "params": {"lr": 0.003, "adamw_mode": False}}},
        {"use_mup": True},
    ],
    ids=str,
)
def test_a_weight_decay_that_is_added_to_the_gradient(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    source = source_with(tmp_path / "old", settings={**settings, "weight_decay": 0.25})
    plan, _ = reshard(source, tmp_path / "new", micro_batch=1)
    warning = finding(plan, "coupled-weight-decay")
    assert warning is not None
    assert warning.severity == "warning"
    assert "weight_decay x 2" in warning.message
    assert yml(tmp_path / "new")["weight_decay"] == 0.5
    decays = [
        [group.settings["weight_decay"] for group in read_optimizer(open_checkpoint(root)).groups]
        for root in (str(source), str(tmp_path / "new"))
    ]
    assert decays[1] == [2 * decay for decay in decays[0]]


def test_a_decoupled_weight_decay_stays(tmp_path: Path) -> None:
    source = source_with(tmp_path / "old", settings={"weight_decay": 0.25})
    plan, _ = reshard(source, tmp_path / "new", micro_batch=1)
    assert finding(plan, "coupled-weight-decay") is None
    assert yml(tmp_path / "new")["weight_decay"] == 0.25


# --- the command ---------------------------------------------------------------------------------


def test_the_command_verifies_what_it_scaled(tmp_path: Path) -> None:
    source, new = str(DATA / "fp32"), str(tmp_path / "new")
    output = run("reshard", source, new, "--micro-batch", "1")
    assert "verified bit by bit" in output
    assert "gradient_clipping: 2.0, optimizer.params.eps: 2e-08" in output
    assert "--engine averages" in output
    again = str(tmp_path / "averaged")
    output = run("reshard", source, again, "--micro-batch", "1", "--engine", "averages")
    assert "info: the gradients keep their scale" in output
    assert compared(tmp_path / "averaged", DATA / "fp32") == []


def test_states_of_an_export_are_scaled_too(tmp_path: Path) -> None:
    source, states = str(DATA / "fp32"), str(tmp_path / "states")
    run("export-optimizer", source, states)
    ways = [("--states", states), ()]
    for number, more in enumerate(ways):
        run("reshard", source, str(tmp_path / f"{number}"), "--micro-batch", "1", *more)
    assert compared(tmp_path / "0", tmp_path / "1") == []


def test_the_way_out_is_in_the_fixtures_reach() -> None:
    """The fixtures were saved by a version that sums."""
    for root in (DATA / "fp32", FP16, FIXTURES / "pythia_bf16_pp1_tp2_dp2" / "checkpoints"):
        value: Any = read_torch(str(files(root)["mp_rank_00_model_states.pt"]))
        assert pipeline_accumulation(value["ds_version"]) == "sums"


@pytest.mark.parametrize(
    ("factor", "divisor"),
    [
        (Fraction(3), 4),
        (Fraction(2), 2),
        (Fraction(3, 2), 2),
        (Fraction(1, 4), 1 / 4),
        (Fraction(1, 3), 1 / 2),
        (Fraction(5), 8),
    ],
)
def test_scaled_gradients_are_no_larger_than_before(factor: Fraction, divisor: float) -> None:
    changes = Rescaling(factor, {}, decays=False, has_eps=True, half=True)
    assert changes.loss_scale == divisor
    assert changes.exact == (factor in (2, Fraction(1, 4)))


def test_deepspeeds_settings_in_the_files_are_scaled(tmp_path: Path) -> None:
    def with_settings(value: dict[str, Any]) -> None:
        params = {"lr": 0.003, "eps": 1e-6, "weight_decay": 0.5}
        value["ds_config"]["gradient_clipping"] = 1.5
        value["ds_config"]["optimizer"] = {"type": "Adam", "params": params}

    source = source_with(tmp_path / "old", meta=with_settings)
    reshard(source, tmp_path / "new", micro_batch=1)
    config = read_optimizer(open_checkpoint(str(tmp_path / "new"))).metas[0]["ds_config"]
    assert config["gradient_clipping"] == 3
    assert config["optimizer"]["params"] == {"lr": 0.003, "eps": 2e-6, "weight_decay": 0.5}
