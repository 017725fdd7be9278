"""DeepSpeed's universal checkpoints: written as it writes them, and read like any other source."""

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from common import convert, hf_tensors, make_hf, same_bits
from jsonschema import Draft202012Validator
from resharding import (
    DATA,
    RANDOM,
    ZERO,
    compare_states,
    compared,
    differences,
    inside,
    logical,
    reshard,
    tensor,
)
from schemas import plan_schema

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.read_files import read_optimizer

GENUINE = DATA.parent / "universal"
BIASES = ("attention.dense.bias", "mlp.linear2.bias")


def run(*command: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def genuine(name: str, folder: Path) -> Path:
    """What ds_to_universal.py wrote of the run bf16_tp2: told how ranks share parameters, or not.

    The yml files are put beside it, which it leaves out.
    """
    with tarfile.open(GENUINE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    shutil.copytree(DATA / "bf16_tp2" / "global_step9" / "configs", inside(folder) / "configs")
    return folder


def value(path: Path) -> Any:
    return read_torch(str(path))


def as_deepspeed_cuts(path: Path, shape: torch.Size, tp: int, rank: int) -> torch.Tensor:
    """What a rank gets of a file: load_hp_checkpoint_state of deepspeed 0.16, in a few lines."""
    told: Any = torch.load(path, weights_only=False)
    full = told["param"]
    if full.shape == shape:
        return full
    if told.get("vocab_tensor"):
        full = torch.nn.functional.pad(full, (0, 0, 0, shape[0] * tp - full.shape[0]))
    dim = told.get("cat_dim", 0)
    parts = [full]
    if "param_n_sub_params" in told:
        parts = list(full.chunk(told["param_n_sub_params"], dim))
    if "sub_param_shape" in told:
        dim = told["sub_param_shape"].partition_dim
        parts = list(full.split(told["sub_param_shape"].shape[dim], dim))
    return torch.cat([part.chunk(tp, dim)[rank] for part in parts], dim)


# --- against DeepSpeed's own files ---------------------------------------------------------------


def test_the_files_are_deepspeeds(tmp_path: Path) -> None:
    """Every file, key, shape and bit of what ds_to_universal.py wrote of the same run."""
    reshard(DATA / "bf16_tp2", tmp_path / "mine", universal=True)
    mine, theirs = inside(tmp_path / "mine"), inside(genuine("told", tmp_path / "theirs"))
    names = [{str(p.relative_to(root)) for p in root.rglob("*.pt")} for root in (mine, theirs)]
    assert names[0] == names[1]
    assert len(names[0]) == 4 * 28 + 1 + 2
    for name in names[0]:
        assert list(differences(value(mine / name), value(theirs / name), name)) == []


@pytest.mark.parametrize("name", ["told", "untold"])
def test_genuine_ones_are_read(name: str, tmp_path: Path) -> None:
    """Told how ranks share parameters or not: the states are those of the run."""
    source = genuine(name, tmp_path / "universal")
    found, want = (open_checkpoint(str(path)) for path in (source, DATA / "bf16_tp2"))
    assert found.neox is not None
    assert (found.neox.tp, found.neox.pp, found.config.dtype) == (2, 1, "bfloat16")
    pairs = [(one, read_optimizer(one)) for one in (want, found)]
    assert compare_states(*pairs) == []
    assert pairs[0][1].groups == pairs[1][1].groups
    if name == "untold":  # nothing of the ranks is lost: also biases that they add up
        reshard(source, tmp_path / "new", dp=2)
        assert compared(tmp_path / "new", DATA / "bf16_tp2_dp2", ("global_samples", *RANDOM)) == []


def test_rows_of_padding_that_were_left_out(tmp_path: Path) -> None:
    """As with original_vocab_size: they come back as zeros, and it is told."""
    reshard(DATA / "fp32", tmp_path / "universal", universal=True)
    for path in inside(tmp_path / "universal").glob("zero/*.w*_embeddings.weight/*.pt"):
        cut(path)
    for path in inside(tmp_path / "universal").glob("zero/*.final_linear.weight/*.pt"):
        cut(path)
    plan, _ = reshard(tmp_path / "universal", tmp_path / "new")
    assert "padding-lost" in [finding.code for finding in plan.findings]
    old, new = logical(DATA / "fp32"), logical(tmp_path / "new")
    for key in old:
        for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
            assert same_bits(new[key][name][:45], old[key][name][:45])
            assert not new[key][name][45:].any()
            assert len(new[key][name]) == 48


def cut(path: Path) -> None:
    told = torch.load(path, weights_only=False)
    if path.name != "step.pt":
        torch.save({**told, "param": told["param"][:45].clone()}, path)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [{}, {"tp": 2, "pp": 2}, {"tp": 4, "pp": 0}], ids=str)
@pytest.mark.parametrize("source", ZERO, ids=lambda path: path.name)
def test_there_and_back(source: Path, target: dict[str, Any], tmp_path: Path) -> None:
    """All states; and every bit of every file where ranks hadn't biases of their own."""
    checkpoint = open_checkpoint(str(source))
    optimizer, state = read_optimizer(checkpoint), checkpoint.neox
    assert state is not None
    reshard(source, tmp_path / "there", **target, universal=True)
    there = open_checkpoint(str(tmp_path / "there"))
    assert compare_states((checkpoint, optimizer), (there, read_optimizer(there))) == []
    own = {"tp": state.tp, "pp": state.pp, "dp": optimizer.dp}
    reshard(tmp_path / "there", tmp_path / "back", **own, row_bias="split")
    if state.tp == 1:
        leave = ("make_vocab_size_divisible_by", *(RANDOM if state.pp == 2 and target else ()))
        assert compared(tmp_path / "back", source, leave) == []
    back = open_checkpoint(str(tmp_path / "back"))
    assert compare_states((checkpoint, optimizer), (back, read_optimizer(back))) == []


@pytest.mark.parametrize(
    ("family", "more", "tp"),
    [
        ("gpt_neox", {}, 2),
        ("gpt_neox", {"use_parallel_residual": False}, 4),
        ("llama", {"num_key_value_heads": 2}, 2),
        ("llama", {}, 4),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, 2),
        ("mamba", {}, 1),
    ],
)
def test_each_rank_gets_its_part(
    family: str, more: dict[str, Any], tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's way to cut the files gives each rank what reshard gives it."""
    known = SimpleNamespace(SubparamShape=type("SubparamShape", (), {}))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.checkpoint", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.checkpoint.universal_checkpoint", known)
    hf = make_hf(tmp_path / "hf", family=family, **more)
    convert(hf, tmp_path / "run", tp=1, optimizer="fresh")
    reshard(tmp_path / "run", tmp_path / "plain", tp=tp, row_bias="split")
    reshard(tmp_path / "run", tmp_path / "universal", tp=tp, universal=True)
    plain = read_optimizer(open_checkpoint(str(tmp_path / "plain")))
    zero, seen = inside(tmp_path / "universal") / "zero", set()
    for (rank, (layer, name)), shards in plain.shards.items():
        for key, file in ((MASTER, "fp32.pt"), ("exp_avg", "exp_avg.pt")):
            tied = zero / f"tied_modules.embed.{name}"
            path = (tied if tied.exists() else zero / f"{layer}.{name}") / file
            want = tensor(shards[key])
            assert same_bits(as_deepspeed_cuts(path, want.shape, tp, rank), want), path
            seen.add(path.parent.name)
    assert seen == {path.name for path in zero.iterdir() if path.is_dir()}


