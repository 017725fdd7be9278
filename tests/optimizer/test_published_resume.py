"""Runs of GPT-NeoX v1.0 resume in later trees, and runs of later trees in v1.0: what is written.

tests/neox/test_published_neox.py resumes such runs in the real GPT-NeoX of four dates. Its v1.0
needs another torch, so what is written for it is held here against files that it wrote itself.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from common import FIXTURES, hf_tensors, make_hf
from published import PUBLISHED, differing, truth
from resharding import DATA, differences, reshard
from zero_writer import FORMS, STAGES, Save, bucket_rule, made_up, write

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.eras import era_named, known_keys
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.v1_form import SubPartitions
from neox_bridge.planning.random_states import cuda_state

V1, TODAY = era_named("v1.0"), era_named("today")
ELASTIC = ("v1_dp2", "v1_dp4_intervals")


def files(folder: Path) -> dict[str, Any]:
    """The values of all ``.pt`` files of a step by their names."""
    step = next(folder.glob("global_step*"), folder)
    return {path.name: read_torch(str(path)) for path in sorted(step.glob("*.pt"))}


def all_differences(mine: Path, theirs: Path) -> list[str]:
    a, b = files(mine), files(theirs)
    assert a.keys() == b.keys()
    return [line for name in a for line in differences(a[name], b[name], name)]


def renamed(states: Mapping[tuple[int, str], Any]) -> dict[tuple[int, str], Any]:
    """States under the names of trees since 2024-09."""
    words = {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"}
    found = {}
    for (layer, name), value in states.items():
        for old, new in words.items():
            name = name.replace(old, new)
        found[layer, name] = value
    return found


# ---- to today's GPT-NeoX


@pytest.mark.parametrize("name", [*ELASTIC, "v1_dp2_rigid"])
def test_the_states_are_the_live_optimizers(name: str, tmp_path: Path) -> None:
    plan, _ = reshard(
        PUBLISHED / name / "flat", tmp_path / "new", era=TODAY, dp=2, engine="averages"
    )
    optimizer = read_optimizer(open_checkpoint(str(tmp_path / "new")))
    assert differing(optimizer, renamed(truth(name))) == []
    for group in optimizer.groups:
        assert group.settings["step"] == group.scalars["step"] == 9
    lost_in_files = [f.code for f in plan.findings if "derived" in f.code]
    assert bool(lost_in_files) == (name != "v1_dp2_rigid")


def test_files_have_the_keys_of_todays_deepspeed(tmp_path: Path) -> None:
    """Their order and types are those of a genuine run in float16."""
    reshard(PUBLISHED / "v1_dp2" / "flat", tmp_path / "new", era=TODAY, dp=1, micro_batch=4)
    mine = files(tmp_path / "new")
    genuine = files(FIXTURES / "pythia_fp16_pp1_tp1" / "checkpoints")
    rank, theirs = (f["mp_rank_00_model_states.pt"] for f in (mine, genuine))
    assert list(rank) == list(theirs)
    for key in rank:
        assert type(rank[key]) is type(theirs[key]), key
    assert rank["ds_version"] == "0.16.5"
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states, wanted = mine[name], genuine[name]
    assert list(states) == list(wanted)
    states, wanted = (v["optimizer_state_dict"] for v in (states, wanted))
    assert list(states) == list(wanted)
    for key in states:
        assert type(states[key]) is type(wanted[key]), key
    scalers = [v["loss_scaler"] for v in (states, wanted)]
    assert all(isinstance(scaler, Record) for scaler in scalers)
    assert list(scalers[0].state) == list(scalers[1].state)
    assert scalers[0].state["cur_scale"] == 4096
    groups, theirs = (v["base_optimizer_state"]["param_groups"] for v in (states, wanted))
    for group, other in zip(groups, theirs, strict=True):
        assert set(other) <= set(group)
        assert group["name"] == other["name"]
        assert type(group["betas"]) is tuple
    assert states["clip_grad"] == 1.0


def test_a_setting_that_is_null_is_the_default(tmp_path: Path) -> None:
    source = write(made_up(layers=2), Save(), tmp_path / "source")
    yml = source / "run.yml"
    yml.write_text(yml.read_text() + "gradient-clipping: null\n")
    reshard(source, tmp_path / "new", era=TODAY)
    states = files(tmp_path / "new")["zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    assert states["optimizer_state_dict"]["clip_grad"] == 1.0


@pytest.mark.parametrize("name", ["2024-03", "2024-09", "today"])
def test_the_yml_has_keys_that_the_tree_accepts(name: str, tmp_path: Path) -> None:
    era = era_named(name)
    reshard(PUBLISHED / "v1_dp2" / "flat", tmp_path / "new", era=era, tp=3, pp=1)
    for path in (tmp_path / "new" / "resume.yml", *tmp_path.glob("new/*/configs/*.yml")):
        settings = yaml.safe_load(path.read_text())
        assert set(settings) <= known_keys(era)
        assert "gas" not in settings
        assert settings["gradient_accumulation_steps"] == 1
    assert settings["model_parallel_size"] == 3
    assert settings["lr_decay_style"] == "cosine"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_written_in_todays(form: str, tmp_path: Path) -> None:
    model, save = made_up(layers=2), replace(FORMS[form], dp=3, bucket=1000)
    source = write(model, save, tmp_path / "source")
    # GPT-NeoX of today runs stage 2 without model-parallel ranks only
    stages = {"tp": 2, "pp": 2} if save.stage == 1 else {"tp": 1, "pp": 0}
    layout = {**stages, "dp": 1, "micro_batch": 6}
    reshard(source, tmp_path / "new", era=TODAY, **layout)
    reshard(tmp_path / "new", tmp_path / "one", tp=1, pp=1 if save.stage == 1 else 0)
    optimizer = read_optimizer(open_checkpoint(str(tmp_path / "one")))
    assert differing(optimizer, renamed(model.ranks[0])) == []


def test_generators_of_gpus_fit_the_torch_of_the_time(tmp_path: Path) -> None:
    """torch before 1.13 has 800 bytes that mean nothing in front, and newer ones refuse them."""
    source = write(made_up(layers=2), Save(), tmp_path / "source")
    path = source / "mp_rank_00_model_states.pt"
    value = torch.load(path, weights_only=False)
    state = cuda_state(7)
    old = torch.frombuffer(bytearray(b"\xff" * 800 + state), dtype=torch.uint8)
    value |= {"cuda_rng_state": old, "rng_tracker_states": {"model-parallel-rng": old.clone()}}
    torch.save(value, path)
    reshard(source, tmp_path / "new", era=TODAY, tp=2, dp=1, micro_batch=4)
    for rank in range(2):
        name = f"mp_rank_{rank:02d}_model_states.pt"
        found = torch.load(tmp_path / "new" / "global_step8" / name, weights_only=False)
        assert bytes(found["cuda_rng_state"].numpy()) == state
        tracked = bytes(found["rng_tracker_states"]["model-parallel-rng"].numpy())
        assert tracked == cuda_state(7 + rank)
    reshard(tmp_path / "new", tmp_path / "back", era=V1, tp=1, dp=2, micro_batch=2)
    name = "global_step8/mp_rank_00_model_states.pt"
    found = torch.load(tmp_path / "back" / name, weights_only=False)
    assert bytes(found["cuda_rng_state"].numpy()) == bytes(old.numpy())
    tracked = found["rng_tracker_states"]["model-parallel-rng"]
    assert bytes(tracked.numpy()) == bytes(old.numpy())


# ---- to v1.0


@pytest.mark.parametrize("name", ELASTIC)
def test_v1_files_are_those_of_v1(name: str, tmp_path: Path) -> None:
    """Keys, types, order and bits, directly and through today's form and back."""
    source = PUBLISHED / name / "flat"
    reshard(source, tmp_path / "same", era=V1)
    assert all_differences(tmp_path / "same", source) == []
    reshard(source, tmp_path / "today", era=TODAY)
    plan, _ = reshard(tmp_path / "today", tmp_path / "back", era=V1)
    assert all_differences(tmp_path / "back", source) == []
    assert "adam-step-lost" in [finding.code for finding in plan.findings]


