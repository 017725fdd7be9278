"""Computes the changes of a commit that makes a branch equal to a folder. Does no I/O."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_ATTRIBUTES = ".gitattributes"  # a file of the Hub that lists which files are stored in LFS
_LATEST = "latest"
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|index\.json)|(?:.*/)?neox_bridge\.json")
_STEP = re.compile(r"global_step\d+/.*")


@dataclass(frozen=True, slots=True)
class Changes:
    """The paths of a repository, sorted, by what a commit does with them.

    Attributes:
        add: New files.
        replace: Existing files with other bytes.
        same: Existing files with equal bytes.
        leave: Existing files that are not in the folder.
        conflicts: Weights that would be replaced or mixed with those of another checkpoint.
    """

    add: tuple[str, ...]
    replace: tuple[str, ...]
    same: tuple[str, ...]
    leave: tuple[str, ...]
    conflicts: tuple[str, ...]


def compare(
    files: Collection[str],
    there: Mapping[str, object],
    same: Collection[str],
    step: str | None = None,
) -> Changes:
    """Compare the paths of a folder with those of a branch.

    If the branch is an existing run, the step is added to its steps, as in a local run: ``latest``
    is replaced, and other files above the steps are kept.

    Args:
        files: The files of the folder.
        there: The files of the branch.
        same: The files that are equal bit for bit.
        step: The step of a GPT-NeoX target.
    """
    new, old = set(files), set(there) - {_ATTRIBUTES}
    pointer = ""
    if step is not None and (_LATEST in there or any(map(_STEP.fullmatch, there))):
        pointer = _LATEST
        old = {path for path in old if path.startswith(f"{step}/")} | {_LATEST}
        new = {path for path in new if path in old or path not in there}
    replace = new & old - set(same)
    leave = old - new - {pointer}
    conflicts = (replace - {pointer}) | set(filter(_WEIGHTS.fullmatch, leave))
    groups = (new - old, replace, new & old & set(same), leave, conflicts)
    return Changes(*(tuple(sorted(group)) for group in groups))
