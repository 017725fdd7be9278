"""Names of folders and revisions that contain a step of a run."""

import re

NUMBERED = re.compile(
    r"(?:(?P<run>.*?)[-_.])??(?:global_step|step|checkpoint|ckpt|iter)[-_]?(?P<number>\d+)"
    r"(?:[-_]tokens\w*)?",
    re.IGNORECASE,
)


def step_of(name: str) -> int | None:
    """The step in ``global_step1000``, ``step1000``, ``checkpoint-1000``; None in other names."""
    match = NUMBERED.fullmatch(name)
    return int(match["number"]) if match else None
