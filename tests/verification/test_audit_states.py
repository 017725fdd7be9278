"""``audit --optimizer`` finds what is wrong with states, and nothing in a run that is right."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from resharding import DATA, data, write

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.tensors.tensor_ref import TensorRef

STEPS = (10, 20, 30, 40, 50, 60)
MOMENT = "exp_avg_sq: gpt_neox.layers.0.attention.dense.bias"


def audit(folder: Path, *more: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["audit", str(folder), "--json", "--cache", "none", *more])
    assert done.exit_code in (0, 3), done.output
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def wrong(told: dict[str, Any]) -> list[tuple[str, list[str]]]:
    found = [f for f in told["findings"] if f["severity"] != "info"]
    return [(f["code"], f["steps"]) for f in found]


def refs(value: Any) -> list[TensorRef]:
    if isinstance(value, TensorRef):
        return [value]
    entries = value.values() if isinstance(value, dict) else value
    return [r for v in entries for r in refs(v)] if isinstance(value, dict | list) else []


def times(ref: TensorRef, factor: float) -> None:
    values = np.frombuffer(data(ref), np.float32)
    write(ref, (values * np.float32(factor)).tobytes())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A genuine checkpoint as if its weights had grown slowly; moments change as they like."""
    (tmp_path / "run").mkdir()
    for number in STEPS:
        step = tmp_path / "run" / f"global_step{number}"
        shutil.copytree(DATA / "fp32_pp0_dp2" / "global_step4", step)
        path = step / "mp_rank_00_model_states.pt"
        told = torch.load(path, weights_only=False)
        torch.save({**told, "iteration": number, "global_steps": number}, path)
        value: Any = read_torch(str(path))
        grown = 1 + number / 1000
        for ref in refs(value["module"]):
            times(ref, grown)
        for file in step.glob("*optim_states.pt"):
            value = read_torch(str(file))
            inner = value["optimizer_state_dict"]
            for ref in refs(inner["single_partition_of_fp32_groups"]):
                times(ref, grown)
            for group in inner["base_optimizer_state"]["state"].values():
                write(group["step"], np.float32(number).tobytes())
                for key in ("exp_avg", "exp_avg_sq"):
                    times(group[key], 1000 if number == 40 else grown)
    return tmp_path / "run"


def test_a_run_that_is_right(trained: Path) -> None:
    told = audit(trained, "--optimizer")
    assert wrong(told) == []
    first = told["steps"][0]
    assert first["optimizer"]["updates"] == [10, 10]
    states = first["optimizer"]["states"]
    assert len(states) == 3 * len(first["tensors"])
    assert (
        states["master: embed_out.weight"]["norm"] == first["tensors"]["embed_out.weight"]["norm"]
    )
    assert "optimizer" not in audit(trained)["steps"][0]


def test_a_moment_that_isnt_a_number(trained: Path) -> None:
    optimizer = read_optimizer(open_checkpoint(str(trained / "global_step30")))
    ref = optimizer.shards[0, (2, "attention.dense.bias")]["exp_avg_sq"].pieces[0].source
    assert ref is not None
    write(ref, np.float32("inf").tobytes())
    told = audit(trained, "--optimizer")
    assert wrong(told) == [("not-finite", ["30"])]
    assert told["findings"][0]["tensors"] == [MOMENT]
    assert "the optimizer: step 30 has NaN or infinite values" in told["findings"][0]["message"]
    assert wrong(audit(trained)) == []


def test_files_of_another_step(trained: Path) -> None:
    """All of them: the masters aren't the weights, the count isn't the step's."""
    for file in (trained / "global_step20").glob("*optim_states.pt"):
        shutil.copy(file, trained / "global_step50" / file.name)
    found = wrong(audit(trained, "--optimizer"))
    assert ("identical-steps", ["20", "50"]) in found
    assert ("other-masters", ["50"]) in found
    assert ("other-count", ["50"]) in found
    assert wrong(audit(trained)) == []


def test_one_rank_of_another_step(trained: Path) -> None:
    """The ranks' counts differ, so that they can't be of one save."""
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(trained / "global_step20" / name, trained / "global_step50" / name)
    told = audit(trained, "--optimizer")
    assert wrong(told) == [("no-states", ["50"])]
    assert "differs between ranks" in told["findings"][0]["message"]


def test_a_partition_that_is_missing(trained: Path) -> None:
    (trained / "global_step40" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    told = audit(trained, "--optimizer")
    assert wrong(told) == [("no-states", ["40"])]
    assert len(told["steps"]) == len(STEPS)  # its weights are looked at


def test_steps_without_an_optimizer(trained: Path) -> None:
    """As where only the newest keeps it: no fault."""
    for file in (trained / "global_step40").glob("*optim_states.pt"):
        file.unlink()
    assert wrong(audit(trained, "--optimizer")) == []


def test_masters_that_jump(trained: Path) -> None:
    """In a tensor whose weights don't: both it and that they differ are said."""
    optimizer = read_optimizer(open_checkpoint(str(trained / "global_step40")))
    for piece in optimizer.shards[0, (2, "mlp.linear1.weight")]["master"].pieces:
        assert piece.source is not None
        times(piece.source, 3)
    found = wrong(audit(trained, "--optimizer"))
    assert found == [("other-masters", ["40"]), ("norm-jump", ["40"])]


def test_groups_that_count_apart(trained: Path) -> None:
    for file in (trained / "global_step60").glob("*optim_states.pt"):
        value: Any = read_torch(str(file))
        states = value["optimizer_state_dict"]["base_optimizer_state"]["state"]
        write(states[1]["step"], np.float32(59).tobytes())
    assert wrong(audit(trained, "--optimizer")) == [("other-count", ["60"])]