def test_a_run_of_v1_stays_one_unless_told(tmp_path: Path) -> None:
    source = PUBLISHED / "v1_dp4_intervals" / "flat"
    reshard(source, tmp_path / "same")
    assert all_differences(tmp_path / "same", source) == []
    reshard(source, tmp_path / "two", dp=2, micro_batch=4)
    assert "adam-step-lost" not in (tmp_path / "two" / "resume.yml").read_text()
    optimizer = read_optimizer(open_checkpoint(str(tmp_path / "two")))
    assert differing(optimizer, truth("v1_dp4_intervals")) == []


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("stages", [STAGES, [range(100)], []], ids=["pp2", "pp1", "pp0"])
@pytest.mark.parametrize("bucket", [700, 2500, 500_000_000])
def test_every_layout_of_v1(bucket: int, stages: list[range], zipped: bool, tmp_path: Path) -> None:
    save = Save(dp=3, bucket=bucket, stages=stages, zipped=zipped)
    source = write(made_up(tp=2), save, tmp_path / "source")
    reshard(source, tmp_path / "same", era=V1)
    found = all_differences(tmp_path / "same", source)
    assert [line for line in found if line.startswith("zero_pp_rank")] == []


@pytest.mark.parametrize("count", [1, 50, 999, 1000, 1001, 12_345, 100_003])
@pytest.mark.parametrize("bucket", [16, 100, 1000, 99_999])
@pytest.mark.parametrize("dp", [1, 2, 7, 16])
def test_parts_are_cut_as_deepspeed_cuts_them(count: int, bucket: int, dp: int) -> None:
    group = SubPartitions({"a": (count,)}, dp, bucket)
    assert (group.intervals, group.partition) == bucket_rule(count, dp, bucket)
    parts = range(group.intervals * dp)
    assert sum(map(group.used, parts)) == count
    assert sum(f.numel for part in parts for f in group.fragments(part)) == count


