"""Copies of GPT-NeoX's source trees, which a test may edit."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from stand_in_trees import NAMES


@pytest.fixture(params=NAMES)
def tree(request: pytest.FixtureRequest, trees: Mapping[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trees[request.param], tmp_path / request.param))


@pytest.fixture
def today(trees: Mapping[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trees["today"], tmp_path / "today"))
