"""Settings that no known framework has: refused, named, or ignored on the user's word."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from common import FIXTURES, convert, fixture, make_hf, neox_config, plan_of, step_of
from transformers import AutoConfig

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures import ARCHITECTURES
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused, UsageError
from neox_bridge.formats.yml import read_yml
from neox_bridge.frameworks.check_keys import (
    unknown_in_config,
    unknown_in_mamba_ssm,
    unknown_in_params,
    unknown_in_yml,
)
from neox_bridge.frameworks.keys import _facts, neox_keys, transformers_keys
from neox_bridge.frameworks.unknown_keys import UnknownKey, effect_of, neighbour_of
from neox_bridge.verification.verify import verify

PYTHIA = "pythia_fp32_pp1_tp2"
ROPE = {"type": "linear", "factor": 4.0}


def run(code: int, *words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def with_yml(tmp_path: Path, name: str = PYTHIA, **keys: Any) -> Path:
    """A genuine checkpoint with more yml keys."""
    root = tmp_path / "run"
    shutil.copytree(fixture(name), root)
    (step_of(root) / "configs" / "zz.yml").write_text(json.dumps(keys) + "\n")
    return root


def with_json(tmp_path: Path, family: str = "gpt_neox", **keys: Any) -> Path:
    """A model of transformers with more keys in config.json."""
    folder = make_hf(tmp_path / "hf", family=family)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def in_yml(**keys: Any) -> dict[str, UnknownKey]:
    return {key.name: key for key in unknown_in_yml(keys)}


def in_config(family: str = "llama", **keys: Any) -> dict[str, UnknownKey]:
    raw = {**AutoConfig.for_model(family).to_dict(), **keys}
    return {key.name: key for key in unknown_in_config(raw, family, frozenset())}


# --- which keys stop a conversion


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_scaling", ROPE),
        ("rope_scaling", {"factor": 4.0}),
        ("rope_type", "yarn"),
        ("use_xpos", True),
        ("ntk_factor", 2),
        ("logit_scale", 0.125),
        ("logits_scaling", "8.0"),
        ("embedding_multiplier", 12),
        ("residual_multiplier", 0.22),
        ("attn_logit_softcapping", 50.0),
        ("attn_softcap", 1.0),
        ("final_logit_cap", 30),
        ("attention_window", 128),
        ("local_attention", [1, 2]),
        ("use_alibi", True),
        ("clip_qkv", 8),
        ("qk_norm", "rmsnorm"),
        ("parallel_attn", True),
        ("norm_after_mlp", True),
        ("mlp_act", "relu2"),
        ("mlpBias", True),
        ("router_topk", 2),
        ("softmax_temperature", 0.5),
        ("attention_decay", 0.9),
        ("is_causal", False),
        ("hidden_act", "relu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rotary_logging_scale", 3),
    ],
)
def test_a_name_that_suggests_an_effect(name: str, value: object) -> None:
    assert effect_of(name, value) == "model"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_scaling", None),
        ("rope_scaling", {}),
        ("rope_scaling", {"rope_type": "default"}),
        ("rope_scaling", {"type": "linear", "factor": 1.0}),
        ("rope_type", "default"),
        ("use_xpos", False),
        ("logit_scale", 1.0),
        ("logits_scaling", "1.0"),
        ("embedding_multiplier", 1),
        ("attn_softcap", 0),
        ("final_logit_cap", 0.0),
        ("attention_window", -1),
        ("sliding_window", "null"),
        ("clip_qkv", None),
        ("num_experts_per_tok", 1),
        ("no_rope_layers", []),
        ("is_causal", True),
        ("layer_types", ["full_attention", "full_attention"]),
    ],
)
def test_a_value_that_turns_it_off(name: str, value: object) -> None:
    assert effect_of(name, value) == "off"


@pytest.mark.parametrize(
    "name",
    """normalize_logging attention_dropout_during_eval log_grad_norm max_grad_norm track_layer_norms
    embedding_lr no_decay_norms wandb_notes experiment europe properties recap_every
    context_parallel_size base_model attention_checkpointing attn_implementation rmsnorm_fusion
    head_lr_scale logits_fp32 data_window loss_scale_growth""".split(),
)
def test_a_trainer_s_key_is_harmless(name: str) -> None:
    assert effect_of(name, 7) == "none"


@pytest.mark.parametrize(
    ("name", "value", "neighbour"),
    [
        ("rotary_pc", 0.5, "rotary_pct"),
        ("rotary_ptc", 0.5, "rotary_pct"),
        ("rotaryPct", 0.5, "rotary_pct"),
        ("pct_rotary", 0.5, "rotary_pct"),
        ("gpt_j_residul", True, "gpt_j_residual"),
        ("activaton", "relu", "activation"),
        ("nrom", "rmsnorm", "norm"),
        ("use_bias_in_mpl", False, "use_bias_in_mlp"),
        ("num_kv_head", 2, "num_kv_heads"),
        ("no_weight_tyingg", True, "no_weight_tying"),
    ],
)
def test_a_misspelling_names_its_neighbour(name: str, value: object, neighbour: str) -> None:
    key = in_yml(**{name: value})[name]
    assert (key.effect, key.neighbour) == ("model", neighbour)


def test_a_misspelling_that_says_nothing_new() -> None:
    assert in_yml(rotary_pct=0.5, rotary_pc=0.5)["rotary_pc"].effect == "off"
    assert in_yml(rotary_pct=0.5, rotary_pc=0.25)["rotary_pc"].effect == "model"
    assert in_yml(gpt_j_residul=False)["gpt_j_residul"].effect == "off"
    harmless = in_yml(train_iter=3)["train_iter"]
    assert (harmless.effect, harmless.neighbour) == ("none", "train_iters")


def test_a_name_that_is_like_no_other() -> None:
    assert neighbour_of("colour", neox_keys()) == ("", False)


def test_keys_within_blocks() -> None:
    block = {"stage": 1, "stage3_max_live_parameters": 5, "rope_scale": 2.0, "mine": 1}
    found = in_yml(zero_optimization=block, optimizer={"type": "Adam", "params": {"norm_decay": 1}})
    assert {name: key.effect for name, key in found.items()} == {
        "zero_optimization.rope_scale": "model",
        "zero_optimization.mine": "none",
    }
    assert set(in_yml(optimizer={"params": {"lr": 1, "rope_base": 2}})) == {
        "optimizer.params.rope_base"
    }


def test_what_gpt_neox_had_once() -> None:
    """apply_residual_connection_post_layernorm went before v1.0, and it changed the model."""
    key = in_yml(apply_residual_connection_post_layernorm=True)[
        "apply_residual_connection_post_layernorm"
    ]
    assert (key.effect, key.removed) == ("model", "2021-08-30")


def test_weights_that_are_quantized_while_training() -> None:
    block = {"weight_quantization": {"shared_parameters": {"enabled": True}}}
    assert in_yml(compression_training=block)["compression_training"].effect == "model"
    block = {"weight_quantization": {"shared_parameters": {"enabled": False}}}
    assert not in_yml(compression_training=block)


def test_the_same_in_a_config_json() -> None:
    found = in_config(
        logits_scaling=8.0, attention_multiplier=0.1, residual_multiplier=1.0, hidden_acts="relu",
        sliding_window=128, unsloth_version="2026.1", note="mine", is_causal=False,
        per_layer_config={"0": {}}, transformers_weights="other.safetensors",
    )  # fmt: skip
    assert {name: key.effect for name, key in found.items()} == {
        "logits_scaling": "model",
        "attention_multiplier": "model",
        "residual_multiplier": "off",
        "hidden_acts": "model",
        "sliding_window": "model",
        "note": "none",
        "is_causal": "model",
        "transformers_weights": "model",
    }
    assert found["hidden_acts"].neighbour == "hidden_act"


def test_rope_keys_without_a_type() -> None:
    """transformers computes the default RoPE where the type is missing, whatever else stands."""
    found = in_config(rope_scaling={"factor": 4.0})
    assert found["rope_scaling.factor"].effect == "model"
    rope = {"rope_type": "default", "rope_theta": 10000.0, "beta": 2.0}
    assert in_config(rope_parameters=rope)["rope_parameters.beta"].effect == "model"
    by_layer = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert in_config(rope_parameters=by_layer)["rope_parameters.full_attention"].effect == "model"
    known = {"rope_type": "linear", "factor": 4.0}
    assert not in_config(rope_scaling=known)  # refused as what it is


def test_base_and_share_that_gpt_neox_s_class_does_not_read() -> None:
    same = {"rotary_pct": 0.25, "rotary_emb_base": 10000}
    assert not in_config("gpt_neox", **same, rope_theta=10000, partial_rotary_factor=0.25)
    found = in_config("gpt_neox", **same, rope_theta=500000, partial_rotary_factor=0.5)
    assert {key.effect for key in found.values()} == {"model"}
    assert set(found) == {"rope_theta", "partial_rotary_factor"}


def test_layers_of_several_kinds() -> None:
    kinds = ["full_attention", "sliding_attention"]
    assert in_config("qwen2", layer_types=kinds)["layer_types"].effect == "model"
    assert not in_config("qwen2", layer_types=["full_attention"] * 2)


def test_mamba_ssm_and_meta_s_llama() -> None:
    own = {"d_model": 8, "n_layer": 2, "ssm_cfg": {"d_state": 16, "dt_scale": 1, "A_norm": True}}
    (key,) = unknown_in_mamba_ssm(own)
    assert (key.name, key.effect) == ("ssm_cfg.A_norm", "model")
    params = {
        "dim": 64,
        "n_heads": 4,
        "rope_scaling_factor": 8,
        "norm_eps": 1e-5,
        "use_qk_norm": False,
    }
    found = {key.name: key.effect for key in unknown_in_params(params)}
    assert found == {"rope_scaling_factor": "model", "use_qk_norm": "off"}


# --- no false refusal


def test_the_published_mamba_has_words_of_both_libraries() -> None:
    """Of state-spaces/mamba-130m-hf; and what neox-bridge itself writes beside them."""
    config: dict[str, Any] = {
        "model_type": "mamba",
        "d_inner": 1536,
        "d_model": 768,
        "fused_add_norm": True,
        "hidden_size": 768,
        "intermediate_size": 1536,
        "n_layer": 24,
        "num_hidden_layers": 24,
        "pad_vocab_size_multiple": 8,
        "rescale_prenorm_residual": False,
        "rms_norm": True,
        "ssm_cfg": {},
        "num_attention_heads": 1,
        "max_position_embeddings": 2048,
    }

    def effects(**more: Any) -> set[str]:
        found = unknown_in_config({**config, **more}, "mamba", frozenset())
        return {key.name for key in found if key.effect == "model"}

    assert effects() == set()
    assert effects(n_layer=12) == {"n_layer"}


def saved_configs() -> dict[str, dict[str, Any]]:
    path = Path(__file__).parents[1] / "data" / "configs.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


def test_what_transformers_4_wrote_is_known() -> None:
    configs = saved_configs()
    assert len(configs) > 40
    unknown = {
        name: unknown_in_config(raw, raw["model_type"], frozenset())
        for name, raw in configs.items()
    }
    assert not {name: keys for name, keys in unknown.items() if keys}


CHOICES: list[tuple[str, dict[str, Any]]] = [
    *(("gpt_neox", {"hidden_act": act}) for act in ("gelu", "gelu_fast", "gelu_new", "relu")),
    ("gpt_neox", {}),
    ("gpt_neox", {"rotary_pct": 1.0}),
    ("gpt_neox", {"rotary_emb_base": 50000}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
    ("gpt_neox", {"tie_word_embeddings": True, "dtype": "float16"}),
    ("gpt_neox", {"num_labels": 1, "pad_token_id": 0}),
    ("gpt_neox", {"is_decoder": True, "use_cache": False, "gradient_checkpointing": True}),
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"head_dim": 128}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"pretraining_tp": 2}),
    ("llama", {"rope_theta": 500000.0}),
    ("llama", {"rope_scaling": None, "rope_parameters": None}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama", {"num_labels": 3, "problem_type": "regression"}),
    ("llama", {"output_hidden_states": True, "output_attentions": False}),
    ("llama", {"attn_implementation": "eager"}),
    ("llama", {"_name_or_path": "some/model", "torch_dtype": "bfloat16"}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 128, "head_dim": 64}),
    ("mistral", {"num_key_value_heads": 32}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": False, "max_window_layers": 2}),
    ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1000000.0}),
    ("mamba", {}),
    ("mamba", {"use_conv_bias": False, "residual_in_fp32": False}),
    ("mamba", {"time_step_rank": 8, "use_mambapy": True}),
    ("mamba", {"hidden_act": "silu", "rescale_prenorm_residual": True}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "choice"), CHOICES)
def test_what_transformers_writes_is_known(
    family: str, choice: dict[str, Any], tmp_path: Path
) -> None:
    AutoConfig.for_model(family, **choice).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert unknown_in_config(raw, family, frozenset()) == ()


@pytest.mark.parametrize("family", [each.name for each in ARCHITECTURES])
def test_the_fields_of_the_installed_classes_are_known(family: str) -> None:
    """For a new family, or a newer transformers: run ``tests/helpers/collect_keys.py`` again."""
    assert family in _facts()["transformers"]["families"]
    fields = set(AutoConfig.for_model(family).to_dict())
    assert fields <= transformers_keys(family)


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_what_gpt_neox_wrote_is_known(name: str) -> None:
    assert open_checkpoint(str(fixture(name))).unknown_keys == ()


def test_a_yml_that_gpt_neox_ships_is_known() -> None:
    """configs/llemma of GPT-NeoX itself has keys that its code refuses."""
    assert not in_yml(attention_type="groupedquery", decay_lr_to=0.033, warmup_iters=500)
    assert in_yml(attention_type="sparse")["attention_type"].effect == "model"


# --- the commands


def test_a_fork_s_key_is_refused_and_named(tmp_path: Path) -> None:
    root = with_yml(tmp_path, rope_scaling=ROPE, my_note="x")
    text = run(4, "convert", root, tmp_path / "out", "--to", "hf")
    assert "zz.yml has rope_scaling" in text
    assert "--ignore-key rope_scaling" in text
    assert not (tmp_path / "out").exists()
    for words in (["--tp", 1], ["--layout", "ranks"], ["--for", "today"]):
        run(4, "convert", root, tmp_path / "out", "--to", "neox", *words)


def test_a_misspelt_key_is_refused_and_its_neighbour_named(tmp_path: Path) -> None:
    root = with_yml(tmp_path, activaton="relu")
    assert "Did you mean activation?" in run(4, "convert", root, tmp_path / "out")


def test_a_harmless_key_is_named(tmp_path: Path) -> None:
    root = with_yml(tmp_path, my_note="x", logit_scale=1.0)
    text = run(0, "convert", root, tmp_path / "out")
    assert "warning: zz.yml has keys that GPT-NeoX does not know" in text
    assert "my_note: 'x'" in text
    assert "logit_scale: 1.0" in text


@pytest.mark.parametrize("key", [{"logits_scaling": 8.0}, {"rope_scaling": {"factor": 4.0}}])
def test_a_config_json_is_refused_and_named(key: dict[str, Any], tmp_path: Path) -> None:
    folder = with_json(tmp_path, "llama", **key)
    text = run(4, "convert", folder, tmp_path / "out")
    assert f"config.json has {next(iter(key))}" in text
    run(4, "convert", folder, tmp_path / "out", "--to", "hf")
    assert not (tmp_path / "out").exists()


def test_ignored_on_the_way_to_hugging_face_and_back(tmp_path: Path) -> None:
    root, out = with_yml(tmp_path, rope_scaling=ROPE), tmp_path / "out"
    text = run(0, "convert", root, out, "--ignore-key", "rope_scaling")
    assert "warning: rope_scaling: ignored" in text
    assert "rope_scaling" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "neox_bridge.json").read_text())["ignored_keys"] == ["rope_scaling"]
    text = run(0, "verify", root, out, "--logits")
    assert "rope_scaling: ignored" in text
    assert "the same model" in text
    text = run(0, "convert", out, tmp_path / "back", "--to", "neox")
    assert "the run's yml had rope_scaling" in text
    assert "rope_scaling" not in neox_config(tmp_path / "back")


def test_ignored_in_a_config_json_and_back(tmp_path: Path) -> None:
    folder, out = with_json(tmp_path, logits_scaling=8.0), tmp_path / "out"
    run(0, "convert", folder, out, "--ignore-key", "logits_scaling", "--tp", 2)
    run(0, "verify", folder, out, "--logits")
    run(0, "convert", out, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["logits_scaling"] == 8.0
    run(0, "verify", out, tmp_path / "back", "--logits")


def test_a_key_that_transformers_obeys_is_ignored_by_the_logits_too(tmp_path: Path) -> None:
    folder, out = with_json(tmp_path, is_causal=False), tmp_path / "out"
    run(0, "convert", folder, out, "--ignore-key", "is_causal")
    assert "the same model" in run(0, "verify", folder, out, "--logits")
    scaled = with_json(tmp_path / "two", "llama", rope_scaling={"type": "linear", "factor": 4.0})
    run(4, "convert", scaled, tmp_path / "scaled")
    run(0, "convert", scaled, tmp_path / "scaled", "--ignore-key", "rope_scaling")
    assert "the same model" in run(0, "verify", scaled, tmp_path / "scaled", "--logits")


def test_verify_does_not_call_it_the_same_model(tmp_path: Path) -> None:
    """Where the result does not say that the key was ignored."""
    convert(fixture(PYTHIA), tmp_path / "out", to="hf")
    root = with_yml(tmp_path, rope_scaling=ROPE)
    text = run(3, "verify", root, tmp_path / "out")
    assert re.search(r"[?.] It is unknown whether both are the same model\.", text)
    assert verify(open_checkpoint(str(root)), open_checkpoint(str(root))).holds
    assert "is unknown" in run(0, "diff", root, tmp_path / "out")


def test_another_layout_keeps_the_fork_s_keys(tmp_path: Path) -> None:
    root, out = with_yml(tmp_path, rope_scaling=ROPE, my_note="x"), tmp_path / "out"
    run(0, "convert", root, out, "--to", "neox", "--tp", 1, "--ignore-key", "rope_scaling")
    settings = neox_config(out)
    assert (settings["rope_scaling"], settings["my_note"]) == (ROPE, "x")
    assert read_yml(str(out / "finetune.yml"))["rope_scaling"] == ROPE
    run(0, "verify", root, out)
    run(4, "convert", out, tmp_path / "hf")  # it was kept, not understood
    for_today = tmp_path / "today"
    words = ["--for", "today", "--ignore-key", "rope_scaling"]
    text = run(0, "convert", root, for_today, "--to", "neox", *words)
    assert "dropped: yml: my_note and 1 more" in text
    assert "left out" in text
    assert "rope_scaling" not in neox_config(for_today)


@pytest.mark.parametrize("name", ["rope_scalin", "rotary_pct", "num_layers"])
def test_a_name_that_is_not_there_is_a_usage_error(name: str, tmp_path: Path) -> None:
    root = with_yml(tmp_path, rope_scaling=ROPE)
    text = run(2, "convert", root, tmp_path / "out", "--ignore-key", name)
    assert name in text
    assert "rope_scaling" in text
    with pytest.raises(UsageError):
        plan_of(fixture(PYTHIA), tmp_path / "out", ignore_keys=(name,))


def test_from_python(tmp_path: Path) -> None:
    root = with_yml(tmp_path, rope_scaling=ROPE)
    (key,) = open_checkpoint(str(root)).unknown_keys
    assert key == UnknownKey("neox", "rope_scaling", ROPE, "model", file="zz.yml")
    with pytest.raises(Refused, match="rope_scaling"):
        plan_of(root, tmp_path / "out")
    assert plan_of(root, tmp_path / "out", ignore_keys=("rope_scaling",)).options[
        "ignore_keys"
    ] == ("rope_scaling",)


def test_inspect_lists_them(tmp_path: Path) -> None:
    root = with_yml(tmp_path, rope_scaling=ROPE, my_note="x")
    text = run(0, "inspect", root)
    assert "rope_scaling" in text
    assert "my_note" in text
    keys = {k["name"]: k for k in json.loads(run(0, "inspect", root, "--json"))["unknown_keys"]}
    assert keys["rope_scaling"]["effect"] == "model"
    assert keys["rope_scaling"]["value"] == ROPE
    assert keys["my_note"]["effect"] == "none"


def test_audit_names_them(tmp_path: Path) -> None:
    root = with_yml(tmp_path, rope_scaling=ROPE, my_note="x")
    text = run(3, "audit", root)
    assert "rope_scaling" in text
    assert "my_note" in text


def test_batch_refuses_and_ignores(tmp_path: Path) -> None:
    root, out = with_yml(tmp_path, rope_scaling=ROPE, my_note="x"), tmp_path / "out"
    assert "rope_scaling" in run(1, "batch", root, out)
    words = ["--ignore-key", "rope_scaling", "--ignore-key", "nothing"]
    text = run(0, "batch", root, out, *words)
    assert "rope_scaling: ignored" in text
    assert "my_note" in text
    assert "--ignore-key nothing" in text
    assert "already converted" in run(0, "batch", root, out, *words)


def test_doctor_says_it_and_drops_nothing_in_silence(tmp_path: Path) -> None:
    root, out = with_yml(tmp_path, rope_scaling=ROPE, my_note="x"), tmp_path / "out"
    text = run(4, "doctor", root, "--for", "today")
    assert "so a fork of GPT-NeoX may have written it" in text
    assert "--ignore-key rope_scaling" in text
    assert "rope_scaling" in run(4, "doctor", root, "--for", "today", "--fix", out)
    assert not out.exists()
    words = ["--for", "today", "--fix", out, "--ignore-key", "rope_scaling"]
    text = run(0, "doctor", root, *words)
    assert "dropped: yml: rope_scaling" in text
    assert "dropped: yml: my_note" in text
    assert run(0, "doctor", out, "--for", "today")
    run(2, "doctor", root, "--ignore-key", "rope_scaling")


def test_doctor_warns_of_a_config_json(tmp_path: Path) -> None:
    folder = with_json(tmp_path, logits_scaling=8.0)
    assert "config.json has logits_scaling" in run(
        0, "doctor", folder, "--for", "transformers@5.24"
    )


def test_the_tree_of_the_fork_knows_its_key(tmp_path: Path, trees: Mapping[str, Path]) -> None:
    tree = tmp_path / "fork"
    shutil.copytree(trees["today"], tree)
    arguments = tree / "megatron" / "neox_arguments" / "neox_args.py"
    text = arguments.read_text()
    arguments.write_text(text + "\n\nclass NeoXArgsFork:\n    rope_scaling: dict = None\n")
    root = with_yml(tmp_path, rope_scaling=ROPE)
    assert run(0, "doctor", root, "--for", f"neox:{tree}")
    run(0, "convert", root, tmp_path / "out", "--to", "neox", "--for", f"neox:{tree}")
    assert neox_config(tmp_path / "out")["rope_scaling"] == ROPE


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gpt_neox", {"attention_bias": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
    ],
)
def test_biases_that_config_json_denies(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """transformers drops them, with no more than a warning."""
    folder = make_hf(tmp_path / "hf", family=family, **keys)
    assert open_checkpoint(str(folder)).findings == ()
    path, (key,) = folder / "config.json", keys
    path.write_text(json.dumps({**json.loads(path.read_text()), key: False}))
    (finding,) = open_checkpoint(str(folder)).findings
    assert f"{key}: false" in finding.message


def test_reshard_refuses_and_keeps(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "data" / "reshard" / "fp32"
    root, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(source, root)
    settings = json.dumps({"rope_scaling": ROPE, "my_note": "x"})
    (step_of(root) / "configs" / "zz.yml").write_text(settings)
    assert "rope_scaling" in run(4, "reshard", root, out, "--dp", 2)
    text = run(0, "reshard", root, out, "--dp", 2, "--ignore-key", "rope_scaling")
    assert "rope_scaling: ignored" in text
    assert "my_note" in text
    resumed = read_yml(str(out / "resume.yml"))
    assert (resumed["rope_scaling"], resumed["my_note"]) == (ROPE, "x")
    text = run(0, "export-optimizer", root, tmp_path / "states")
    assert "rope_scaling" in text


def test_a_setting_that_the_named_gpt_neox_does_not_have(
    tmp_path: Path, trees: Mapping[str, Path]
) -> None:
    root = with_yml(tmp_path, moe_use_residual=True, moe_num_experts=1)
    run(0, "convert", root, tmp_path / "dense", "--to", "neox", "--for", "2024-03")
    tree = tmp_path / "older"
    shutil.copytree(trees["2024-03"], tree)
    arguments = tree / "megatron" / "neox_arguments" / "neox_args.py"
    text = arguments.read_text()
    assert "use_qk_layernorm" in text
    arguments.write_text(text.replace("use_qk_layernorm", "use_other"))
    (step_of(root) / "configs" / "zz.yml").write_text('{"use_qk_layernorm": true}')
    words = ["--to", "neox", "--for", f"neox:{tree}"]
    assert "use_qk_layernorm" in run(4, "convert", root, tmp_path / "out", *words)


def test_code_of_a_repository_s_own_is_named(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    folder = with_json(tmp_path, "llama", auto_map=code)
    text = run(0, "convert", folder, tmp_path / "out")
    assert "config.json has auto_map (modeling_mine.MineForCausalLM)" in text