def test_rigid_states_become_elastic_ones(tmp_path: Path) -> None:
    """v1.0 fails on states of the kind that its yml does not say (stage1.py)."""
    plan, _ = reshard(PUBLISHED / "v1_dp2_rigid" / "flat", tmp_path / "new", era=V1)
    settings = yaml.safe_load((tmp_path / "new" / "resume.yml").read_text())
    assert "elastic_checkpoint" not in settings["zero_optimization"]
    assert "elastic-checkpoint" in [finding.code for finding in plan.findings]
    optimizer = read_optimizer(open_checkpoint(str(tmp_path / "new")))
    assert optimizer.form is not None
    assert optimizer.form.kind == "elastic"
    assert differing(optimizer, truth("v1_dp2_rigid")) == []


def test_a_run_of_today_for_v1(tmp_path: Path) -> None:
    source = FIXTURES / "pythia_fp16_pp1_tp1" / "checkpoints"
    reshard(source, tmp_path / "old", era=V1, tp=2, dp=2, micro_batch=1)
    value = files(tmp_path / "old")
    genuine = files(PUBLISHED / "v1_dp2" / "flat")["mp_rank_00_model_states.pt"]
    assert list(value["mp_rank_00_model_states.pt"]) == list(genuine)
    assert value["mp_rank_00_model_states.pt"]["csr_tensor_module_names"] == set()
    layer = value["layer_02-model_00-model_states.pt"]
    assert type(layer) is dict
    assert layer["attention.rotary_emb.inv_freq"].dtype == "float16"
    assert "mlp.dense_h_to_4h.weight" in layer
    settings = yaml.safe_load((tmp_path / "old" / "resume.yml").read_text())
    assert set(settings) <= known_keys(V1)
    reshard(tmp_path / "old", tmp_path / "back", era=TODAY, tp=1, dp=1, micro_batch=2)
    mine, theirs = (
        read_optimizer(open_checkpoint(str(root))).shards for root in (tmp_path / "back", source)
    )
    assert mine.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        (
            "bf16_tp2",
            {},
            "DeeperSpeed 0.3.15, which GPT-NeoX v1.0 requires, supports ZeRO only for float16",
        ),
        ("fp32", {}, "supports ZeRO only for float16"),
        ("fp16_stage0", {}, "ZeRO stage 0.*Use `zero=1`"),
        ("fp16_stage0", {"zero": 2, "pp": 0}, "ZeRO stage 2.*Use `zero=1`"),
    ],
)
def test_what_v1_cannot_resume(
    source: str, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=message):
        reshard(DATA / source, tmp_path / "x", era=V1, **more)


