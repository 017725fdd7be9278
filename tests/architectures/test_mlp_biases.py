"""Which GPT-NeoX trees run an MLP with biases, and which run it without.

tests/neox/test_mlp_biases_neox.py runs every pair in the real trees.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from common import assert_same, convert, fixture, hf_tensors, make_hf, neox_config, plan_of

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.doctor.diagnose import judge
from neox_bridge.errors import Refused
from neox_bridge.frameworks.eras import LATER_ERAS, era_named, mlp_biases
from neox_bridge.frameworks.targets import target_named

# activation and biases of a Llama, and the eras that can run it
RUNS: dict[tuple[str, bool], set[str]] = {
    ("silu", False): {"2024-03", "2024-09", "2024-10", "today"},
    ("silu", True): {"today"},
    ("gelu", False): {"2024-03", "2024-09", "today"},
    ("gelu", True): {"2024-10", "today"},
    ("relu", False): {"2024-03", "2024-09", "today"},
    ("relu", True): {"2024-10", "today"},
    ("sigmoid", False): {"today"},
    ("sigmoid", True): {"2024-10", "today"},
    ("linear", False): {"today"},
    ("linear", True): {"2024-10", "today"},
}


@pytest.mark.parametrize("era", [era.name for era in LATER_ERAS])
@pytest.mark.parametrize(("activation", "biases"), RUNS)
def test_written_where_it_runs(activation: str, biases: bool, era: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", hidden_act=activation, mlp_bias=biases)
    if era not in RUNS[activation, biases]:
        with pytest.raises(Refused, match="Use `era=today`") as caught:
            plan_of(hf, tmp_path / "neox", era=era_named(era))
        assert caught.value.exit_code == 4
        convert(hf, tmp_path / "neox", era=era_named("today"))  # what the message advises
        return
    convert(hf, tmp_path / "neox", era=era_named(era))
    assert neox_config(tmp_path / "neox").get("use_bias_in_mlp", False) is biases
    assert judge(open_checkpoint(str(tmp_path / "neox")), target_named(f"neox@{era}")).answer != (
        "fails"
    )
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))


@pytest.mark.parametrize(
    ("activation", "biases", "error"),
    [
        ("gelu", False, "AttributeError: 'NoneType' object has no attribute 'expand_as'"),
        ("silu", True, "AssertionError"),
    ],
)
def test_doctor_names_what_ends_in_the_first_forward_pass(
    activation: str, biases: bool, error: str, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", hidden_act=activation, mlp_bias=biases)
    convert(hf, tmp_path / "neox")
    root = str(tmp_path / "neox")
    verdicts = {
        day: judge(open_checkpoint(root), target_named(f"neox@{day}"))
        for day in ("2024-10-01", "2024-11-20", "2024-11-28", "today")
    }
    failing = {day for day, found in verdicts.items() if found.answer == "fails"}
    assert failing == {"2024-10-01", "2024-11-20"}
    assert verdicts["2024-11-20"].message == error
    done = CliRunner().invoke(app, ["doctor", root, "--for", "neox@2024-10"])
    assert done.exit_code == 4
    assert error in done.output
    assert "f5325805" in done.output
    assert CliRunner().invoke(app, ["doctor", root, "--for", "neox@f5325805"]).exit_code == 0


def test_a_plain_mlp_without_biases_runs_nowhere(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf"), tmp_path / "neox")
    whole = open_checkpoint(str(tmp_path / "neox"))
    kept = {k: v for k, v in whole.tensors.items() if ".mlp." not in k or "weight" in k}
    config = replace(whole.config, mlp_bias=False)
    bare = replace(whole, config=config, tensors=kept, raw={**whole.raw, "use_bias_in_mlp": False})
    for era in LATER_ERAS:
        found = judge(bare, target_named(f"neox@{era.name}"))
        assert found.answer == "fails"
    assert found.message == "TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'"


@pytest.mark.parametrize(
    ("rule", "activation", "how", "wanted"),
    [
        ("none", "swiglu", {}, "none"),
        ("none", "gelu", {"gated": False}, "required"),
        ("by activation", "swiglu", {}, "none"),
        ("by activation", "reglu", {}, "required"),
        ("by activation", "bilinear", {}, "required"),
        ("by activation", "glu", {}, "required"),
        ("by activation", "swiglu", {"parallel": True}, "optional"),
        ("by activation", "geglu", {"parallel": True}, "optional"),
        ("optional", "glu", {}, "optional"),
        ("optional", "relu", {"gated": False}, "required"),
    ],
)
def test_the_rule(rule: Any, activation: str, how: dict[str, bool], wanted: str) -> None:
    settings = {"gated": True, "parallel": False, **how}
    assert mlp_biases(rule, activation, **settings) == wanted


def test_an_old_llama_loads_in_its_own_tree() -> None:
    found = judge(
        open_checkpoint(str(fixture("llama_fp32_2024_09_w123_tp2"))), target_named("neox@2024-09")
    )
    assert found.answer != "fails"


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"family": "llama", "hidden_act": "gelu"}, "use_bias_in_mlp"),
        ({"family": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"family": "llama", "hidden_act": "gelu", "mlp_bias": True}, ""),
    ],
)
def test_doctor_advises_only_a_conversion_that_works(
    config: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", **config)
    done = CliRunner().invoke(app, ["doctor", str(hf), "--for", "neox@2024-10"])
    assert done.exit_code == 4
    command = f"neox-bridge convert {hf} {hf}-neox --for neox@2024-10"
    assert (command in done.output) == (not refused)
    assert refused in done.output
    advised = CliRunner().invoke(app, command.split()[1:])
    assert advised.exit_code == (4 if refused else 0)
