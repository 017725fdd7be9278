"""``inspect``, ``diff`` and ``verify`` see optimizer states like weights, with ``--optimizer``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from common import FIXTURES
from resharding import DATA, reshard, write

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.optimizer.read_files import read_optimizer

MOMENT = "exp_avg_sq: gpt_neox.layers.0.post_attention_layernorm.weight"


def run(*command: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A run on four data-parallel ranks, with one moment on tensor-parallel rank 0 made NaN."""
    reshard(DATA / "bf16_tp2_dp2", tmp_path / "run", dp=4)
    optimizer = read_optimizer(open_checkpoint(str(tmp_path / "run")))
    whole = optimizer.shards[0, (2, "post_attention_layernorm.weight")]["exp_avg_sq"]
    assert len(whole.pieces) == 2  # a boundary cuts it
    assert whole.pieces[1].source is not None
    write(whole.pieces[1].source, np.float32("nan").tobytes())
    return tmp_path / "run"


def test_diff(changed: Path) -> None:
    """Two layouts of one run are equal; a value that isn't is found and named."""
    out = run("diff", str(DATA / "bf16_tp2_dp2"), str(DATA / "bf16_tp2"), "--optimizer")
    assert out == "112 tensors: 112 equal, 0 different\n"
    found = json.loads(
        run("diff", str(DATA / "bf16_tp2"), str(changed), "--optimizer", "--json", code=3)
    )
    apart: list[dict[str, Any]] = [t for t in found["tensors"] if t["kind"] != "equal"]
    assert [(t["name"], t["differing"]) for t in apart] == [(MOMENT, 1)]
    assert run("diff", str(DATA / "bf16_tp2"), str(changed)).endswith("28 equal, 0 different\n")


def test_verify(changed: Path) -> None:
    assert "112 tensors" in run("verify", str(DATA / "fp32"), str(DATA / "fp32"), "--optimizer")
    out = run("verify", str(DATA / "bf16_tp2"), str(changed), "--optimizer", code=3)
    assert MOMENT in out
    run("verify", str(DATA / "bf16_tp2"), str(changed))


def test_weights_of_an_fp32_run_without_zero_are_its_masters(tmp_path: Path) -> None:
    reshard(DATA / "fp32_stage0", tmp_path / "one", zero=1)
    for sides in (("fp32_stage0", "one"), ("one", "fp32_stage0")):
        paths = [str(tmp_path / s if s == "one" else DATA / s) for s in sides]
        assert "equal, bit by bit" in run("verify", *paths, "--optimizer")


def test_inspect(changed: Path) -> None:
    out = run("inspect", str(DATA / "bf16_tp2_dp2"), "--optimizer")
    assert "states      ZeRO 1, 2 data-parallel ranks: master, exp_avg, exp_avg_sq\n" in out
    assert "weight_decay_params: 10 tensors, lr 0.002954, weight_decay 0.1, step 9\n" in out
    told = json.loads(run("inspect", str(changed), "--optimizer", "--stats", "--json"))
    assert told["optimizer"]["groups"][0]["state"] == {"step": 9.0}
    nan = [finding for finding in told["findings"] if finding["code"] == "nan-values"]
    assert len(nan) == 1
    assert f"{MOMENT} (1 of 16)" in nan[0]["message"]
    names = {entry["name"] for entry in told["stats"]}
    assert {"master: embed_out.weight", "embed_out.weight", MOMENT} <= names
    padding = {e["name"]: e["padding_rows"] for e in told["stats"] if "embed_in" in e["name"]}
    assert padding["exp_avg: gpt_neox.embed_in.weight"] == 3


def test_moments_of_zero_are_no_fault(tmp_path: Path) -> None:
    run(
        "convert", str(DATA / "fp32"), str(tmp_path / "new"), "--to", "neox", "--optimizer", "fresh"
    )
    told = json.loads(run("inspect", str(tmp_path / "new"), "--optimizer", "--stats", "--json"))
    assert "all-zero" not in [finding["code"] for finding in told["findings"]]


def test_no_optimizer() -> None:
    source = str(FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints")
    done = CliRunner().invoke(app, ["inspect", source, "--optimizer"])
    assert done.exit_code == 1
    assert "contains no optimizer states" in done.output
    assert done.output.rstrip().endswith("Leave out --optimizer.")
