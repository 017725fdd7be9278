"""``export-optimizer``: states under Hugging Face names, and back into a run."""

import json
import shutil
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from common import FIXTURES, assert_same
from resharding import DATA, SOURCES, compared, logical, rewritten
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.optimizer.read_files import read_optimizer


def run(*command: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_state_there_and_back(source: Path, tmp_path: Path) -> None:
    new, back = tmp_path / "new", tmp_path / "back"
    assert "verified bit by bit" in run("export-optimizer", str(source), str(new))
    want = logical(source)
    told = json.loads((new / "optimizer.json").read_text())
    assert told["states"] == list(want)
    assert sorted(path.stem for path in new.glob("*.safetensors")) == sorted(want)
    for key, tensors in want.items():
        assert_same(load_file(new / f"{key}.safetensors"), tensors)
    state = open_checkpoint(str(source)).neox
    assert state is not None
    # the states are whole, so that also at an unchanged TP their biases are divided anew
    divided = ["--row-bias", "split"] if state.tp > 1 else []
    run("reshard", str(source), str(back), "--states", str(new), *divided)
    assert compared(back, source, ("make_vocab_size_divisible_by",)) == []


def test_what_is_told_of_it(tmp_path: Path) -> None:
    source = FIXTURES / "pythia_fp16_pp1_tp1" / "checkpoints"
    run("export-optimizer", str(source), str(tmp_path / "new"))
    told = json.loads((tmp_path / "new" / "optimizer.json").read_text())
    decay, still = told["groups"]
    assert (told["iteration"], decay["state"]["step"], still["weight_decay"]) == (8, 8.0, 0.0)
    assert told["loss_scaler"]["cur_scale"] == 256
    assert told["lr_scheduler"]["num_iters"] == 8
    model = open_checkpoint(str(source)).tensors
    assert sorted(decay["tensors"] + still["tensors"]) == sorted(model)
    assert all(len(model[name].shape) == 2 for name in decay["tensors"])


def test_what_was_changed_comes_back(tmp_path: Path) -> None:
    """Masters that were edited are the new weights, rounded; moments are where they belong."""
    new, back = tmp_path / "new", tmp_path / "back"
    run("export-optimizer", str(DATA / "bf16_tp2_dp2"), str(new))
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    for key, factor in (("master", 1.5), ("exp_avg", -2.0)):
        tensors = load_file(new / f"{key}.safetensors")
        tensors[name] *= factor
        save_file(tensors, new / f"{key}.safetensors")
    run("reshard", str(DATA / "bf16_tp2_dp2"), str(back), "--states", str(new), "--tp", "1")
    before, after = logical(DATA / "bf16_tp2_dp2"), logical(back)
    for key, factor in (("master", 1.5), ("exp_avg", -2.0), ("exp_avg_sq", 1.0)):
        before[key][name] *= factor
        assert_same(after[key], before[key])
    hf = tmp_path / "hf"
    run("convert", str(back), str(hf))
    stored = load_file(hf / "model.safetensors")[name]
    assert_same({name: stored}, {name: after["master"][name].bfloat16()})


def test_what_cannot_be(tmp_path: Path) -> None:
    new = tmp_path / "new"
    run("export-optimizer", str(DATA / "fp32"), str(new))
    other = str(FIXTURES / "pythia_fp16_pp1_tp1" / "checkpoints")
    out = run("reshard", other, str(tmp_path / "x"), "--states", str(new), code=1)
    assert "has the shape" in out
    assert "another model" in out
    stage0 = str(DATA / "fp32_stage0")
    out = run("reshard", stage0, str(tmp_path / "x"), "--states", str(new), code=1)
    assert "has the states master, exp_avg, exp_avg_sq, and the optimizer of" in out
    (new / "exp_avg.safetensors").unlink()
    out = run("reshard", str(DATA / "fp32"), str(tmp_path / "x"), "--states", str(new), code=1)
    assert "exp_avg.safetensors is missing" in out
    told = json.loads((new / "optimizer.json").read_text())
    (new / "optimizer.json").write_text(json.dumps({**told, "states": ["../../exp_avg"]}))
    out = run("reshard", str(DATA / "fp32"), str(tmp_path / "x"), "--states", str(new), code=1)
    assert "was not written by export-optimizer" in out
    assert not (tmp_path / "x").exists()


def test_a_state_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    """States' names come from a pickle and become names of files."""
    shutil.copytree(DATA / "fp32_stage0", tmp_path / "old")
    path = next((tmp_path / "old").glob("*/mp_rank_00_model_states.pt"))

    def evil(value: Any) -> None:
        for entry in value["optimizer"]["state"].values():
            entry["../../evil"] = entry["exp_avg"]

    rewritten(path, evil)
    with pytest.raises(Refused, match=r"'../../evil' is not a valid name of an optimizer state"):
        read_optimizer(open_checkpoint(str(tmp_path / "old")))


@pytest.mark.parametrize("command", ["export-optimizer", "reshard"])
def test_plans_fit_the_schema(command: str, tmp_path: Path) -> None:
    out = run(command, str(DATA / "fp32"), str(tmp_path / "x"), "--dry-run", "--json")
    text = resources("neox_bridge.planning").joinpath("plan.schema.json").read_text()
    jsonschema.validate(json.loads(out), json.loads(text))
    assert "parameters" in run(command, str(DATA / "fp32"), str(tmp_path / "x"), "--dry-run")


def test_an_export_has_a_sealed_record(tmp_path: Path) -> None:
    """``verify DST`` reads every file and names what is not as it was written."""
    new = tmp_path / "new"
    run("export-optimizer", str(DATA / "fp32"), str(new))
    assert "unchanged since it was written" in run("verify", str(new))
    record = json.loads((new / "neox_bridge.json").read_text())
    assert record["optimizer"] == ["master", "exp_avg", "exp_avg_sq"]
    assert sorted(record["written"]["files"]) == [
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "master.safetensors",
        "optimizer.json",
    ]
    for name in [*record["written"]["files"], "neox_bridge.json"]:
        whole = (new / name).read_bytes()
        (new / name).write_bytes(whole[:-2] + b" " + whole[-1:])
        assert f"changed: {name}" in run("verify", str(new), code=3)
        (new / name).write_bytes(whole)
    (new / "exp_avg.safetensors").rename(new / "moved")
    assert "missing: exp_avg.safetensors" in run("verify", str(new), code=3)
    (new / "moved").rename(new / "exp_avg.safetensors")
    run("verify", str(new))
