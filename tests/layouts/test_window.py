"""sliding_window_width means what GPT-NeoX computes with it, which depends on the layout.

With pipe_parallel_size: 0 its own attention has no window; flash-attn's has.
tests/neox/test_window_neox.py runs the real GPT-NeoX.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_edits import set_keys
from click.testing import CliRunner
from common import FIXTURES, convert, fixture, hf_logits, make_hf, neox_config, plan_of, step_of
from resharding import DATA, reshard

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.layouts.window import windowed_layers
from neox_bridge.verification.logits import compare_logits
from neox_bridge.verification.tokens import read_tokens
from neox_bridge.verification.verify import verify

WIDTH = "sliding_window_width"
FLASH = [[["flash"], 2]]
MIXED = [[["global", "flash"], 1]]


def run_with(tmp_path: Path, layout: str, family: str = "llama", **settings: Any) -> Path:
    """A GPT-NeoX checkpoint whose yml says these settings besides its own."""
    convert(make_hf(tmp_path / "source", family=family), tmp_path / "run", layout=layout)
    set_keys(step_of(tmp_path / "run"), **settings)
    return tmp_path / "run"


def codes(root: Path) -> set[str]:
    return {finding.code for finding in open_checkpoint(str(root)).findings}


@pytest.mark.parametrize(
    ("layout", "kinds", "used"),
    [
        ("layers", None, "all"),
        ("layers", FLASH, "all"),
        ("layers", MIXED, "all"),
        ("layers", [[["mamba"], 2]], "none"),
        ("ranks", None, "none"),
        ("ranks", [[["global"], 2]], "none"),
        ("ranks", [[["local"], 2]], "none"),
        ("ranks", FLASH, "all"),
        ("ranks", MIXED, "some"),
        ("ranks", [[["flash", "local"], 1]], "some"),
        ("ranks", [[["flash"], 1], [["mamba"], 1]], "all"),
    ],
)
def test_which_layers_have_the_window(layout: Any, kinds: Any, used: str) -> None:
    assert windowed_layers({"attention_config": kinds}, layout) == used


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_ranks_become_a_hugging_face_model_without_a_window(family: str, tmp_path: Path) -> None:
    run = run_with(tmp_path, "ranks", family, sliding_window_width=4)
    plan = convert(run, tmp_path / "hf")
    warnings = [f for f in plan.findings if f.severity == "warning"]
    assert [f.code for f in warnings] == ["window-not-used"]
    assert WIDTH in warnings[0].message
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == family
    assert config.get("sliding_window") is None
    tokens = torch.arange(20)[None]
    assert torch.equal(hf_logits(tmp_path / "source", tokens), hf_logits(tmp_path / "hf", tokens))


@pytest.mark.parametrize("layout", ["layers", "ranks"])
def test_another_layout_of_ranks_has_no_window(layout: str, tmp_path: Path) -> None:
    run = run_with(tmp_path, "ranks", sliding_window_width=4)
    plan = convert(run, tmp_path / "new", to="neox", layout=layout)
    assert "window-not-used" in [f.code for f in plan.findings]
    assert WIDTH not in neox_config(tmp_path / "new")
    assert WIDTH not in (tmp_path / "new" / "finetune.yml").read_text()
    assert codes(tmp_path / "new") == set()


def test_resharded_ranks_have_no_window(tmp_path: Path) -> None:
    shutil.copytree(DATA / "fp32_pp0_dp2", tmp_path / "run")
    set_keys(step_of(tmp_path / "run"), sliding_window_width=3)
    plan, _ = reshard(tmp_path / "run", tmp_path / "new", pp=1)
    assert plan.target["layout"] == "layers"
    assert WIDTH not in yaml.safe_load((tmp_path / "new" / "resume.yml").read_text())
    assert "window-not-used" in codes(tmp_path / "run")


def test_resharded_layers_keep_their_window(tmp_path: Path) -> None:
    shutil.copytree(DATA / "fp32", tmp_path / "run")
    set_keys(step_of(tmp_path / "run"), sliding_window_width=3)
    with pytest.raises(Refused, match=f"{WIDTH}: 3.*`layout=layers`"):
        reshard(tmp_path / "run", tmp_path / "ranks", pp=0)
    reshard(tmp_path / "run", tmp_path / "two", pp=2)
    assert yaml.safe_load((tmp_path / "two" / "resume.yml").read_text())[WIDTH] == 3
    # what the message advises
    set_keys(step_of(tmp_path / "run"), attention_config=FLASH)
    reshard(tmp_path / "run", tmp_path / "ranks", pp=0)
    assert yaml.safe_load((tmp_path / "ranks" / "resume.yml").read_text())[WIDTH] == 3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_layers_with_a_window_do_not_become_ranks(family: str, tmp_path: Path) -> None:
    run = run_with(tmp_path, "layers", family, sliding_window_width=4)
    with pytest.raises(Refused, match=f"{WIDTH}: 4.*`layout=layers`") as caught:
        convert(run, tmp_path / "ranks", to="neox", layout="ranks")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "ranks").exists()
    # both things that the message advises
    convert(run, tmp_path / "layers", to="neox", layout="layers", tp=2)
    assert neox_config(tmp_path / "layers")[WIDTH] == 4
    (config,) = re.findall(r"attention_config: (\[.*\]\]) in", str(caught.value))
    set_keys(step_of(run), attention_config=json.loads(config))
    convert(run, tmp_path / "ranks", to="neox", layout="ranks")
    assert neox_config(tmp_path / "ranks")[WIDTH] == 4
    assert codes(tmp_path / "ranks") == set()


def test_layers_of_two_kinds_are_kept_as_they_are(tmp_path: Path) -> None:
    run = run_with(tmp_path, "ranks", sliding_window_width=4, attention_config=MIXED)
    with pytest.raises(Refused, match=f"{WIDTH}: .*flash attention") as caught:
        plan_of(run, tmp_path / "hf")
    with pytest.raises(Refused, match=f"{WIDTH}: 4.*`layout=ranks`"):
        plan_of(run, tmp_path / "layers", to="neox", layout="layers")
    # what the first message advises
    (command,) = re.findall(r"neox-bridge (convert .* --to neox)", str(caught.value))
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    assert neox_config(tmp_path / "hf")[WIDTH] == 4
    both = run_with(tmp_path / "layers", "layers", sliding_window_width=4, attention_config=MIXED)
    with pytest.raises(Refused, match=WIDTH):
        plan_of(both, tmp_path / "ranks", to="neox", layout="ranks")


def test_a_model_with_a_window_does_not_become_ranks(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mistral", sliding_window=5)
    args = ["convert", str(hf), str(tmp_path / "neox"), "--to", "neox"]
    done = CliRunner().invoke(app, [*args, "--pp", "0"])
    assert done.exit_code == 4
    assert "sliding_window: 5" in done.stderr
    assert "--layout layers" in done.stderr
    assert "5 tokens" in done.stderr
    assert CliRunner().invoke(app, [*args, "--layout", "layers"]).exit_code == 0
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    assert CliRunner().invoke(app, [*args, "--pp", "0", "--overwrite"]).exit_code == 0


def test_a_window_that_flash_attention_had_comes_back(tmp_path: Path) -> None:
    """The record says how the run attended, so its ranks can be written again."""
    run = run_with(tmp_path, "ranks", sliding_window_width=4, attention_config=FLASH)
    convert(run, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["sliding_window"] == 5
    convert(tmp_path / "hf", tmp_path / "back", to="neox", layout="ranks")
    back = neox_config(tmp_path / "back")
    assert (back[WIDTH], back["attention_config"]) == (4, FLASH)


@pytest.mark.parametrize("window", [32, 40])
def test_a_window_as_long_as_the_longest_text_is_none(window: int, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mistral", sliding_window=window)
    convert(hf, tmp_path / "neox", layout="ranks")
    assert codes(tmp_path / "neox") == set()
    convert(tmp_path / "neox", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["sliding_window"] == window
    shorter = make_hf(tmp_path / "shorter", family="mistral", sliding_window=31)
    with pytest.raises(Refused, match="sliding_window: 31"):
        plan_of(shorter, tmp_path / "none", layout="ranks")


def test_verify_knows_which_is_the_same_model(tmp_path: Path) -> None:
    run = run_with(tmp_path, "ranks", sliding_window_width=4)
    config = tmp_path / "windowed" / "config.json"
    shutil.copytree(tmp_path / "source", config.parent)
    changed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config.write_text(
        json.dumps({**json.loads(config.read_text()), **changed, "sliding_window": 5})
    )
    ranks = open_checkpoint(str(run))
    for hf, same in ((tmp_path / "source", True), (config.parent, False)):
        other = open_checkpoint(str(hf))
        assert compare_logits(ranks, other, read_tokens(None, (ranks, other)).tokens).agrees is same
        assert verify(ranks, other).holds is same


def test_ranks_and_layers_of_one_yml_are_two_models(tmp_path: Path) -> None:
    ranks = run_with(tmp_path / "a", "ranks", "gpt_neox", sliding_window_width=4)
    layers = run_with(tmp_path / "b", "layers", "gpt_neox", sliding_window_width=4)
    a, b = open_checkpoint(str(ranks)), open_checkpoint(str(layers))
    assert not verify(a, b).holds
    assert not compare_logits(a, b, read_tokens(None, (a, b)).tokens).agrees


def test_every_view_says_it(tmp_path: Path) -> None:
    run = run_with(tmp_path, "ranks", sliding_window_width=4)
    for command in (["inspect"], ["doctor", "--for", "today"], ["inspect", "--json"]):
        done = CliRunner().invoke(app, [command[0], str(run), *command[1:]])
        assert done.exit_code == 0
        assert WIDTH in done.output


def test_a_genuine_checkpoint(tmp_path: Path) -> None:
    """pipe_parallel_size 0 as GPT-NeoX itself wrote it."""
    shutil.copytree(fixture("pythia_fp32_pp0_tp1"), tmp_path / "run")
    set_keys(step_of(tmp_path / "run"), sliding_window_width=4)
    plan = convert(tmp_path / "run", tmp_path / "hf")
    assert "window-not-used" in [f.code for f in plan.findings]
    convert(FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints", tmp_path / "same")
    tokens = torch.arange(20)[None]
    assert torch.equal(hf_logits(tmp_path / "hf", tokens), hf_logits(tmp_path / "same", tokens))
