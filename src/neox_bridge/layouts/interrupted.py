"""What a killed run left beside a checkpoint that it was putting into its place."""

import os

from neox_bridge.findings import Finding
from neox_bridge.stores.paths import is_local
from neox_bridge.stores.store import WORK

MOVES = "moves"  # in it: what belongs where, until everything is there


def interrupted(path: str) -> list[Finding]:
    """A warning where a run was killed while it replaced a checkpoint or added a step.

    path: a Hugging Face folder, or the root of a GPT-NeoX run.
    """
    if not is_local(path):
        return []
    parent, name = os.path.split(os.path.realpath(path))
    folder = os.path.join(parent, f".{name}{WORK}")
    if not os.path.lexists(os.path.join(folder, MOVES)):
        return []
    return [
        Finding(
            "left-over",
            "warning",
            f"a run of neox-bridge was killed while it moved files into {path}. The files that "
            f"it replaced or still has to move are in {folder}",
            "run the same command again to finish the move and remove the folder",
        )
    ]
