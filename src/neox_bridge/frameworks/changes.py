"""Every known change of GPT-NeoX and transformers that alters what a checkpoint holds or means.

Adding one is adding one entry to ``changes_neox.py`` or ``changes_transformers.py``, with an
example in ``tests/frameworks/test_changes.py``, and writing ``docs/changes.md`` anew:
``python -m neox_bridge.frameworks.page docs/changes.md``.
"""

from neox_bridge.frameworks.change import (
    Change,
    Framework,
    Moment,
    not_after,
    not_before,
    version_key,
)
from neox_bridge.frameworks.changes_neox import NEOX
from neox_bridge.frameworks.changes_transformers import TRANSFORMERS
from neox_bridge.frameworks.described import Described


def _age(change: Change) -> tuple[str, tuple[int, ...], str]:
    return change.date, version_key(change.version) if change.version else (), change.id


CHANGES: tuple[Change, ...] = tuple(sorted((*NEOX, *TRANSFORMERS), key=_age, reverse=True))


def change_named(change_id: str) -> Change:
    """The entry with this id. Raises KeyError."""
    return {change.id: change for change in CHANGES}[change_id]


def select(
    framework: Framework | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    checkpoint: Described | None = None,
) -> list[Change]:
    """The changes of a framework, of a span (both ends included), that touch a checkpoint."""
    return [
        change
        for change in CHANGES
        if framework in (None, change.framework)
        and (since is None or not_before(change, since))
        and (until is None or not_after(change, until))
        and (checkpoint is None or touches(change, checkpoint))
    ]


def touches(change: Change, checkpoint: Described) -> bool:
    """Whether a change matters for this checkpoint, as far as its contents tell."""
    return change.in_checkpoint is not None and change.in_checkpoint(checkpoint)
