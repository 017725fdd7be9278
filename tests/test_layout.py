"""The rules of the tests' own folders."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.name)
def test_what_tests_share_is_a_helper(path: Path) -> None:
    """A test file that another imports would be read twice, and moves with difficulty."""
    shared = sorted(name for name in imported(path) if name.startswith(("test_", "conftest")))
    assert shared == [], f"move what {path.name} needs of {shared} to tests/helpers"
