"""The tests of the patcher on the sources of the real GPT-NeoX."""

from pathlib import Path

import pytest
from test_cli import run
from test_patcher import *  # noqa: F403
from test_patcher import blocks_of_the_page, shown_changes

pytestmark = pytest.mark.neox


def test_the_page_shows_what_happens_line_by_line(today: Path) -> None:
    shown = shown_changes(blocks_of_the_page()["console"])
    assert shown == shown_changes(run("patch", today).stdout)
