"""The steps in the folder of a run's checkpoints, by the names that GPT-NeoX gives them."""

import os
from contextlib import suppress

from neox_bridge.layouts.file_names import STEP

LATEST = "latest"  # the file that names the last complete step


def step_names(save: str) -> list[str]:
    """The folders of steps, complete or not, sorted as texts. Raises OSError."""
    return sorted(name for name in os.listdir(save) if STEP.fullmatch(name))


def steps(save: str) -> list[int]:
    """The iterations of the steps, complete or not; none if the folder cannot be read."""
    with suppress(OSError):
        return [int(m[1]) for name in os.listdir(save) if (m := STEP.fullmatch(name))]
    return []


def latest(save: str) -> int:
    """The iteration that ``latest`` names; -1 if the run has saved none."""
    with suppress(OSError), open(os.path.join(save, LATEST), "rb") as file:
        if match := STEP.fullmatch(file.read().decode(errors="replace").strip()):
            return int(match[1])
    return -1
