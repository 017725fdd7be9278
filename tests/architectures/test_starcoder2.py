"""StarCoder 2 and the models of GPT-NeoX that are one: what is exact, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import edit_yml
from common import assert_same, convert, fixture, hf_tensors, make_hf, neox_config, plan_of, step_of

from neox_bridge.api import open_checkpoint
from neox_bridge.doctor.compare import compare
from neox_bridge.doctor.diagnose import judge
from neox_bridge.errors import Refused
from neox_bridge.frameworks.eras import ERAS
from neox_bridge.frameworks.targets import target_named

FIXTURE = "starcoder2_fp32_tp2"
GROUPED = {"num_key_value_heads": 2}
# keys of its published models that the class of transformers ignores (bigcode/starcoder2-3b)
PUBLISHED = {
    "attention_softmax_in_fp32": True,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "norm_type": "layer_norm",
    "mlp_type": "default",
    "layer_norm_epsilon": 1e-5,
}


def with_config(folder: Path, *without: str, **more: Any) -> Path:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
    path.write_text(json.dumps({**config, **more}))
    return folder


def test_the_settings_of_the_yml(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="starcoder2", **GROUPED, sliding_window=5)
    convert(hf, tmp_path / "neox", tp=2)
    yml = neox_config(tmp_path / "neox")
    wanted = {
        "num_kv_heads": 2,
        "sliding_window_width": 4,
        "activation": "gelu",
        "bias_gelu_fusion": True,
        "rotary_pct": 1.0,
        "gpt_j_residual": False,
        "no_weight_tying": False,
    }
    assert {key: yml[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({}, "starcoder2"),
        ({"num_kv_heads": 4}, "gpt_neox"),
        ({"num_kv_heads": 4, "sliding_window_width": 5}, "starcoder2"),
        ({"num_kv_heads": 4, "sliding_window_width": 5, "rotary_pct": 0.5}, "gpt_neox"),
    ],
)
def test_the_yml_decides_without_a_record(
    settings: dict[str, Any], family: str, tmp_path: Path
) -> None:
    heads = settings.get("num_kv_heads", 2)
    hf = make_hf(tmp_path / "hf", family="starcoder2", num_key_value_heads=heads)
    convert(hf, tmp_path / "neox")
    root = step_of(tmp_path / "neox")
    (root / "neox_bridge.json").unlink()
    edit_yml(**settings)(root)
    assert open_checkpoint(str(tmp_path / "neox")).architecture.name == family


def test_the_record_keeps_the_family(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="starcoder2")
    convert(hf, tmp_path / "neox", tp=2)
    convert(tmp_path / "neox", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "starcoder2"
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))


def test_defaults_that_config_json_leaves_out(tmp_path: Path) -> None:
    """transformers' class has 2 heads of k and v, tied embeddings and 4096 positions."""
    hf = make_hf(tmp_path / "hf", family="starcoder2", **GROUPED)
    with_config(hf, "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings")
    config = open_checkpoint(str(hf)).config
    assert (config.kv_heads, config.tied_embeddings, config.max_positions) == (2, True, 4096)


def test_keys_of_the_published_models_are_known(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="starcoder2", **GROUPED)
    assert open_checkpoint(str(with_config(hf, **PUBLISHED))).unknown_keys == ()
    plan_of(hf, tmp_path / "neox")
    with pytest.raises(Refused, match="layer_norm_epsilon"):
        plan_of(with_config(hf, layer_norm_epsilon=1e-6), tmp_path / "neox")
    with pytest.raises(Refused, match="norm_type"):
        plan_of(with_config(hf, **{**PUBLISHED, "norm_type": "rms_norm"}), tmp_path / "neox")


