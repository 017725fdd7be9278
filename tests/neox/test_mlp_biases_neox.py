"""Which trees run a gated MLP with biases and without, as frameworks/eras.py says."""

from pathlib import Path

import pytest
import real_neox
from common import convert, make_hf

from neox_bridge.frameworks.eras import era_named, mlp_biases

pytestmark = pytest.mark.neox
TREES = {"2024-10": "neox-2024-10", "today": "gpt-neox"}
WORDS = {"silu": "swiglu", "gelu": "geglu"}
ERRORS = {True: "AssertionError", False: "has no attribute 'expand_as'"}


@pytest.mark.parametrize("tree", TREES)
def test_runs_what_the_era_says(tree: str, neox_python: str, tmp_path: Path) -> None:
    """Those that it cannot run are written for today's GPT-NeoX, whose settings it knows."""
    jobs, cases = [], []
    for activation in WORDS:
        for biases in (False, True):
            name = f"{activation}-{biases}"
            hf = make_hf(
                tmp_path / f"hf-{name}", family="llama", hidden_act=activation, mlp_bias=biases
            )
            real_neox.with_tokenizer(hf)
            rule = era_named(tree).gated_biases
            wanted = mlp_biases(rule, WORDS[activation], gated=True, parallel=False)
            runs = wanted == "optional" or (wanted == "required") == biases
            era = era_named(tree if runs else "today")
            convert(hf, tmp_path / name, era=era)
            yml, logits = str(tmp_path / name / "finetune.yml"), str(tmp_path / f"{name}.npz")
            jobs.append({"yml": yml, "logits": logits})
            cases.append((hf, logits, biases, runs))
    errors = real_neox.run(neox_python, TREES[tree], 1, jobs, tmp_path)
    assert [error is None for error in errors] == [runs for *_, runs in cases]
    for error, (hf, logits, biases, runs) in zip(errors, cases, strict=True):
        if runs:  # 1e-3: RMSNorm has its epsilon elsewhere before 4c9f1081
            assert real_neox.agree(Path(logits), hf) <= (1e-5 if tree == "today" else 1e-3)
        else:
            assert ERRORS[biases] in str(error)


def test_a_plain_mlp_without_biases(neox_python: str, tmp_path: Path) -> None:
    """No tree runs it, so none is written."""
    hf = real_neox.with_tokenizer(make_hf(tmp_path / "hf"))
    convert(hf, tmp_path / "neox")
    job = {
        "yml": str(tmp_path / "neox" / "finetune.yml"),
        "set": {"use_bias_in_mlp": False, "load": None},
        "logits": str(tmp_path / "x.npz"),
    }
    (error,) = real_neox.run(neox_python, TREES["today"], 1, [job], tmp_path)
    assert error is not None
    assert "unsupported operand type(s) for +: 'Tensor' and 'NoneType'" in error
