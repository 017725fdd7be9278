"""Options are declared once; help, completion and the batch file's schema come from that."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest
import yaml
from commands import run
from common import fixture
from jsonschema import Draft202012Validator

from neox_bridge.cli.app import COMMANDS, SHELLS, app
from neox_bridge.cli.batch_schema import batch_file_schema
from neox_bridge.cli.command import Command, Parameter
from neox_bridge.frameworks.eras import ERAS
from neox_bridge.frameworks.targets import NEOX_NAMES, TRANSFORMERS_NAMES, target_named
from neox_bridge.option import GROUPS, options_of
from neox_bridge.planning.options import Options

SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "batch-file.schema.json"
# the names in annotations of groups, which are imported for type checkers only
HOMES = {
    "neox_bridge.frameworks.change": ("Framework", "Moment"),
    "neox_bridge.frameworks.eras": ("Era", "InvFreq", "MlpNames"),
    "neox_bridge.frameworks.targets": ("Target",),
    "neox_bridge.layouts.checkpoint": ("HeadChoice", "Kind", "LayoutName"),
    "neox_bridge.optimizer.gradient_scale": ("Engine",),
    "neox_bridge.tensors.fused": ("GqaOrder",),
}


def command(name: str) -> Command:
    known = app.get_command(click.Context(app), name)
    assert isinstance(known, Command)
    return known


def groups() -> list[type]:
    parts = [part for name in COMMANDS for part in command(name).parts]
    kinds = [part[0] if isinstance(part, tuple) else part for part in parts]
    return list(dict.fromkeys(kind for kind in kinds if is_dataclass(kind)))


# --- declarations


@pytest.mark.parametrize("group", groups(), ids=lambda group: group.__name__)
def test_choices_are_those_of_the_type(group: type) -> None:
    """An option takes every word that the type has, and no other."""
    from importlib import import_module

    names = {n: getattr(import_module(home), n) for home, ns in HOMES.items() for n in ns}
    hints = get_type_hints(group, localns=names)
    for name, declared in options_of(group).items():
        words = {word for word in flat(hints[name]) if isinstance(word, str)}
        # Options.format has the forms of any library; vocab_rows and hash are parsed
        if words and declared.value != "rows":
            assert set(declared.choices) == words, name
        assert set(declared.aliases.values()) <= set(declared.choices)
        assert declared.heading in GROUPS
        assert declared.text.endswith("."), name


def flat(hint: Any) -> list[Any]:
    parts = get_args(hint)
    return [word for part in parts for word in flat(part)] if parts else [hint]


def test_no_command_has_an_option_twice() -> None:
    for name in COMMANDS:
        params = command(name).params
        words = [word for param in params for word in (*param.opts, *param.secondary_opts)]
        assert len(words) == len(set(words)), name
        assert len({param.name for param in params}) == len(params)


def test_what_the_function_gets_are_the_values_of_the_fields() -> None:
    for group in groups():
        assert set(options_of(group)) == {entry.name for entry in fields(group)}


# --- help


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_is_the_common_part_of_the_long_one(name: str) -> None:
    short, full = run(name, "-h").stdout, run(name, "--help").stdout
    declared = [p for p in command(name).params if isinstance(p, Parameter)]
    for param in declared:
        row = rf"^  (-\w, )?{re.escape(param.opts[0])}\b"
        assert re.search(row, full, re.MULTILINE), param.name
        assert bool(re.search(row, short, re.MULTILINE)) == param.declared.common, param.name
    assert short.startswith(f"Usage: neox-bridge {name} [OPTIONS]")
    assert f"`neox-bridge {name} --help` explains" in short
    assert len(short) <= len(full) or len(declared) < 3
    assert "Examples:" not in short
    assert "Example" in full


@pytest.mark.parametrize("words", [[], ["convert"], ["export-optimizer"]])
def test_help_is_a_command_too(words: list[str]) -> None:
    asked = run("help", *words)
    assert (asked.exit_code, asked.stdout) == (0, run(*words, "--help").stdout)
    assert asked.stdout.startswith("Usage: ")


def test_help_of_an_unknown_command_is_a_usage_error() -> None:
    assert run("help", "convrt").exit_code == 2
    assert "convrt: no such command. Did you mean convert?" in run("help", "convrt").stderr


def test_short_help_of_all_commands() -> None:
    short, full = run("-h").stdout, run("--help").stdout
    assert "Exit codes" in full
    assert "Exit codes" not in short
    assert all(re.search(rf"^  {name} ", short, re.MULTILINE) for name in COMMANDS)


# --- completion


def complete(shell: str, words: str) -> str:
    typed = words.split(" ")
    environment = {
        **os.environ,
        "_NEOX_BRIDGE_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": typed[-1] if shell == "fish" else str(len(typed) - 1),
    }
    program = [sys.executable, "-m", "neox_bridge"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_options_and_words(shell: str) -> None:
    assert "convert" in complete(shell, "neox-bridge con")
    assert "--dtype" in complete(shell, "neox-bridge convert --dt")
    assert "bfloat16" in complete(shell, "neox-bridge convert --dtype bfl")
    assert "bfloat16" not in complete(shell, "neox-bridge convert --dtype fl")


def test_completion_knows_what_for_takes() -> None:
    for name in ("convert", "reshard", "doctor"):
        words = complete("bash", f"neox-bridge {name} --for ")
        for era in ERAS:
            assert f"neox@{era.name}\n" in words
        assert ("transformers@4.48\n" in words) == (name != "reshard")
    assert complete("bash", "neox-bridge convert --for neox@2024-0").split() == [
        "plain,neox@2024-03",
        "plain,neox@2024-09",
    ]
    for offered in (*NEOX_NAMES, *TRANSFORMERS_NAMES):
        if offered not in ("neox:", "transformers"):  # a folder follows; the installed one
            target_named(offered)


def test_the_defaults_of_choices_for_gpt_neox_are_in_the_help() -> None:
    texts = {name: declared.text for name, declared in options_of(Options).items()}
    for name in ("era", "pp", "layout", "inv_freq", "mlp_names"):
        assert "Default: " in texts[name], name


@pytest.mark.parametrize("shell", SHELLS)
def test_the_documented_command_sets_completion_up(shell: str, tmp_path: Path) -> None:
    """As docs/index.md says it, in the shell itself where that is installed."""
    script = run("--completion", shell)
    assert script.exit_code == 0
    assert f"_NEOX_BRIDGE_COMPLETE={shell}_complete" in script.stdout
    assert f"neox-bridge --completion {shell}" in run("--help").stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    tool = tmp_path / "neox-bridge"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m neox_bridge "$@"\n')
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ask = {
        "bash": "COMP_WORDBREAKS='=@:'\n"
        'eval "$(neox-bridge --completion bash)"\n'
        "complete_words() { COMPREPLY=(); COMP_WORDS=($@); COMP_CWORD=$(($# - 1))\n"
        "_neox_bridge_completion neox-bridge; echo ${COMPREPLY[@]}; }\n"
        "complete_words neox-bridge verify --dev; complete_words neox-bridge conv\n"
        "complete_words neox-bridge convert --dtype bfl; echo $COMP_WORDBREAKS",
        "zsh": 'autoload -U compinit; compinit -u; eval "$(neox-bridge --completion zsh)"\n'
        "echo ${_comps[neox-bridge]}",
        "fish": "neox-bridge --completion fish | source\ncomplete -C 'neox-bridge verify --dev'",
    }[shell]
    done = subprocess.run(
        [shell, "-c", ask], env=environment, capture_output=True, text=True, timeout=60
    )
    wanted = "_neox_bridge_completion" if shell == "zsh" else "--device"
    assert done.stdout.strip().startswith(wanted), done.stderr
    if shell == "bash":
        assert done.stdout.split() == ["--device", "convert", "bfloat16", "=:"]  # not @


# --- the batch file


def test_the_schema_of_a_batch_file_is_up_to_date() -> None:
    """python -m neox_bridge.cli.batch_schema writes it."""
    schema = batch_file_schema()
    Draft202012Validator.check_schema(schema)
    assert json.loads(SCHEMA.read_text()) == schema


def test_what_the_schema_allows_is_what_batch_takes(tmp_path: Path) -> None:
    good: dict[str, Any] = {
        "sources": [str(fixture("pythia_fp32_pp0_tp1"))],
        "target": str(tmp_path / "out"),
        "dtype": "fp16",
        "steps": "last",
        "retries": 1,
        "dry-run": True,
        "shard-size": "1MB",
    }
    validator = Draft202012Validator(batch_file_schema())
    path = tmp_path / "suite.yml"

    def code(settings: dict[str, Any]) -> int:
        path.write_text(yaml.safe_dump(settings))
        return run("batch", path).exit_code

    assert validator.is_valid(good)
    assert code(good) == 0
    for change, ends in (
        ({"dtype": "int8"}, 2),
        ({"retries": -1}, 2),
        ({"overwrite": "maybe"}, 1),
        ({"nonsense": 1}, 1),
        ({"target": None}, 1),
    ):
        assert not validator.is_valid(good | change), change
        assert code(good | change) == ends, change
    assert not (tmp_path / "out").exists()