def test_the_ways_out_of_a_refusal_work(tmp_path: Path) -> None:
    reshard(DATA / "fp16_stage0", tmp_path / "x", era=V1, zero=1)
    with pytest.raises(Refused, match=r"ZeRO stage 2.*Use `zero=1`"):
        reshard(PUBLISHED / "v1_dp2" / "flat", tmp_path / "y", pp=0, zero=2, era=V1)
    with pytest.raises(Refused, match="does not load universal checkpoints"):
        reshard(PUBLISHED / "v1_dp2" / "flat", tmp_path / "y", universal=True)
    reshard(PUBLISHED / "v1_dp2" / "flat", tmp_path / "z", universal=True, era=TODAY)


# ---- convert


def test_a_hugging_face_model_for_v1(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", torch.float16)
    command = ["convert", str(hf), str(tmp_path / "neox"), "--to", "neox", "--for", "neox@v1.0"]
    done = CliRunner().invoke(app, [*command, "--tp", "2"])
    assert done.exit_code == 0, done.output
    value = files(tmp_path / "neox")
    genuine = files(PUBLISHED / "v1_dp2" / "flat")
    assert list(value["mp_rank_01_model_states.pt"]) == list(genuine["mp_rank_00_model_states.pt"])
    layer, theirs = (v["layer_02-model_00-model_states.pt"] for v in (value, genuine))
    assert type(layer) is dict
    assert list(layer) == list(theirs)
    assert len(value["mp_rank_00_model_states.pt"]["args"]) == 8
    states = torch.load(
        tmp_path / "neox/global_step0/mp_rank_00_model_states.pt", weights_only=False
    )
    assert states["cuda_rng_state"].shape == (816,)
    settings = yaml.safe_load((tmp_path / "neox" / "finetune.yml").read_text())
    assert set(settings) <= known_keys(V1)
    back = CliRunner().invoke(app, ["convert", str(tmp_path / "neox"), str(tmp_path / "back")])
    assert back.exit_code == 0, back.output
    for name, tensor in hf_tensors(hf).items():
        assert np.array_equal(hf_tensors(tmp_path / "back")[name], tensor), name


@pytest.mark.parametrize(
    ("family", "config", "key"),
    [
        ("llama", {}, "mlp_type"),
        ("llama", {"num_key_value_heads": 2}, "num_kv_heads"),
        ("gpt_neox", {"attention_bias": False}, "use_bias_in_attn_linear"),
    ],
)
def test_models_that_v1_does_not_have(
    family: str, config: dict[str, Any], key: str, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    command = ["convert", str(hf), str(tmp_path / "neox"), "--to", "neox", "--for", "neox@v1.0"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 4, done.output
    assert f"{key}: " in done.output
    assert "GPT-NeoX of release v1.0" in done.output
    assert not (tmp_path / "neox").exists()


def test_dates_before_v2_are_v1s(tmp_path: Path) -> None:
    command = ["reshard", str(PUBLISHED / "v1_dp2" / "flat"), str(tmp_path / "x"), "--for"]
    done = CliRunner().invoke(app, [*command, "neox@2022-06"])
    assert done.exit_code == 0, done.output
    assert all_differences(tmp_path / "x", PUBLISHED / "v1_dp2" / "flat") == []


# ---- settings that the yml leaves out, or that had no effect


def _with_yml(source: Path, target: Path, drop: tuple[str, ...], **settings: Any) -> Path:
    """A copy of a flat checkpoint whose yml leaves out some keys, and has others."""
    shutil.copytree(source, target)
    path = target / "160M.yml"
    kept = yaml.safe_load(path.read_text())
    for key in drop:
        del kept[key]
    path.write_text(yaml.safe_dump({**kept, **settings}))
    return target


LEFT_OUT = ("gradient_clipping", "weight-decay", "hidden-dropout", "attention-dropout")


@pytest.mark.parametrize("era", ["2024-03", "today"])
def test_defaults_of_v1_are_written_for_later_trees(era: str, tmp_path: Path) -> None:
    """Values of GPT-NeoX v1.0's NeoXArgs; later trees clip at 1.0, decay 0.1, and drop nothing."""
    source = _with_yml(PUBLISHED / "v1_dp2_rigid" / "flat", tmp_path / "run", LEFT_OUT)
    plan, _ = reshard(source, tmp_path / "new", era=era_named(era))
    expected = {
        "gradient_clipping": 0.0, "weight_decay": 0.01, "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    }  # fmt: skip
    for path in (tmp_path / "new" / "resume.yml", *tmp_path.glob("new/*/configs/*.yml")):
        settings = yaml.safe_load(path.read_text())
        assert {key: settings[key] for key in expected} == expected
        assert "weighted_sampler_alpha" not in settings
    (finding,) = (f for f in plan.findings if f.code == "defaults-kept")
    assert "gradient_clipping: 0, hidden_dropout: 0.1" in finding.message
    states = files(tmp_path / "new")["zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    assert states["optimizer_state_dict"]["clip_grad"] == 0.0


def test_defaults_stay_unsaid_where_they_are_the_same(tmp_path: Path) -> None:
    source = _with_yml(PUBLISHED / "v1_dp2" / "flat", tmp_path / "run", LEFT_OUT)
    reshard(source, tmp_path / "v1")
    settings = yaml.safe_load((tmp_path / "v1" / "resume.yml").read_text())
    assert "hidden_dropout" not in settings


def test_defaults_of_later_trees_are_written_for_v1(tmp_path: Path) -> None:
    """v1.0 takes the weight decay from the yml, and its default is another."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "pythia_fp16_pp1_tp1" / "checkpoints", source)
    for path in source.rglob("*.yml"):
        kept = yaml.safe_load(path.read_text())
        gone = {key.replace("_", "-") for key in ("weight_decay", "gradient_clipping")}
        gone |= {"weight_decay", "gradient_clipping"}
        path.write_text(yaml.safe_dump({k: v for k, v in kept.items() if k not in gone}))
    reshard(source, tmp_path / "old", era=V1)
    settings = yaml.safe_load((tmp_path / "old" / "resume.yml").read_text())
    assert (settings["weight_decay"], settings["gradient_clipping"]) == (0.1, 1.0)


def test_gas_had_no_effect(tmp_path: Path) -> None:
    source = _with_yml(PUBLISHED / "v1_dp2" / "flat", tmp_path / "run", ("gas",), gas=4)
    plan, _ = reshard(source, tmp_path / "new", era=TODAY)
    settings = yaml.safe_load((tmp_path / "new" / "resume.yml").read_text())
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["train_micro_batch_size_per_gpu"] == 2
    (finding,) = (f for f in plan.findings if f.code == "computed-key")
    assert finding.message.startswith("gas: 4 in the yml had no effect")
    optimizer = read_optimizer(open_checkpoint(str(tmp_path / "new")))
    assert differing(optimizer, renamed(truth("v1_dp2"))) == []


def test_a_batch_that_only_the_whole_is_known_of(tmp_path: Path) -> None:
    source = _with_yml(
        PUBLISHED / "v1_dp2" / "flat", tmp_path / "run",
        ("train_micro_batch_size_per_gpu",), train_batch_size=4,
    )  # fmt: skip
    reshard(source, tmp_path / "new", era=TODAY)
    settings = yaml.safe_load((tmp_path / "new" / "resume.yml").read_text())
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("era", "told", "written"),
    [
        (V1, None, "column"),  # v1.0's default is row
        (V1, "row", "column"),
        (TODAY, "row", "column"),  # which ends a later GPT-NeoX
        (TODAY, None, None),
        (TODAY, "column", "column"),
    ],
)
def test_the_output_layer_is_divided_by_columns(
    era: Any, told: str | None, written: str | None, tmp_path: Path
) -> None:
    more = {} if told is None else {"output-layer-parallelism": told}
    source = _with_yml(
        PUBLISHED / "v1_dp2" / "flat", tmp_path / "run", ("output-layer-parallelism",), **more
    )
    reshard(source, tmp_path / "new", era=era, tp=3)
    settings = yaml.safe_load((tmp_path / "new" / "resume.yml").read_text())
    assert settings.get("output_layer_parallelism") == written
    done = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "finetune"), "--to", "neox", "--tp", "3"]
    )
    assert done.exit_code == 0, done.output
    settings = yaml.safe_load((tmp_path / "finetune" / "finetune.yml").read_text())
    assert settings["output_layer_parallelism"] == "column"