def test_biases_that_ranks_add_up(tmp_path: Path) -> None:
    """Each rank of the target gets a part of the sum, and the whole moments."""
    reshard(DATA / "bf16_tp2", tmp_path / "universal", tp=4, universal=True)
    want = logical(DATA / "bf16_tp2")
    for name, hf in zip(BIASES, ("attention.dense", "mlp.dense_4h_to_h"), strict=True):
        folder = inside(tmp_path / "universal") / "zero" / f"2.{name}"
        found = {key: torch.load(folder / f"{key}.pt") for key in ("fp32", "exp_avg")}
        assert all(set(told) == {"param"} for told in found.values())
        full = f"gpt_neox.layers.0.{hf}.bias"
        assert same_bits(found["fp32"]["param"] * 4, want["master"][full])
        assert same_bits(found["exp_avg"]["param"], want["exp_avg"][full])


# --- as a source ---------------------------------------------------------------------------------


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    run("reshard", DATA / "bf16_tp2_dp2", tmp_path / "universal", "--universal")
    return tmp_path / "universal"


def test_every_command_reads_it(universal: Path, tmp_path: Path) -> None:
    out = run("inspect", universal, "--optimizer")
    assert "global_step9_universal, iteration 9" in out
    assert "layout      DeepSpeed universal checkpoint, layers, TP 2, PP 1\n" in out
    assert "states      ZeRO 1, 2 data-parallel ranks: master, exp_avg, exp_avg_sq\n" in out
    out = run("diff", DATA / "bf16_tp2", universal, "--optimizer")
    assert out == "112 tensors: 112 equal, 0 different\n"
    run("verify", DATA / "bf16_tp2", inside(universal), "--optimizer")
    assert "unchanged since it was written" in run("verify", universal)
    for source, name in ((universal, "mine"), (DATA / "bf16_tp2_dp2", "want")):
        run("export-optimizer", source, tmp_path / name)
    exported = {*(tmp_path / "want").iterdir()} - {tmp_path / "want" / "neox_bridge.json"}
    for file in sorted(exported):  # the record names the source
        assert (tmp_path / "mine" / file.name).read_bytes() == file.read_bytes()
    run("convert", universal, tmp_path / "hf", "--weights", "masters")
    for name, found in hf_tensors(tmp_path / "hf").items():
        assert same_bits(found, logical(DATA / "bf16_tp2")["master"][name])


