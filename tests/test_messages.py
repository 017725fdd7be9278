"""Messages: those of the library speak of parameters, and every one of them has an example."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import message_record
import message_sites
import pytest

import neox_bridge
from neox_bridge.cli.spelling import as_options
from neox_bridge.documents import plain_data

ROOT = Path(neox_bridge.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# doctor and the list of changes advise whole commands; report draws with CSS variables; extras.py
# advises commands of pip, uv and pipx; patch/script… names the options of GPT-NeoX's scripts; the
# others speak to git and describe options for --help
APART = (
    *("cli/", "doctor/", "extras.py", "frameworks/changes_", "patch/script", "report/"),
    "frameworks/collect_keys.py",
)
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


@pytest.mark.slow
def test_every_message_has_an_example() -> None:
    """The page of messages shows it. ``messages_without.txt`` counts those without, and shrinks."""
    problems = message_record.problems(message_record.read_record(), message_record.read_without())
    assert not problems, "\n".join([*problems, "Run: make messages (ARGS=TEST if new)"])


SOURCE = """
from neox_bridge.errors import BridgeError, Refused

def open_it(path, size):
    if not size:
        raise _damaged(path, f"it is {size} bytes long")
    message = "the config names no layers"
    yield Finding("no-layers", "warning", message, f"name them: `layers={some(size, 3)}`")
    raise Refused(f"{path}: {len(size)} layers.")

def _damaged(path, what) -> BridgeError:
    return BridgeError(f"{path} is damaged: {what}.")
"""


@pytest.mark.parametrize("above", ["", "\n\n# something new\n"])
def test_messages_are_read_from_the_source(tmp_path: Path, above: str) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "one.py").write_text(above + SOURCE)
    (tmp_path / "errors.py").write_text(
        "class BridgeError(Exception):\n    pass\n\n"
        "class Refused(BridgeError):\n    exit_code = 4\n"
    )
    messages = message_sites.Package(tmp_path).messages
    assert [(one.result, one.code, one.severity, one.words) for one in messages.values()] == [
        (1, "", "", "{path} is damaged: it is {size} bytes long."),
        (
            message_sites.FINDING,
            "no-layers",
            "warning",
            "the config names no layers. name them: `layers={size}`",
        ),
        (4, "", "", "{path}: {number of size} layers."),
    ]
    assert list(messages)[2] == "room/one.py:open_it#0bb195b3"  # wherever it stands in the file


@pytest.mark.slow
def test_messages_are_recorded(tmp_path: Path) -> None:
    """An error that a function words for its callers is the caller's message."""
    test = "tests/formats/test_torch_files.py::test_refused_zips[no pickle]"
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--record-messages"]
    subprocess.run(
        [*command, str(record), test], cwd=ROOT.parents[1], check=True, stdout=subprocess.DEVNULL
    )
    messages = message_sites.package().messages
    (entry,) = message_record.read_record(record).items()
    words = "{} is not a complete PyTorch file: data.pkl is missing. Download or copy it again."
    assert messages[entry[0]].words == words.format("{path}")
    assert entry[1] == {"example": words.format("new.pt"), "test": test}
