"""What a commit has to do so that a branch holds a folder's files: pure, from what both hold."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from neox_bridge.hub.remote import RemoteFile

_KEPT = ".gitattributes"  # the Hub's own: which files go to LFS
_LATEST = "latest"
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|index\.json)|(?:.*/)?neox_bridge\.json")
_STEP = re.compile(r"global_step\d+/.*")


@dataclass(frozen=True, slots=True)
class Changes:
    """Paths in the repository, sorted.

    add: not there yet. replace: there with other bytes. same: there as they are. leave: the
    branch's own, which the folder hasn't. conflicts: what would be replaced, and what of another
    checkpoint would be mixed up with this one.
    """

    add: tuple[str, ...]
    replace: tuple[str, ...]
    same: tuple[str, ...]
    leave: tuple[str, ...]
    conflicts: tuple[str, ...]


def compare(
    files: Collection[str],
    there: Mapping[str, RemoteFile],
    same: Collection[str],
    step: str | None = None,
) -> Changes:
    """What is to be done for ``files``. same: those of them that ``there`` holds bit for bit.

    step: of a GPT-NeoX target. Where the branch is a run already the step is put beside the others,
    as in a local run: ``latest`` is replaced, what else lies above the steps is the run's own.
    """
    ours, theirs = set(files), set(there) - {_KEPT}
    moves = ""
    if step is not None and (_LATEST in there or any(map(_STEP.fullmatch, there))):
        moves = _LATEST
        theirs = {path for path in theirs if path.startswith(f"{step}/")} | {_LATEST}
        ours = {path for path in ours if path in theirs or path not in there}
    replace = ours & theirs - set(same)
    leave = theirs - ours - {moves}
    return Changes(
        tuple(sorted(ours - theirs)),
        tuple(sorted(replace)),
        tuple(sorted(ours & theirs & set(same))),
        tuple(sorted(leave)),
        tuple(sorted((replace - {moves}) | set(filter(_WEIGHTS.fullmatch, leave)))),
    )
