"""``neox-bridge inspect``: facts of genuine checkpoints, for people and as data."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
RUNNER = CliRunner()


def run(*args: object) -> Any:
    return RUNNER.invoke(app, ["inspect", *map(str, args)])


def facts(name: str, *more: object) -> dict[str, Any]:
    done = run(FIXTURES / name / "checkpoints", "--json", *more)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


# name: layout, TP, PP, step, dtype, era, mlp names, inv_freq, files with optimizer states
KNOWN = {
    "pythia_bf16_pp1_tp2_dp2": ("layers", 2, 1, 8, "bfloat16", "today", "linear", "omit", 4),
    "pythia_bf16_saved_inv_freq": ("layers", 1, 1, 2, "bfloat16", "today", "linear", "store", 0),
    "pythia_fp16_pp1_tp1": ("layers", 1, 1, 8, "float16", "today", "linear", "omit", 1),
    "pythia_fp32_2024_03_inv_freq": ("layers", 1, 1, 2, "float32", "2024-03", "dense", "store", 0),
    "pythia_fp32_2024_09_old_mlp_pp0_tp2": (
        *("ranks", 2, 0, 2, "float32", "2024-09", "dense", "omit", 0),
    ),
    "pythia_fp32_pp0_tp1": ("ranks", 1, 0, 2, "float32", "today", "linear", "omit", 0),
    "pythia_fp32_pp2_tp2": ("layers", 2, 2, 2, "float32", "today", "linear", "omit", 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_layout_and_era(name: str) -> None:
    found = facts(name)
    neox = found["neox"]
    assert found["kind"] == "neox"
    assert (
        neox["layout"],
        neox["tensor_parallel"],
        neox["pipeline_stages"],
        neox["iteration"],
        found["dtype"],
        neox["era"],
        neox["mlp_names"],
        neox["inv_freq"],
        len(neox["optimizer"]),
    ) == KNOWN[name]


def test_the_model_itself() -> None:
    found = facts("pythia_fp32_pp1_tp2")
    sizes = [found[key] for key in ("layers", "hidden", "heads", "ffn", "max_positions")]
    assert sizes == [2, 32, 4, 128, 32]
    assert found["vocab_rows"] == 512
    assert found["parameters"] == sum(found["dtypes"].values()) == 58_240
    assert (found["rotary_dim"], found["rotary_base"]) == (2, 10000)
    assert found["parallel_residual"] is True
    assert found["tied_embeddings"] is False
    assert found["refusals"] == []
    assert found["bytes"] > 4 * found["parameters"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sequential_residual_fp32_tp2", "parallel_residual", False),
        ("tied_embeddings_fp32_tp2", "tied_embeddings", True),
        ("tied_norms_fp32_pp0_tp2", "tied_norms", True),
        ("pythia_fp32_fused_gelu_tp1", "activation", "gelu_tanh"),
    ],
)
def test_variants(name: str, key: str, value: object) -> None:
    assert facts(name)[key] == value


def test_for_people() -> None:
    done = run(FIXTURES / "pythia_bf16_pp1_tp2_dp2" / "checkpoints")
    assert done.exit_code == 0, done.output
    lines = {
        key.strip(): text
        for key, text in (re.split(r"(?<=^.{12})", x) for x in done.stdout.splitlines())
    }
    assert lines["kind"] == "GPT-NeoX, global_step8, iteration 8"
    assert lines["layout"] == "layers, TP 2, PP 1"
    assert lines["era"].startswith("matches GPT-NeoX since 2024-11 (neox@today)")
    assert lines["optimizer"] == "4 state files, not copied by convert"
    assert lines["size"] == "2 layers, hidden 32, 4 heads, MLP 128"


def test_every_tensor() -> None:
    found = facts("pythia_fp32_pp1_tp2", "--tensors")["tensors"]
    by_name = {tensor["name"]: tensor for tensor in found}
    qkv = by_name["gpt_neox.layers.1.attention.query_key_value.weight"]
    assert qkv["shape"] == [96, 32]
    assert [shard["shape"] for shard in qkv["shards"]] == [[48, 32], [48, 32]]
    for rank, shard in enumerate(qkv["shards"]):
        assert shard["file"].endswith(f"layer_03-model_{rank:02d}-model_states.pt")
    assert by_name["gpt_neox.layers.0.attention.dense.bias"]["reduce"] == "sum"
    done = run(FIXTURES / "pythia_fp32_pp1_tp2" / "checkpoints", "--tensors")
    shown = [line for line in done.stdout.splitlines() if " @ " in line]
    assert len(shown) == len(found)
    assert all(line.endswith("and 1 more shard") for line in shown)


def test_what_would_be_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints", folder)
    (folder / "global_step2" / "configs" / "z.yml").write_text('{"use-bias-in-mlp": false}')
    done = run(folder, "--json")
    if done.exit_code:  # the tensors contradict it
        pytest.skip(done.stderr)
    [refusal] = json.loads(done.stdout)["refusals"]
    assert refusal["key"] == "use_bias_in_mlp"


def test_a_step_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints", folder)
    shutil.copytree(folder / "global_step2", folder / "global_step3")
    done = run(folder, "--step", 3, "--json")
    assert json.loads(done.stdout)["neox"]["step"] == "global_step3"
    missing = run(folder, "--step", 4)
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "global_step3" in missing.stderr


def test_configs_from_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints", folder)
    shutil.move(folder / "global_step2" / "configs", tmp_path / "configs")
    assert run(folder).exit_code == 1
    given = [x for file in sorted((tmp_path / "configs").iterdir()) for x in ("--config", file)]
    assert run(folder, *given).exit_code == 0


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    done = run(tmp_path, "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert str(tmp_path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_trainers_folder_is_hugging_faces(tmp_path: Path) -> None:
    """transformers' Trainer with DeepSpeed: global_stepN and latest beside the model."""
    from common import make_hf

    folder = make_hf(tmp_path / "checkpoint-5")
    (folder / "latest").write_text("global_step5")
    (folder / "global_step5").mkdir()
    (folder / "global_step5" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert open_checkpoint(str(folder)).kind == "hf"
