"""What a plan says of a model of a few hundred numbers."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_edits import set_keys
from common import step_of
from resharding import rewritten
from tiny import convert, plan_of, write_hf

from neox_bridge.errors import Refused, UsageError
from neox_bridge.findings import Finding
from neox_bridge.frameworks.eras import era_named
from neox_bridge.planning.plan import Plan


def finding(plan: Plan, code: str) -> Finding:
    (one,) = [one for one in plan.findings if one.code == code]
    return one


@pytest.mark.parametrize(("name", "least"), [("tp", 1), ("pp", 0), ("iteration", 0)])
def test_numbers_that_are_too_small(name: str, least: int, tmp_path: Path) -> None:
    """Also 0, which would otherwise mean the same as no number."""
    hf = write_hf(tmp_path / "hf")
    plan_of(hf, tmp_path / "out", **{name: least})
    with pytest.raises(UsageError, match=f"must be {least} or more, not {least - 1}") as raised:
        plan_of(hf, tmp_path / "out", **{name: least - 1})
    assert raised.value.parameters == (name,)


def test_a_target_whose_path_is_not_utf8(tmp_path: Path) -> None:
    plan = plan_of(write_hf(tmp_path / "hf"), tmp_path / os.fsdecode(b"run\xff"))
    message = finding(plan, "path-not-utf8").message
    assert "cannot be written into finetune.yml. vocab_file, load, save are not filled" in message


def test_biases_that_only_transformers_has(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", use_parallel_residual=False)
    run = convert(hf, tmp_path / "run")

    def without_biases(layer: Any) -> None:
        for name in ("mlp.linear1.bias", "mlp.linear2.bias"):
            del layer[name]

    rewritten(step_of(run) / "layer_02-model_00-model_states.pt", without_biases)
    set_keys(step_of(run), use_bias_in_mlp=False)
    plan = plan_of(run, tmp_path / "back")
    assert finding(plan, "biases-added").message.startswith("the source does not contain 2 biases")


def test_a_new_optimizer_for_v1(tmp_path: Path) -> None:
    block = "gpt_neox.layers.0.mlp."
    wide = {f"{block}dense_h_to_4h.weight": np.ones((32, 8), "f4")}
    wide |= {f"{block}dense_h_to_4h.bias": np.ones(32, "f4")}
    wide |= {f"{block}dense_4h_to_h.weight": np.ones((8, 32), "f4")}
    hf = write_hf(tmp_path / "hf", changed=wide, intermediate_size=32)
    era = era_named("v1.0")
    plan_of(hf, tmp_path / "out", era=era)
    with pytest.raises(Refused, match="`optimizer=fresh`: new optimizer states cannot be written"):
        plan_of(hf, tmp_path / "out", era=era, optimizer="fresh")
