"""The files of the repository that no program reads agree with each other."""

import json
import re
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
AREAS: dict[str, Any] = run_path(str(ROOT / "tests" / "mutants" / "areas.py"))["AREAS"]


def test_pre_commit_runs_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    commands = [line.strip().replace("$(DEV)", ".venv") for line in recipe.splitlines()]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == commands
    assert all(not hook["pass_filenames"] for hook in hooks)


@pytest.mark.parametrize("area", AREAS)
def test_the_areas_of_mutants_name_files(area: str) -> None:
    assert [path for path in AREAS[area].tests if not (ROOT / path).is_file()] == []
    assert [pattern for pattern in AREAS[area].patterns() if not any(ROOT.glob(pattern))] == []


def test_mutants_that_change_nothing_are_of_lines_that_exist() -> None:
    text = (ROOT / "tests" / "mutants" / "equivalent.jsonl").read_text(encoding="utf-8")
    stale = []
    for entry in map(json.loads, text.splitlines()):
        source = (ROOT / entry["file"]).read_text(encoding="utf-8")
        lines = {line.split("  # ")[0].strip() for line in source.splitlines()}
        if entry["before"] not in lines:
            stale.append((entry["file"], entry["before"]))
    assert stale == []


def test_the_source_distribution_includes_what_exists() -> None:
    (names,) = re.findall(r"^include = \[(.*)\]$", PYPROJECT, re.MULTILINE)
    included = re.findall(r'"([^"]+)"', names)
    assert {"src", "tests", "docs"} <= set(included)
    assert [name for name in included if not (ROOT / name).exists()] == []


def test_the_table_of_rooms_is_the_import_contract() -> None:
    """Every room, from the top down as the contract has them; beside each other in any order."""
    (layers,) = re.findall(r"^layers = \[\n((?:  .*\n)+)\]", PYPROJECT, re.MULTILINE)
    contract = [set(re.findall(r"\w+", line)) for line in layers.splitlines()]
    rows = re.findall(r"^\| (`.*?) \| ", CONTRIBUTING, re.MULTILINE)
    table = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert [layer for layer in contract for _ in layer] == [
        next((layer for layer in contract if name in layer), name) for name in table
    ]
    assert set(table) == set().union(*contract)


def test_every_marker_is_explained() -> None:
    from needs import MARKERS

    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", CONTRIBUTING, re.MULTILINE)
    explained = {name: text.partition(";")[0] for name, text in rows}
    assert explained == MARKERS


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_pages_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert [name for name in targets if "://" not in name and not (ROOT / name).exists()] == []
