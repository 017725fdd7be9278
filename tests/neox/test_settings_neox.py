"""The yml files that GPT-NeoX ships have no unknown keys."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from stand_in_trees import NAMES

from neox_bridge.errors import BridgeError
from neox_bridge.formats.yml import read_yml
from neox_bridge.frameworks.check_keys import unknown_in_yml

pytestmark = pytest.mark.neox


@pytest.mark.parametrize("name", NAMES)
def test_no_key_of_a_shipped_yml_is_unknown(name: str, trees: Mapping[str, Path]) -> None:
    paths = sorted((trees[name] / "configs").rglob("*.yml"))
    assert len(paths) > 40
    for path in paths:
        try:
            raw = read_yml(str(path))
        except BridgeError:  # configs/mamba/mamba-130M.yml of 2024-09 is not valid yml
            continue
        assert unknown_in_yml(raw) == (), path
