"""Every document that ``--json`` prints follows the schema that the documentation publishes."""

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run, run
from common import TESTS
from hub_stub import Stub, serving
from jsonschema import Draft202012Validator
from stand_in_trees import write_tree
from tiny import write_hf

from neox_bridge.cli.app import COMMANDS, app

DOCS = TESTS.parent / "docs"
sys.path.insert(0, str(DOCS))
import _schemas  # noqa: E402

sys.path.remove(str(DOCS))
RUN = TESTS / "data" / "reshard" / "bf16_tp2_dp2"
SCHEMAS = _schemas.schemas()
# the schema, the words of a command, and its exit code where that is not 0
CASES: tuple[tuple[str, str, int], ...] = (
    ("conversion", "convert hf out --tp 2 --json", 0),
    ("conversion", "convert run exported --no-verify --json", 0),
    ("plan", "convert hf out --dry-run --json", 0),
    ("conversion", "reshard run out --dp 1 --json", 0),
    ("plan", "reshard run out --dp 1 --dry-run --json", 0),
    ("conversion", "export-optimizer run out --json", 0),
    ("conversion", "toy pythia-70m out --as hf --layers 1 --json", 0),
    ("batch", "batch steps out --json", 0),
    ("batch", "batch steps missing out --json", 1),
    ("batch-plan", "batch steps out --dry-run --json", 0),
    ("batch-plan", "batch steps missing out --dry-run --json", 1),
    ("inspect", "inspect hf --tensors --stats --json", 0),
    ("inspect", "inspect run --optimizer --stats --json", 0),
    ("inspect-stored", "inspect quantized --tensors --json", 0),
    ("inspect-security", "inspect hostile.bin --security --json", 1),
    ("verify", "verify hf neox --json", 0),
    ("verify", "verify hf other --json", 3),
    ("verify", "verify quantized quantized --json", 0),
    ("verify-record", "verify neox --json", 0),
    ("diff", "diff hf neox --json", 0),
    ("diff", "diff hf other --json", 3),
    ("diff", "diff hf quantized --json", 3),
    ("audit", "audit run --optimizer --json --cache none", 0),
    ("audit", "audit steps --json --cache none", 3),
    ("against", "audit steps --against steps --json --cache none", 0),
    ("doctor", "doctor hf neox --json", 0),
    ("doctor", "doctor neox --for today --compare --json", 0),
    ("doctor", "doctor neox --error traceback.txt --json", 0),
    ("doctor", "doctor hf --for transformers@4.28 --fix fixed --json", 0),
    ("patch", "patch tree --dry-run --json", 0),
    ("changes", "changes --for hf --json", 0),
    ("families", "families --json", 0),
    ("report", "report hf -o page.html --json", 0),
)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("json")
    hf = write_hf(folder / "hf")
    write_hf(folder / "other", seed=1)
    for step in (1, 2):
        shutil.copytree(hf, folder / "steps" / f"step{step}")
    shutil.copytree(RUN, folder / "run")
    indices = {"gpt_neox.layers.0.attention.dense.g_idx": np.zeros(8, np.int32)}
    write_hf(folder / "quantized", changed=indices, quantization_config={"bits": 4})
    assert run("convert", hf, folder / "neox", "--tp", "2").exit_code == 0
    write_tree("2024-03", folder / "tree")
    (folder / "hostile.bin").write_bytes(pickle.dumps(Hostile()))
    (folder / "traceback.txt").write_text(
        "RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:\n"
        '\tMissing key(s) in state_dict: "attention.rotary_emb.inv_freq".\n'
    )
    return folder


@pytest.fixture
def cwd(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "cwd"))
    return tmp_path / "cwd"


def strict(schema: Any) -> Any:
    """The schema without room for keys that it does not name."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed["additionalProperties"] = False
    return closed


def check(name: str, document: Any) -> None:
    Draft202012Validator(strict(SCHEMAS[name])).validate(document)
    assert next(iter(document)) == "schema_version"


@pytest.mark.parametrize(("schema", "words", "code"), CASES)
def test_documents_follow_their_schemas(schema: str, words: str, code: int, cwd: Path) -> None:
    done = run(*words.split())
    assert done.exit_code == code, done.output
    check(schema, json.loads(done.stdout, parse_constant=pytest.fail))


def test_every_command_with_json_is_covered() -> None:
    context = app.make_context("neox-bridge", ["families"])
    commands = {name: app.get_command(context, name) for name in COMMANDS}
    with_json = {
        name
        for name, command in commands.items()
        if command is not None and any("--json" in param.opts for param in command.params)
    }
    assert {words.split()[0] for _, words, _ in CASES} == with_json == set(COMMANDS)
    on_the_hub = {"published"}
    assert {schema for schema, _, _ in CASES} | on_the_hub == set(SCHEMAS)


@pytest.fixture
def hub() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


def test_documents_of_the_hub_follow_their_schemas(hub: Stub, cwd: Path) -> None:
    command = Run(hub, cwd)
    words = ("convert", "hf", "hf://org/model", "--tp", "2")
    check("plan", command.json(*words, "--dry-run"))
    written = command.json(*words)
    check("conversion", written)
    assert (written["source"]["path"], written["target"]["path"]) == ("hf", "hf://org/model")
    again = command.json(*words)
    check("published", again)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("convert hf out --json", ("hf", "out")),
        ("convert hf out --dry-run --json", ("hf", "out")),
        ("reshard run out --json", ("run", "out")),
        ("verify hf neox --json", ("hf", "neox")),
        ("diff hf ./neox --json", ("hf", "./neox")),
    ],
)
def test_both_sides_are_named_as_given(words: str, names: tuple[str, str], cwd: Path) -> None:
    document = json.loads(run(*words.split()).stdout)
    keys = ("first", "second") if words.startswith("diff") else ("source", "target")
    sides = [document[key] for key in keys]
    assert tuple(one if isinstance(one, str) else one["path"] for one in sides) == names


def test_a_batch_with_a_missing_source_does_not_hold(cwd: Path) -> None:
    done = run("batch", "steps", "missing", "out", "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["holds"]) == (1, False)
    assert [finding["severity"] for finding in document["findings"]] == ["error"]
    assert document["sources"] == ["steps", "missing"]
    assert {row["status"] for row in document["rows"]} == {"done"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["properties"]["schema_version"]["const"] == 1


def test_the_page_lists_every_schema() -> None:
    assert _schemas.table() in (DOCS / "reference" / "schemas.md").read_text(encoding="utf-8")
