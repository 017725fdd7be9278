"""The tests of the tree reader on the sources of the real GPT-NeoX."""

import pytest
from test_source_tree import *  # noqa: F403

pytestmark = pytest.mark.neox
