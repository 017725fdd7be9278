"""What a refusal advises is true in the direction in which it is printed: it is run here."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import edit_yml, set_keys, tokenizer
from click.testing import CliRunner
from common import convert, fixture, make_hf, step_of

from neox_bridge.cli.app import app

MAMBA = Path(__file__).parents[1] / "data" / "mamba" / "checkpoints"
# settings that no family of transformers has, in checkpoints that hold nothing else of them
ONLY_GPT_NEOX: list[tuple[str, dict[str, Any]]] = [
    ("pythia_fp32_pp1_tp2", {"pos_emb": "none"}),
    ("pythia_fp32_pp1_tp2", {"activation": "softsign"}),
    ("pythia_fp32_pp1_tp2", {"use_mup": True}),
    ("pythia_fp32_pp1_tp2", {"attention_config": [[["local"], 2]]}),
    ("pythia_fp32_pp1_tp2", {"sliding_window_width": 4}),
    ("llama_fp32_tp2", {"pos_emb": "none"}),
    ("llama_fp32_tp2", {"gpt_j_residual": True}),
    ("llama_fp32_tp2", {"use_mup": True}),
    ("llama_fp32_tp2", {"attention_config": [[["local"], 2]]}),
]


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout + done.stderr


def commands(text: str) -> list[list[str]]:
    """Every command of this tool that a text names, whole: it begins and its options end it."""
    found = re.findall(r"neox-bridge (convert \S+ \S+(?: --[a-z-]+ [\w@.-]+)*)", text)
    return [shlex.split(command) for command in dict.fromkeys(found)]


def copied(name: str, target: Path, **settings: Any) -> Path:
    shutil.copytree(fixture(name), target)
    edit_yml(**settings)(step_of(target))
    return target


def edit_blocks(root: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for path in sorted(step_of(root).glob("layer_0[23]-model_*.pt")):
        tensors = torch.load(path, weights_only=False)
        change(tensors)
        torch.save(tensors, path)


@pytest.mark.parametrize(("name", "settings"), ONLY_GPT_NEOX)
def test_what_only_gpt_neox_holds_is_moved_by_the_command_that_is_named(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source = copied(name, tmp_path / "run", **settings)
    code, said = run("convert", source, tmp_path / "hf", "--to", "hf")
    assert code == 4
    assert next(iter(settings)) in said
    (command,) = commands(said)
    assert command[1:] == [str(source), str(tmp_path / "hf"), "--to", "neox"]
    assert run(*command)[0] == 0
    for view in (("inspect", source), ("doctor", source, "--for", "transformers@5.24")):
        advised = [c for c in commands(run(*view)[1]) if "neox" in c]
        assert len(advised) == 1
        assert run(*advised[0])[0] == 0
        shutil.rmtree(advised[0][2])


def qk_norms(tensors: dict[str, torch.Tensor]) -> None:
    tensors["attention.qk_layernorm.scale"] = torch.ones(2, 8)


def sinks(tensors: dict[str, torch.Tensor]) -> None:
    tensors["attention.sinks"] = torch.ones(2)


def grouped(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("weight", "bias"):
        key = f"attention.query_key_value.{name}"
        tensors[key] = tensors[key][: len(tensors[key]) * 2 // 3].clone()


@pytest.mark.parametrize(
    ("key", "settings", "change"),
    [
        ("use_qk_layernorm", {"use_qk_layernorm": True}, qk_norms),
        ("rotary_pct", {"num_kv_heads": 2}, grouped),  # of starcoder2, which is nearest
    ],
)
def test_tensors_that_no_family_has_are_moved_by_the_command_that_is_named(
    key: str, settings: dict[str, Any], change: Any, tmp_path: Path
) -> None:
    source = copied("pythia_fp32_pp1_tp2", tmp_path / "run", **settings)
    edit_blocks(source, change)
    code, said = run("convert", source, tmp_path / "out", "--to", "hf")
    assert (code, key in said) == (4, True)
    (command,) = commands(said)
    assert run(*command)[0] == 0


def test_what_cannot_be_moved_is_told_so(tmp_path: Path) -> None:
    """The same answer in both directions, and no command that ends in it again."""
    source = copied("pythia_fp32_pp1_tp2", tmp_path / "run")
    edit_blocks(source, sinks)
    for to in ("hf", "neox"):
        code, said = run("convert", source, tmp_path / "out", "--to", to)
        assert code == 1
        assert "layer 2: attention.sinks" in said
        assert "--to neox" not in said
        assert commands(said) == []


def test_a_mamba_on_two_ranks_is_not_told_to_be_on_one(tmp_path: Path) -> None:
    """--tp 1 is the way out of a target, and this is the source."""
    shutil.copytree(MAMBA, tmp_path / "run")
    for path in sorted(step_of(tmp_path / "run").glob("layer_*-model_00-*")):
        shutil.copy(path, str(path).replace("model_00", "model_01"))
    meta = step_of(tmp_path / "run") / "mp_rank_00_model_states.pt"
    value = torch.load(meta, weights_only=False)
    value["args"]["model_parallel_size"] = 2
    torch.save(value, meta)
    shutil.copy(meta, str(meta).replace("rank_00", "rank_01"))
    edit_yml(model_parallel_size=2)(step_of(tmp_path / "run"))
    code, said = run("convert", tmp_path / "run", tmp_path / "out")
    assert code == 4
    assert "x_proj" in said
    assert "--tp 1" not in said
    # a target is told, and it helps
    hf = make_hf(tmp_path / "hf", family="mamba")
    code, said = run("convert", hf, tmp_path / "two", "--tp", 2)
    assert (code, "--tp 1" in said) == (4, True)
    assert run("convert", hf, tmp_path / "one", "--tp", 1)[0] == 0
    code, said = run("convert", hf, tmp_path / "old", "--for", "neox@2024-10")
    assert (code, "--for today" in said) == (4, True)
    assert run("convert", hf, tmp_path / "new", "--for", "today")[0] == 0


# a model of transformers, the options of its conversion, and what the refusal says to add instead
OPTIONS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"intermediate_size": 200}, ["--for", "neox@2024-09"], ["--for", "today"]),
    ({"family": "llama", "mlp_bias": True}, ["--for", "neox@2024-10"], ["--for", "today"]),
    ({"family": "llama", "hidden_act": "gelu"}, ["--for", "neox@2024-10"], ["--for", "today"]),
    (
        {"family": "llama", "hidden_size": 24, "num_key_value_heads": 1},
        ["--for", "neox@2024-10"],
        ["--gqa-order", "grouped", "--for", "today"],
    ),
    (
        {"family": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        [],
        ["--ignore-key", "rope_scaling"],
    ),
    ({"family": "mistral", "sliding_window": 5}, ["--pp", "0"], ["--layout", "layers"]),
    ({"vocab_size": 300}, ["--vocab-multiple", "128"], ["--vocab-rows", "tokenizer"]),
    ({"vocab_size": 300}, ["--vocab-multiple", "128"], []),
]


@pytest.mark.parametrize(("config", "options", "instead"), OPTIONS)
def test_the_options_that_are_named_help(
    config: dict[str, Any], options: list[str], instead: list[str], tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", **config)
    if "--vocab-multiple" in options:
        tokenizer(hf / "tokenizer.json", 250)
    code, said = run("convert", hf, tmp_path / "out", "--to", "neox", *options)
    assert code == 4
    for option, value in zip(instead[::2], instead[1::2], strict=True):
        assert f"{option} {value}" in said or (option == "--for" and "--for today" in said)
    kept = options if "--vocab-rows" in instead else []
    assert run("convert", hf, tmp_path / "out", "--to", "neox", *kept, *instead)[0] == 0


def test_a_width_that_no_tree_takes_is_not_sent_to_another_tree(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", intermediate_size=201)
    for era in ("neox@2024-03", "neox@2024-10", "today"):
        code, said = run("convert", hf, tmp_path / "out", "--for", era)
        assert (code, "odd" in said, "Use --for" in said) == (4, True, False)


@pytest.mark.parametrize(("tp", "heads"), [(5, 4), (8, 4)])
def test_the_ranks_that_are_named_fit(tp: int, heads: int, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", num_attention_heads=heads)
    code, said = run("convert", hf, tmp_path / "out", "--tp", tp)
    assert code == 4
    (listed,) = re.findall(r"Valid values: ([\d, ]+)", said)
    for fitting in listed.split(", "):
        assert run("convert", hf, tmp_path / fitting, "--tp", fitting)[0] == 0


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}),
        ({"rope_theta": 10000.5}, {"rope_theta": 10000}),
    ],
)
def test_the_values_that_are_named_help(
    config: dict[str, Any], changed: dict[str, Any], tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family="llama")
    path = hf / "config.json"
    told = {**json.loads(path.read_text()), "rope_parameters": None}
    path.write_text(json.dumps({**told, **config}))
    assert run("convert", hf, tmp_path / "out")[0] == 4
    path.write_text(json.dumps({**told, **config, **changed}))
    assert run("convert", hf, tmp_path / "out")[0] == 0


def test_a_reward_model_that_is_tied_is_the_language_model(tmp_path: Path) -> None:
    source = copied("tied_embeddings_fp32_tp2", tmp_path / "run")
    set_keys(step_of(source), train_impl="rm")
    code, said = run("convert", source, tmp_path / "hf")
    assert (code, "set it to normal" in said) == (4, True)
    edit_yml(train_impl="normal")(step_of(source))
    assert run("convert", source, tmp_path / "hf")[0] == 0


def test_a_window_and_biases_are_named(tmp_path: Path) -> None:
    """No relative of Llama has both."""
    hf = make_hf(tmp_path / "hf", family="llama", attention_bias=True)
    convert(hf, tmp_path / "run")
    set_keys(step_of(tmp_path / "run"), sliding_window_width=4)
    code, said = run("convert", tmp_path / "run", tmp_path / "out")
    assert code == 4
    assert "sliding_window_width: this family does not support a sliding window" in said