@pytest.mark.parametrize(
    ("config", "options", "key"),
    [
        ({"use_bias": False}, {}, "use_bias_in_mlp"),
        ({"hidden_act": "gelu_10"}, {}, "hidden_act"),
        ({"rope_theta": 999999.4420358813}, {}, "rope_theta: GPT-NeoX accepts only whole"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}, "rope_scaling"),
        ({"head_dim": 32}, {}, "head_dim"),
        ({"sliding_window": 5}, {"layout": "ranks"}, "sliding_window"),
        ({"num_key_value_heads": 1}, {"tp": 2}, "1 key-value heads"),
        ({}, {"era": ERAS[0]}, "num_kv_heads"),
    ],
)
def test_refused(config: dict[str, Any], options: dict[str, Any], key: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="starcoder2", **{**GROUPED, **config})
    with pytest.raises(Refused, match=key):
        plan_of(hf, tmp_path / "neox", **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_pct": 0.5},
        {"gpt_j_residual": True},
        {"use_bias_in_attn_linear": False},
        {"pos_emb": "none"},
        {"activation": "softsign", "bias_gelu_fusion": False},
        {"use_mup": True},
    ],
)
def test_what_transformers_does_not_have(changes: dict[str, Any], tmp_path: Path) -> None:
    """Without a class for them, such models move between layouts of GPT-NeoX."""
    shutil.copytree(fixture(FIXTURE), tmp_path / "neox")
    if "use_bias_in_attn_linear" in changes:
        for path in step_of(tmp_path / "neox").glob("layer_0[23]-*"):
            block = torch.load(path, weights_only=False)
            kept = {k: t for k, t in block.items() if "attention" not in k or "bias" not in k}
            torch.save(kept, path)
    edit_yml(**changes)(step_of(tmp_path / "neox"))
    with pytest.raises(Refused, match=next(iter(changes))):
        plan_of(tmp_path / "neox", tmp_path / "hf", to="hf")
    convert(tmp_path / "neox", tmp_path / "one", to="neox", tp=1)


def test_norms_without_biases_get_zeros(tmp_path: Path) -> None:
    shutil.copytree(fixture(FIXTURE), tmp_path / "neox")
    for path in step_of(tmp_path / "neox").glob("layer_*"):
        block = torch.load(path, weights_only=False)
        torch.save({k: t for k, t in block.items() if not k.endswith("norm.bias")}, path)
    plan = convert(tmp_path / "neox", tmp_path / "hf")
    (finding,) = (f for f in plan.findings if f.code == "biases-added")
    assert "starcoder2 in transformers always has them" in finding.message
    biases = [t for name, t in hf_tensors(tmp_path / "hf").items() if name.endswith("norm.bias")]
    assert len(biases) == 5
    assert not any(map(torch.any, biases))


@pytest.mark.parametrize(("embedding", "warns"), [(0.1, False), (0.0, True)])
def test_one_dropout_for_embeddings_and_blocks(
    embedding: float, warns: bool, tmp_path: Path
) -> None:
    dropout = {"residual_dropout": 0.1, "embedding_dropout": embedding}
    hf = make_hf(tmp_path / "hf", family="starcoder2", **GROUPED, **dropout)
    plan = convert(hf, tmp_path / "neox")
    assert [f.code for f in plan.findings] == (["embedding-dropout"] if warns else [])
    assert neox_config(tmp_path / "neox")["hidden_dropout"] == 0.1
    convert(tmp_path / "neox", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config[key] for key in dropout} == dropout


def test_doctor_sees_an_mlp_of_another_width(tmp_path: Path) -> None:
    shutil.copytree(fixture(FIXTURE), tmp_path / "neox")
    edit_yml(intermediate_size=96)(step_of(tmp_path / "neox"))
    found = judge(open_checkpoint(str(tmp_path / "neox")), target_named("neox@today"))
    assert found.answer == "fails"
    errors = [one.finding for one in found.cases if one.finding.severity == "error"]
    assert ["128 wide, and 96 wide by the yml" in error.message for error in errors] == [True]


def test_compare_says_where_q_k_and_v_are(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="starcoder2", **GROUPED)
    rows = {row.feature: row for row in compare(open_checkpoint(str(hf)))}
    assert "2 of k and v, three matrices" in rows["query, key, value"].transformers
    assert "use_parallel_residual" not in rows["residual"].transformers
