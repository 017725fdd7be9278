"""``reshard --for``: a run resumes in GPT-NeoX of another date, with its names and its keys."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from common import FIXTURES
from resharding import DATA, compared, differences, files, logical, reshard

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.eras import era_named, known_keys
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.reshard import plan_reshard

SOURCES = [DATA / name for name in ("bf16_tp2", "fp32_pp2", "fp32_pp0_dp2", "fp16_stage0")]


def first_rank(root: Path) -> dict[Any, Any]:
    value = read_torch(str(files(root)["mp_rank_00_model_states.pt"]))
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("name", ["2024-03", "2024-09", "2024-10"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_there_and_back(source: Path, name: str, tmp_path: Path) -> None:
    reshard(source, tmp_path / "old", era=era_named(name))
    reshard(tmp_path / "old", tmp_path / "new", era=era_named("today"))
    assert compared(source, tmp_path / "new") == []


@pytest.mark.parametrize("name", ["2024-03", "2024-09"])
def test_names_buffers_and_keys_are_the_eras(name: str, tmp_path: Path) -> None:
    reshard(DATA / "fp32_pp2", tmp_path / "old", era=era_named(name))
    checkpoint = open_checkpoint(str(tmp_path / "old"))
    assert checkpoint.neox is not None
    assert checkpoint.neox.mlp_names == "dense"
    assert checkpoint.neox.inv_freq == ("store" if name == "2024-03" else "omit")
    meta = first_rank(tmp_path / "old")
    shapes = [key for group in meta["param_shapes"] for key in group]
    assert "2.mlp.dense_h_to_4h.weight" in shapes
    assert "2.mlp.dense_4h_to_h.bias" in shapes
    assert not [key for key in shapes if "linear1" in key]
    buffers = ["2.attention.rotary_emb.inv_freq"] if name == "2024-03" else []
    assert meta["buffer_names"] == buffers
    yml = yaml.safe_load((tmp_path / "old" / "resume.yml").read_text())
    assert set(yml) <= known_keys(era_named(name)), "GPT-NeoX refuses other keys"


def test_the_optimizer_is_the_same(tmp_path: Path) -> None:
    reshard(DATA / "bf16_tp2", tmp_path / "old", era=era_named("2024-03"), tp=1)
    mine, source = logical(tmp_path / "old"), logical(DATA / "bf16_tp2")
    assert mine.keys() == source.keys()
    for state, tensors in source.items():
        for name, want in tensors.items():
            assert (mine[state][name][: want.shape[0]] == want).all(), (state, name)


def test_the_halves_of_a_gated_mlp(tmp_path: Path) -> None:
    """One parameter today, two before 2024-09: in the order of a genuine run of that time."""
    genuine = FIXTURES / "llama_fp32_2024_09_w123_tp2" / "checkpoints"
    today, old, back = (tmp_path / name for name in ("today", "old", "back"))
    command = ["convert", str(genuine), str(today), "--to", "neox", "--for", "today"]
    done = CliRunner().invoke(app, [*command, "--optimizer", "fresh"])
    assert done.exit_code == 0, done.output
    reshard(today, old, era=era_named("2024-09"))
    shapes, want = (first_rank(root)["param_shapes"] for root in (old, genuine))
    assert list(differences(shapes, want, "param_shapes", values=False)) == []
    assert [list(group) for group in shapes] == [list(group) for group in want]
    reshard(old, back, era=era_named("today"))
    assert compared(today, back) == []


def test_a_fork_loses_its_keys_by_name(tmp_path: Path) -> None:
    source = open_checkpoint(str(DATA / "fp32"))
    object.__setattr__(source, "raw", {**source.raw, "te_columnparallel": False})
    asked = Resharding(era=era_named("2024-03"))
    plan = plan_reshard(source, read_optimizer(source), asked, str(tmp_path / "x"))
    assert [drop.name for drop in plan.dropped] == ["yml: te_columnparallel"]
    object.__setattr__(source, "raw", {**source.raw, "use_flashattn_swiglu": True})
    with pytest.raises(Refused, match="use_flashattn_swiglu: GPT-NeoX before"):
        plan_reshard(source, read_optimizer(source), asked, str(tmp_path / "x"))


def test_only_gpt_neox_resumes_a_run(tmp_path: Path) -> None:
    command = ["reshard", str(DATA / "fp32"), str(tmp_path / "x"), "--for", "transformers@4.48"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert "--for: transformers@4.48 does not resume GPT-NeoX runs" in done.output
    done = CliRunner().invoke(app, [*command[:3], "--for", "neox@2024-03", "--dry-run"])
    assert done.exit_code == 0, done.output
