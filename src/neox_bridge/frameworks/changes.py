"""The one list of changes of GPT-NeoX and transformers.

To add a change, add an entry to ``changes_neox.py`` or ``changes_transformers.py`` with an example
in ``tests/frameworks/test_changes.py``, and generate the page:
``python -m neox_bridge.frameworks.page docs/reference/changes.md``.
"""

import re

from neox_bridge.frameworks.change import (
    Change,
    Described,
    Framework,
    Moment,
    not_after,
    not_before,
    version_key,
)
from neox_bridge.frameworks.changes_neox import NEOX
from neox_bridge.frameworks.changes_transformers import TRANSFORMERS


def _age(change: Change) -> tuple[str, tuple[int, ...], str]:
    return change.date, version_key(change.version) if change.version else (), change.id


HISTORY: tuple[Change, ...] = tuple(sorted((*NEOX, *TRANSFORMERS), key=_age, reverse=True))
"""Every change, newest first."""
CHANGES: tuple[Change, ...] = tuple(change for change in HISTORY if change.title)
"""The changes that users are shown."""
_BY_ID = {change.id: change for change in HISTORY}


def change_named(change_id: str) -> Change:
    """The entry with this id. Raises KeyError."""
    return _BY_ID[change_id]


def proposal_with(key: str = "", tensor: str = "") -> Change | None:
    """The proposed change that adds this key of the yml, or this tensor of a block."""
    for change in HISTORY:
        pattern = change.adds_tensors if tensor else ""
        if change.proposed and (
            key in change.adds_keys or (pattern and re.search(pattern, tensor))
        ):
            return change
    return None


def since(change_id: str) -> str:
    """When a change was made, for sentences: a commit with its date, or a version."""
    return change_named(change_id).since


def select(
    framework: Framework | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    checkpoint: Described | None = None,
) -> list[Change]:
    """The changes of a framework, in a span (both ends included), that affect a checkpoint."""
    return [
        change
        for change in CHANGES
        if framework in (None, change.framework)
        and (since is None or not_before(change, since))
        and (until is None or not_after(change, until))
        and (checkpoint is None or touches(change, checkpoint))
    ]


def touches(change: Change, checkpoint: Described) -> bool:
    """Whether a change affects this checkpoint, as far as its content tells."""
    return change.in_checkpoint is not None and change.in_checkpoint(checkpoint)
