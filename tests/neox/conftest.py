"""Where the real GPT-NeoX is, and the table of what loads in it."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from common import make_hf
from loads_table import write_table
from real_neox import with_tokenizer
from real_trees import RealTrees


@pytest.fixture(scope="session")
def neox_python() -> str:
    home = os.environ.get("NEOX_HOME", "")
    python = os.environ.get("NEOX_PYTHON") or f"{home}/venv/bin/python"
    if not Path(python).exists():
        pytest.skip("no NEOX_HOME (trees and venv), no NEOX_TREE with NEOX_PYTHON")
    return python


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The sources of the real trees by date, in place of the stand-ins of tests/conftest.py."""
    return RealTrees(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session", autouse=True)
def table() -> Iterator[None]:
    yield
    write_table()


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of fewer entries than it has rows."""
    return with_tokenizer(make_hf(tmp_path_factory.mktemp("source") / "hf", num_hidden_layers=4))
