"""The library speaks of parameters; only the command line speaks of options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import neox_bridge
from neox_bridge.cli.spelling import as_options
from neox_bridge.documents import plain_data

ROOT = Path(neox_bridge.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# doctor and the list of changes advise whole commands; report draws with CSS variables; the last
# two speak to git and describe options for --help
APART = ("cli/", "doctor/", "frameworks/changes_", "report/", "frameworks/collect_keys.py")
APART_NAMES = ("options.py", "page.py")
COMMAND = re.compile(r"neox-bridge |`ray start |huggingface-cli |hf download ")


def _texts(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            docs |= {id(part) for part in parts}
            yield "{}".join(str(part.value) for part in parts)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ):
            yield node.value


def test_messages_of_the_library_name_no_options() -> None:
    """A word of a command alone, such as "--to", is no message, and a whole command is advice."""
    wrong = [
        f"{name}: {text}"
        for path in sorted(ROOT.rglob("*.py"))
        if not (name := path.relative_to(ROOT).as_posix()).startswith(APART)
        and not name.endswith(APART_NAMES)
        for text in _texts(path)
        if OPTION.search(text) and not OPTION.fullmatch(text) and not COMMAND.search(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("library", "command_line"),
    [
        ("Use `tp=3`.", "Use --tp 3."),
        ("Leave `era=` out.", "Leave --for out."),
        ("`ignore_keys=rope_scaling`: no such key", "--ignore-key rope_scaling: no such key"),
        ("Say `overwrite=True`, or `workers=1`.", "Say --overwrite, or --max-workers 1."),
        ("`latest` names `global_step3`; `tie_word_embeddings: false`", None),
    ],
)
def test_the_command_line_shows_parameters_as_options(
    library: str, command_line: str | None
) -> None:
    assert as_options(library) == (command_line or library)


def test_json_keeps_names_as_they_are() -> None:
    document = {"path": "`tp=3`", "findings": [{"code": "x", "message": "Use `tp=3`"}]}
    assert plain_data(document, as_options) == {
        "path": "`tp=3`",
        "findings": [{"code": "x", "message": "Use --tp 3"}],
    }


@pytest.mark.parametrize("key", ["message", "remedy", "reason", "way_out", "text", "note", "error"])
def test_json_shows_options_in_every_sentence(key: str) -> None:
    """``way_out`` is of a refusal, ``text`` of a cause that verify names."""
    assert plain_data({key: "Use `era=today`"}, as_options) == {key: "Use --for today"}
