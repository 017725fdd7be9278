"""What a commit must change so that a branch holds a folder's files; reads nothing itself."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_ATTRIBUTES = ".gitattributes"  # the Hub's own: which files go to LFS
_LATEST = "latest"
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|index\.json)|(?:.*/)?neox_bridge\.json")
_STEP = re.compile(r"global_step\d+/.*")


@dataclass(frozen=True, slots=True)
class Changes:
    """Paths in the repository, sorted.

    add: new. replace: existing, with other bytes. same: existing, with the same bytes. leave:
    existing, and not in the folder. conflicts: weights that would be replaced or mixed with those
    of another checkpoint.
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

    there: the branch's files. same: the files that it holds bit for bit. step: of a GPT-NeoX
    target. Where the branch is a run already, the step is put beside the others, as in a local run:
    ``latest`` is replaced, and what else lies above the steps stays the run's.
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
