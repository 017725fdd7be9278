"""The yml files that GPT-NeoX ships have no unknown keys."""

import os
from pathlib import Path

import pytest

from neox_bridge.errors import BridgeError
from neox_bridge.formats.yml import read_yml
from neox_bridge.frameworks.check_keys import unknown_in_yml

pytestmark = pytest.mark.neox
NAMES = ("gpt-neox", "neox-2024-03", "neox-2024-09", "neox-2024-10")


def trees() -> list[Path]:
    """The trees of NEOX_HOME, or the one of NEOX_TREE."""
    home, tree = os.environ.get("NEOX_HOME"), os.environ.get("NEOX_TREE")
    folders = [Path(home) / name for name in NAMES] if home else [Path(tree)] if tree else []
    return [folder for folder in folders if folder.is_dir()]


@pytest.mark.parametrize("tree", trees(), ids=lambda tree: tree.name)
def test_no_key_of_a_shipped_yml_is_unknown(tree: Path) -> None:
    paths = sorted((tree / "configs").rglob("*.yml"))
    assert len(paths) > 40
    for path in paths:
        try:
            raw = read_yml(str(path))
        except BridgeError:  # configs/mamba/mamba-130M.yml of 2024-09 is not valid yml
            continue
        assert unknown_in_yml(raw) == (), path