def test_doctor_says_that_it_isnt_for_it(universal: Path) -> None:
    out = " ".join(run("doctor", universal, code=4).split())
    assert "is a universal checkpoint of DeepSpeed" in out


def test_an_export_goes_back_into_it(universal: Path, tmp_path: Path) -> None:
    run("export-optimizer", universal, tmp_path / "moments")
    again = ("--universal", "--states", tmp_path / "moments")
    run("reshard", universal, tmp_path / "again", *again)
    pairs: list[tuple[Checkpoint, Any]] = []
    for path in (universal, tmp_path / "again"):
        checkpoint = open_checkpoint(str(path))
        pairs.append((checkpoint, read_optimizer(checkpoint)))
    assert compare_states(*pairs) == []


def test_the_yml_says_how_it_is_loaded(universal: Path, tmp_path: Path) -> None:
    """And that of an ordinary checkpoint made of it doesn't any more."""
    told = yaml.safe_load((universal / "resume_universal.yml").read_text())
    assert told["checkpoint"] == {"load_universal": True}
    run("reshard", universal, tmp_path / "new")
    told = yaml.safe_load((tmp_path / "new" / "resume.yml").read_text())
    assert told["checkpoint"] == {"load_universal": False}
    assert (tmp_path / "new" / "latest").read_text() == "global_step9"
    names = list((tmp_path / "new").rglob("mp_rank*"))
    assert all("universal_checkpoint_info" not in value(path) for path in names)


def test_into_a_run(tmp_path: Path) -> None:
    """Beside the step that it is of, as DeepSpeed has it; ``latest`` still names that one."""
    shutil.copytree(DATA / "fp32", tmp_path / "run")
    (tmp_path / "run" / "latest_universal").write_text("global_step2_universal")
    run("reshard", tmp_path / "run", tmp_path / "run", "--universal")
    assert (tmp_path / "run" / "latest").read_text() == "global_step4"
    assert inside(tmp_path / "run").name == "global_step4_universal"
    assert (tmp_path / "run" / "resume_universal.yml").exists()
    (tmp_path / "run" / "latest").unlink()
    shutil.rmtree(tmp_path / "run" / "global_step4")
    for step in ((), ("--step", "4")):
        assert "_universal" in run("inspect", tmp_path / "run", *step)


def test_in_a_store() -> None:
    url = "memory://universal/run"
    run("reshard", DATA / "bf16_tp2", url, "--universal")
    out = run("diff", DATA / "bf16_tp2", url, "--optimizer")
    assert out == "112 tensors: 112 equal, 0 different\n"


# --- what is wrong with one ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("rm zero/2.input_layernorm.bias/exp_avg.pt", "exp_avg.pt is missing"),
        ("rm zero/2.input_layernorm.bias", "2.input_layernorm.bias is not in both"),
        ("rm zero/2.input_layernorm.bias/step.pt", "not all parameters have the same step"),
        ("cp zero/optimizer_state.pt zero/5.norm.bias/fp32.pt", "param is missing"),
        ("cp zero/5.norm.bias/fp32.pt zero/optimizer_state.pt", "contains no param_groups"),
        ("rm mp_rank_01_model_states.pt", "1 mp_rank file, of 2 tensor-parallel ranks"),
        (
            "cp zero/2.mlp.linear1.bias/fp32.pt zero/5.norm.bias/exp_avg.pt",
            "another. The files may",
        ),
    ],
)
def test_damaged_ones(damage: str, words: str, universal: Path) -> None:
    verb, *names = damage.split()
    paths = [inside(universal) / name for name in names]
    if verb == "cp":
        shutil.copy(*paths)
    elif paths[0].is_dir():
        shutil.rmtree(paths[0])
    else:
        paths[0].unlink()
    out = " ".join(run("inspect", universal, "--optimizer", code=1).split())
    assert words in out


def test_steps_that_differ(universal: Path) -> None:
    path = inside(universal) / "zero" / "5.norm.bias" / "step.pt"
    torch.save(torch.tensor(8.0), path)
    with pytest.raises(BridgeError, match=re.escape(f"{path}: not all parameters have the same")):
        read_optimizer(open_checkpoint(str(universal)))


def test_the_plan_says_it() -> None:
    out = run("reshard", DATA / "fp32", "new", "--universal", "--dry-run", "--json")
    told = json.loads(out)
    Draft202012Validator(plan_schema()).validate(told)
    assert told["target"]["universal"] is True
    assert "load-universal" in [finding["code"] for finding in told["findings"]]
