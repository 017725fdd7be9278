"""Usage errors have one form in every command: ``error: WORD: reason. What to do.``"""

import re

import click
import pytest
from commands import run

from neox_bridge.cli.app import COMMANDS, app

# the arguments of each command that its usage errors come after
ARGUMENTS = {
    "convert": "a b",
    "batch": "a b",
    "inspect": "a",
    "patch": "a",
    "doctor": "a",
    "changes": "",
    "families": "",
    "verify": "a b",
    "diff": "a b",
    "audit": "a",
    "reshard": "a b",
    "export-optimizer": "a b",
    "report": "a",
    "toy": "pythia-70m a",
}
CONTEXT = app.make_context("neox-bridge", ["families"])


def usage_error(*words: str) -> str:
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+[.?]\n", done.stderr), done.stderr
    return done.stderr


def command_named(name: str) -> click.Command:
    command = app.get_command(CONTEXT, name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_does_not_exist(name: str) -> None:
    text = usage_error(name, *ARGUMENTS[name].split(), "--zzz")
    assert text == f"error: --zzz: no such option. Try 'neox-bridge {name} --help'.\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelled_option_names_the_right_one(name: str) -> None:
    for param in command_named(name).params:
        word = max(param.opts, key=len)
        if isinstance(param, click.Option) and len(word) > 6:
            text = usage_error(name, *ARGUMENTS[name].split(), f"{word}x")
            assert text.startswith(f"error: {word}x: no such option. Did you mean ")
            assert word in text.removeprefix(f"error: {word}x")


@pytest.mark.parametrize("name", [name for name, words in ARGUMENTS.items() if words])
def test_a_missing_argument(name: str) -> None:
    text = usage_error(name)
    assert ": missing. " in text
    assert text.startswith("error: ")


@pytest.mark.parametrize(
    "name",
    [name for name in COMMANDS if all(one.nargs == 1 for one in command_named(name).params)],
)
def test_one_argument_too_many(name: str) -> None:
    arguments = [one for one in command_named(name).params if isinstance(one, click.Argument)]
    words = ARGUMENTS[name].split()[: len(arguments)]
    words += ["a"] * (len(arguments) - len(words))
    options = ["--as", "hf"] if name == "toy" else []
    text = usage_error(name, *words, *options, "more")
    assert text == f"error: more: one argument too many. Try 'neox-bridge {name} --help'.\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_values_that_an_option_does_not_take(name: str) -> None:
    words = [name, *ARGUMENTS[name].split()]
    for param in command_named(name).params:
        if not isinstance(param, click.Option):
            continue
        option = param.opts[0]
        if param.is_flag:
            text = usage_error(*words, f"{option}=1")
            assert text == f"error: {option}: takes no value. Try 'neox-bridge {name} --help'.\n"
            continue
        assert usage_error(*words, option).startswith(f"error: {option}: needs a value. ")
        if isinstance(param.type, click.Choice):
            text = usage_error(*words, option, "nonsense")
            assert text.startswith(f"error: {option}: 'nonsense' is not one of ")
        elif param.type.name == "number":
            text = usage_error(*words, option, "-1")
            assert text.startswith(f"error: {option}: must be a")
            assert text.endswith(", not '-1'.\n")


def test_a_misspelled_value_names_the_right_one() -> None:
    text = usage_error("convert", "a", "b", "--dtype", "bf61")
    assert text.endswith("Did you mean bf16?\n")
    text = usage_error("toy", "pythia-70", "a", "--as", "hf")
    assert "Did you mean pythia-70m" in text


def test_commands() -> None:
    assert usage_error("conver", "a") == "error: conver: no such command. Did you mean convert?\n"
    assert usage_error("x") == "error: x: no such command. Try 'neox-bridge --help'.\n"
    assert usage_error("--versio") == "error: --versio: no such option. Did you mean --version?\n"


@pytest.mark.parametrize(
    "words",
    [
        "verify a --tokens x",
        "verify a --logits",
        "inspect a --security --stats",
        "inspect a --max-workers 2",
        "doctor a --fix b --in-place",
        "doctor a --recompute",
        "audit a --against b --same-init",
        "batch a b --interval 3",
        "batch a b --address x",
        "convert a b --private",
        "convert a b --for transformers@4.48 --to neox",
        "convert a b --for nonsense",
        "convert a b --shard-size much",
        "convert a b --vocab-rows some",
        "changes --since yesterday",
        "diff a b --plot page.html",
    ],
)
def test_what_our_own_code_notices(words: str) -> None:
    text = usage_error(*words.split())
    assert re.match(r"error: --?[a-z-]+(, --?[a-z-]+)*( \w+)?: ", text), text
