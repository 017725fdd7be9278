"""``convert --optimizer fresh``: masters from the weights, zero moments, a schedule at its step."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from common import FIXTURES, hf_tensors, make_hf, same_bits
from resharding import DATA, compared, differences, files, logical

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.eras import era_named
from neox_bridge.optimizer.fresh import learning_rate, schedule_of
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.planning.default_settings import with_default_settings
from neox_bridge.planning.options import Options


def convert(source: Path, target: Path, *more: str) -> str:
    command = ["convert", str(source), str(target), "--to", "neox", "--optimizer", "fresh", *more]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert re.search("verified( bit by bit|: equal after casting)", done.output), done.output
    return done.output


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fp32", []),
        ("fp32_pp2", []),
        ("fp32_pp0_dp2", ["--dp", "2"]),
        ("fp32_dp3", ["--dp", "3"]),
        ("bf16_tp2_dp2", ["--dp", "2"]),
        ("bf16_accumulated_dp3", ["--dp", "3"]),
    ],
)
def test_partitions_are_deepspeeds(name: str, more: list[str], tmp_path: Path) -> None:
    """Every partition, mapping, padding and group of a genuine run of the same shape."""
    convert(DATA / name, tmp_path / "new", *more)
    mine, genuine = files(tmp_path / "new"), files(DATA / name)
    assert list(mine) == list(genuine)
    for file in mine:
        a, b = (read_torch(str(there[file])) for there in (mine, genuine))
        assert isinstance(a, dict)
        assert isinstance(b, dict)
        if not file.endswith("optim_states.pt"):
            shapes = a.get("param_shapes"), b.get("param_shapes")
            assert list(differences(*shapes, file, values=False)) == []
            continue
        a, b = a["optimizer_state_dict"], b["optimizer_state_dict"]
        for key in ("param_slice_mappings", "group_paddings", "partition_count"):
            assert list(differences(a[key], b[key], key)) == []
        masters = "single_partition_of_fp32_groups"
        assert [t.shape for t in a[masters]] == [t.shape for t in b[masters]]
        base, theirs = a["base_optimizer_state"], b["base_optimizer_state"]
        for index, group in enumerate(theirs["param_groups"]):
            assert group["name"] == base["param_groups"][index]["name"]
            assert group["weight_decay"] == base["param_groups"][index]["weight_decay"]
            for key in ("exp_avg", "exp_avg_sq"):
                assert base["state"][index][key].shape == theirs["state"][index][key].shape
        assert isinstance(a.get("zero_stage"), Record) == isinstance(b.get("zero_stage"), Record)


def test_biases_lie_where_gpt_neox_registers_them(tmp_path: Path) -> None:
    """DeepSpeed's flat states have no names: another order gives a bias its neighbor's master.

    The order is that of the real GPT-NeoX (tests/neox/test_reshard_neox.py holds them together).
    """
    hf = make_hf(tmp_path / "hf", family="llama", attention_bias=True, mlp_bias=True)
    convert(hf, tmp_path / "new")
    meta: Any = read_torch(str(files(tmp_path / "new")["mp_rank_00_model_states.pt"]))
    decaying, others = (
        [name for name in group if name[:2] == "2."] for group in meta["param_shapes"]
    )
    weights = ("attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2")
    assert decaying == [f"2.{name}.weight" for name in weights]
    assert others == [
        "2.input_layernorm.scale",
        "2.attention.query_key_value.bias",
        "2.attention.dense.bias",
        "2.post_attention_layernorm.scale",
        "2.mlp.linear1.bias",
        "2.mlp.linear2.bias",
    ]
    layer = next((tmp_path / "new" / "global_step0").glob("layer_02-model_00*"))
    stored: Any = read_torch(str(layer))
    assert [name for name in stored if name[-6:] != "weight"] == [name[2:] for name in others]


def test_the_schedule_is_gpt_neoxs() -> None:
    """What a genuine run says of its schedule, and the rate that it trained with."""
    for name in ("fp32", "bf16_tp2"):
        checkpoint = open_checkpoint(str(DATA / name))
        optimizer = read_optimizer(checkpoint)
        told = optimizer.metas[0]["lr_scheduler"]
        made = schedule_of(checkpoint.raw, 0.003, told["num_iters"])
        assert made == told
        assert learning_rate(made) == optimizer.groups[0].settings["lr"]


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "constant"])
def test_the_rate_stays_between_its_bounds(style: str) -> None:
    settings = {"train_iters": 100, "lr_decay_style": style, "warmup": 0.1, "min_lr": 0.1}
    rates = [learning_rate(schedule_of(settings, 1.0, step)) for step in range(101)]
    assert rates[0] == rates[1] == 0.1
    assert rates[10] == 1.0
    assert rates[100] == {"constant": 1.0, "exponential": pytest.approx(0.536, abs=1e-3)}.get(
        style, 0.1
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_masters_are_the_source_unrounded(dtype: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "new", "--dtype", dtype, "--tp", "2", "--dp", "2", "--iteration", "70")
    assert (tmp_path / "new" / "latest").read_text() == "global_step70"
    found = logical(tmp_path / "new")
    for name, want in hf_tensors(hf).items():
        rows = want.shape[0]
        assert same_bits(found["master"][name][:rows].contiguous(), want), name
        assert not found["master"][name][rows:].any()
        assert not found["exp_avg"][name].any()
        assert not found["exp_avg_sq"][name].any()
    yml = yaml.safe_load((tmp_path / "new" / "resume.yml").read_text())
    assert yml["finetune"] is False
    assert yml["zero_optimization"]["stage"] == 1
    meta: Any = read_torch(str(files(tmp_path / "new")["mp_rank_00_model_states.pt"]))
    assert (meta["iteration"], meta["global_steps"]) == (70, 70)
    assert meta["lr_scheduler"]["num_iters"] == 70
    assert meta["dp_world_size"] == 2


def test_it_can_be_resharded(tmp_path: Path) -> None:
    convert(DATA / "fp32", tmp_path / "new")
    done = CliRunner().invoke(
        app, ["reshard", str(tmp_path / "new"), str(tmp_path / "two"), "--tp", "2", "--pp", "2"]
    )
    assert done.exit_code == 0, done.output
    back = CliRunner().invoke(
        app, ["reshard", str(tmp_path / "two"), str(tmp_path / "back"), "--tp", "1", "--pp", "1"]
    )
    assert back.exit_code == 0, back.output
    random = ("random_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states")
    assert compared(tmp_path / "back", tmp_path / "new", random) == []


@pytest.mark.parametrize("era", ["v1.0", "2024-03", "2024-09", "today"])
def test_a_run_without_dropout_stays_without_it(era: str, tmp_path: Path) -> None:
    """neox-bridge wrote the run for today's GPT-NeoX, and until 2023-12 the default was 0.1."""
    hf = make_hf(tmp_path / "hf", torch.float16)
    convert(hf, tmp_path / "run", "--tp", "2", "--dp", "2")
    command = ["reshard", str(tmp_path / "run"), str(tmp_path / "new"), "--for", era, "--tp", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    for path in (tmp_path / "new" / "resume.yml", *tmp_path.glob("new/*/configs/*.yml")):
        yml = yaml.safe_load(path.read_text())
        explicit = 0.0 if era in ("v1.0", "2024-03") else None
        assert [yml.get(f"{kind}_dropout") for kind in ("hidden", "attention")] == [explicit] * 2
    assert ("hidden_dropout: 0, attention_dropout: 0" in done.output) == (explicit == 0.0)


def test_a_version_that_is_none_leaves_the_defaults_unknown() -> None:
    checkpoint = open_checkpoint(str(DATA / "fp32"))
    raw = {key: value for key, value in checkpoint.raw.items() if "dropout" not in key}
    run = replace(checkpoint, raw=raw, neox=replace(checkpoint.neox_state, mlp_names="dense"))
    new, (finding,) = with_default_settings(run, "a fork", era_named("today"))
    assert (finding.code, finding.severity) == ("defaults-unknown", "warning")
    assert new.raw["hidden_dropout"] == 0.0


def test_a_run_at_its_last_iteration_has_nothing_to_train(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    options = Options(to="neox", optimizer="fresh", iteration=999)
    checkpoint = open_checkpoint(str(hf))
    before = make_plan(checkpoint, options, "x")
    assert "nothing-to-train" not in {finding.code for finding in before.findings}
    output = convert(hf, tmp_path / "run", "--iteration", "1000")
    assert "warning: resume.yml sets train_iters: 1000, and the checkpoint is at" in output
    assert "set train_iters and lr_decay_iters above 1000 in resume.yml" in output
    yml = yaml.safe_load((tmp_path / "run" / "resume.yml").read_text())
    assert yml["train_iters"] == 1000
    unoptimized = make_plan(checkpoint, replace(options, optimizer="none", iteration=5000), "x")
    assert "nothing-to-train" not in {finding.code for finding in unoptimized.findings}


def test_what_cannot_be(tmp_path: Path) -> None:
    run = CliRunner()
    source = str(FIXTURES / "llama_fp32_2024_09_w123_tp2" / "checkpoints")
    command = ["convert", source, str(tmp_path / "x"), "--to", "neox", "--optimizer", "fresh"]
    old = run.invoke(app, command)
    assert old.exit_code == 4
    assert "gated MLPs of GPT-NeoX before 2024-09" in old.output
    hf = run.invoke(app, ["convert", str(DATA / "fp32"), str(tmp_path / "x"), *command[5:]])
    assert hf.exit_code == 2
    assert "--optimizer: only for GPT-NeoX targets" in hf.output
    dp = run.invoke(app, ["convert", str(DATA / "fp32"), str(tmp_path / "x"), "--dp", "2"])
    assert dp.exit_code == 2
    checkpoint = open_checkpoint(str(DATA / "fp32"))
    raw = {**checkpoint.raw, "optimizer": {"type": "sm3", "params": {"lr": 0.1}}}
    with pytest.raises(Refused, match="the settings' optimizer is sm3"):
        make_plan(replace(checkpoint, raw=raw), Options(to="neox", optimizer="fresh"), "x")
