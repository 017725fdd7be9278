"""The stand-ins of tests/helpers/stand_in_trees.py are like the real GPT-NeoX of their dates."""

import ast
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import collect_keys
import pytest
import stand_in_trees
from stand_in_trees import NAMES

from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.source_tree import read_tree
from neox_bridge.patch.patcher import FilePatch, plan_patch
from neox_bridge.patch.scripts import plan_scripts
from neox_bridge.patch.train_scripts import plan_train

pytestmark = pytest.mark.neox


@pytest.fixture(params=NAMES)
def pair(
    request: pytest.FixtureRequest, trees: Mapping[str, Path], tmp_path: Path
) -> tuple[Path, Path]:
    """A stand-in and the real tree of its date."""
    stand_in = stand_in_trees.write_tree(request.param, tmp_path / request.param)
    return stand_in, trees[request.param]


def test_the_same_facts_stand_in_the_same_files(pair: tuple[Path, Path]) -> None:
    stand_in, real = (read_tree(str(tree)) for tree in pair)
    assert facts_alone(stand_in) == facts_alone(real)
    assert files_of_places(stand_in) == files_of_places(real)


def facts_alone(facts: TreeFacts) -> TreeFacts:
    return replace(facts, name="", until="", places={})


def files_of_places(facts: TreeFacts) -> dict[str, str]:
    return {fact: place.split(":")[0] for fact, place in facts.places.items()}


def test_the_patch_makes_the_same_edits(pair: tuple[Path, Path]) -> None:
    stand_in, real = (plan_patch(tree) for tree in pair)
    assert [replace(place, line=0) for place in stand_in.places] == [
        replace(place, line=0) for place in real.places
    ]
    for ours, theirs in zip(stand_in.files, real.files, strict=True):
        assert ours.path == theirs.path
        assert [c.what for c in ours.changes] == [c.what for c in theirs.changes]
        assert changed_lines(ours.diff) == changed_lines(theirs.diff)


def test_the_training_scripts_get_the_same_lines(pair: tuple[Path, Path]) -> None:
    ours, theirs = ({f.path: changed_lines(f.diff) for f in plan_train(t).files} for t in pair)
    assert ours == theirs
    assert len(ours) == 4


def test_the_scripts_have_the_same_options(pair: tuple[Path, Path]) -> None:
    """With their defaults, which the patch copies."""
    stand_in, real = ({file.path: options(file) for file in plan_scripts(t).files} for t in pair)
    assert stand_in == real


def options(file: FilePatch) -> dict[str, tuple[str, ...]]:
    """The options of a script's parser, each with what it does but for its help and choices."""
    declared = {}
    for node in ast.walk(ast.parse(file.old)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.add_argument":
            more = [(k.arg, ast.unparse(k.value)) for k in node.keywords]
            more = [pair for pair in more if pair[0] not in ("help", "choices")]
            declared[ast.unparse(node.args[0])] = tuple(f"{name}={value}" for name, value in more)
    return declared


def changed_lines(diff: str) -> list[str]:
    """Without the blank ones, which a diff may show before or after the lines that they part."""
    return [line for line in diff.splitlines() if line[:1] in "+-" and line[1:].strip()]


def test_no_function_body_is_a_copy(pair: tuple[Path, Path]) -> None:
    """Names, signatures and single calls are facts of the format; whole bodies are not."""
    stand_in, real = pair
    compared = 0
    for path in sorted(stand_in.rglob("*.py")):
        theirs = function_bodies(real / path.relative_to(stand_in))
        for name, body in function_bodies(path).items():
            compared += name in theirs
            assert theirs.get(name) != body, (path, name)
    assert compared > 10


def function_bodies(path: Path) -> dict[str, str]:
    """The code of each function of a file, without comments and spacing, by its class and name."""
    module = ast.parse(path.read_text())
    owners = [module, *(node for node in module.body if isinstance(node, ast.ClassDef))]
    return {
        f"{getattr(owner, 'name', '')}.{node.name}": "\n".join(map(ast.unparse, node.body))
        for owner in owners
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_keys_are_those_of_the_git_directory() -> None:
    git = os.environ.get("GPT_NEOX_GIT")
    if not git:
        pytest.skip("no GPT_NEOX_GIT")
    stored = json.loads(files("neox_bridge.frameworks").joinpath("keys.json").read_text())
    assert collect_keys.gpt_neox(git) == stored["gpt_neox"]
