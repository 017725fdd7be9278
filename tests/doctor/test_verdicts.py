"""Exit codes and verdicts of the commands that judge, on both sides of what decides them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from common import FIXTURES, convert, fixture, make_hf, step_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Unverified
from neox_bridge.verification import audit as audit_module
from neox_bridge.verification.verify import checker

RUNNER = CliRunner()


def call(*arguments: object) -> tuple[int, str]:
    """The exit code, and what came on stdout."""
    done = RUNNER.invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout


def call_json(*arguments: object) -> tuple[int, Any]:
    code, out = call(*arguments, "--json")
    return code, json.loads(out)


# --- verify --logits: recorded logits


def recording(name: str, path: Path, off: float) -> Path:
    """A fixture's recorded logits, one of them off by a share of the largest."""
    with np.load(FIXTURES / name / "logits.npz") as file:
        tokens, logits = file["tokens"], file["logits"].copy()
    at = np.unravel_index(np.argmin(np.abs(logits)), logits.shape)
    logits[at] += off * np.abs(logits).max()
    np.savez(path, tokens=tokens, logits=logits)
    return path


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [("pythia_fp32_pp1_tp2", 0.9e-5, 1.2e-5), ("pythia_fp16_pp1_tp1", 0.017, 0.023)],
    ids=["fp32", "fp16"],
)
def test_recorded_logits_are_another_models_beyond_the_tolerance(
    name: str, inside: float, outside: float, tmp_path: Path
) -> None:
    """The weights are equal all the same; only the recording decides."""
    convert(fixture(name), tmp_path / "hf")
    words = ("verify", fixture(name), tmp_path / "hf", "--logits", "--tokens")
    code, told = call_json(*words, recording(name, tmp_path / "in.npz", inside))
    assert (code, told["holds"], told["recorded"]["agrees"]) == (0, True, True)
    code, told = call_json(*words, recording(name, tmp_path / "out.npz", outside))
    assert (code, told["holds"], told["recorded"]["agrees"]) == (3, False, False)
    assert told["logits"]["agrees"] is True
    assert told["differences"] == []


# --- diff


def test_diff_of_different_checkpoints_ends_with_3_in_json_too(tmp_path: Path) -> None:
    one = make_hf(tmp_path / "one")
    two = make_hf(tmp_path / "two", seed=1)
    code, told = call_json("diff", one, one)
    assert (code, told["equal"]) == (0, True)
    assert all(tensor["kind"] == "equal" for tensor in told["tensors"])
    code, told = call_json("diff", one, two)
    assert (code, told["equal"]) == (3, False)
    assert any(tensor["kind"] == "values" for tensor in told["tensors"])
    assert call("diff", one, two, "--stat")[0] == 3
    assert call("diff", one, two, "--quiet") == (3, "")


# --- verify DST


def test_verify_alone_says_in_json_what_does_not_hold(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf"), tmp_path / "neox")
    code, told = call_json("verify", tmp_path / "neox")
    assert (code, told["holds"], told["changes"]) == (0, True, [])
    (victim,) = step_of(tmp_path / "neox").glob("layer_03*")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    code, told = call_json("verify", tmp_path / "neox")
    assert (code, told["holds"]) == (3, False)
    assert told["changes"] == [{"path": victim.name, "kind": "changed"}]


# --- audit


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BridgeError("It ended.")])
def test_a_step_whose_weights_cannot_be_read_is_an_error_of_the_audit(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint opens, and its disk fails when the weights are read."""
    hf = make_hf(tmp_path / "hf")
    for step in (1, 2, 3):
        convert(hf, tmp_path / "run", iteration=step, layout="ranks")
        tensors = load_file(hf / "model.safetensors")
        changed = {name: tensor + 0.001 for name, tensor in tensors.items()}
        save_file(changed, hf / "model.safetensors", {"format": "pt"})
    words = ("audit", tmp_path / "run", "--cache", "none")
    assert call(*words)[0] == 0
    real = audit_module.read_step

    def read_step(run: str, place: Any, *args: Any, **more: Any) -> Any:
        if place.number == 2:
            raise error
        return real(run, place, *args, **more)

    monkeypatch.setattr(audit_module, "read_step", read_step)
    code, told = call_json(*words)
    assert code == 3
    (fault,) = [fault for fault in told["findings"] if fault["severity"] == "error"]
    assert (fault["code"], fault["steps"]) == ("unreadable", ["2"])
    assert call(*words)[0] == 3


# --- convert's own check


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_divided_bias_that_is_not_finite_on_one_rank_is_found(
    value: float, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=2, row_bias="split")
    check = checker(open_checkpoint(str(hf)))
    check(str(tmp_path / "neox"))
    path = step_of(tmp_path / "neox") / "layer_02-model_01-model_states.pt"
    state = torch.load(path, weights_only=False)
    state["attention.dense.bias"][0] = value
    torch.save(state, path)
    with pytest.raises(Unverified, match=r"attention\.dense\.bias"):
        check(str(tmp_path / "neox"))
    code, told = call_json("verify", hf, tmp_path / "neox")
    assert (code, told["holds"]) == (3, False)


# --- failures


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("convert", "missing", "out"), 1),
        (("verify", "missing", "hf"), 1),
        (("verify", "hf"), 1),
        (("diff", "hf", "missing"), 1),
        (("convert", "hf", "out", "--to", "hf", "--tp", "2"), 2),
        (("convert", "hf", "out", "--tp", "5"), 4),
    ],
)
def test_a_failure_prints_no_half_json(
    words: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing on stdout, or one whole JSON value; the exit code is that of the plain command."""
    make_hf(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    plain = RUNNER.invoke(app, [*words])
    done = RUNNER.invoke(app, [*words, "--json"])
    assert (plain.exit_code, done.exit_code) == (code, code), done.output
    assert "error" in done.stderr
    if done.stdout:
        json.loads(done.stdout)
    assert not (tmp_path / "out").exists()
