"""Finds the step of a GPT-NeoX run that a path means."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.findings import Finding
from neox_bridge.layouts.config_files import FOLDER as CONFIGS
from neox_bridge.layouts.config_files import has_config_beside
from neox_bridge.layouts.file_names import STEP, is_step_file, is_weights
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.text_files import list_folder, read_text
from neox_bridge.layouts.universal_folder import LATEST, ZERO, is_universal
from neox_bridge.stores.paths import absolute, is_local, isdir, isfile
from neox_bridge.stores.step_names import step_of
from neox_bridge.wording import some

_TAG_BYTES = 1024
_HUB_OWNER = re.compile(r"hf:/?/?[^/]*")  # above hf://ORG/NAME
_SNAPSHOTS = re.compile(r".*/(models|datasets|spaces)--[^/]+/snapshots", re.DOTALL)


@dataclass(frozen=True, slots=True)
class StepFolder:
    """The folder with the files of one step.

    root: the folder of the run; the same as ``folder`` if the files are not in a run.
    named: whether the user named this folder, and not the folder of the run.
    weights_above: whether the folder of the run also contains files of a step, which are not read.
    """

    root: str
    folder: str
    named: bool
    weights_above: bool = False

    @property
    def flat(self) -> bool:
        return self.root == self.folder


def step_folder(path: str, step: int | None) -> StepFolder:
    """The folder of a step: the path itself, the tag in ``latest``, or the requested step.

    A path with GPT-NeoX files is a step, whatever its name. The folder above it is read only if
    ``is_run_step`` says that it is the run.

    Raises BridgeError if there are several steps and none is chosen.
    """
    path = absolute(path)
    names = list_folder(path)
    if is_run_step(path, names) or (ZERO in names and is_universal(path)):
        return StepFolder(os.path.dirname(path), path, named=True)
    if is_flat(names):
        return StepFolder(path, path, named=True)
    folder = os.path.join(path, _chosen(path, names, step))
    return StepFolder(path, folder, named=False, weights_above=any(map(is_weights, names)))


def _chosen(path: str, names: Sequence[str], step: int | None) -> str:
    """The name of the step's folder in a run's."""
    steps = sorted((name for name in names if STEP.fullmatch(name)), key=lambda n: int(n[11:]))
    if step is not None:
        tag = f"global_step{step}"
        if tag not in steps and is_universal(os.path.join(path, f"{tag}_universal")):
            return f"{tag}_universal"
        if tag not in steps:
            renamed = [n for n in renamed_steps(path, names) if step_of(n) == step]
            if len(renamed) == 1:
                return renamed[0]
    elif brought_along(latest := os.path.join(path, "latest"), path):
        tag = read_text(latest, _TAG_BYTES).strip()
        if tag in steps:
            return tag
        if tag in names and holds_weights(os.path.join(path, tag)):
            return tag
    elif len(steps) == 1:
        tag = steps[0]
    elif brought_along(latest := os.path.join(path, LATEST), path):
        tag = os.path.basename(read_text(latest, _TAG_BYTES).strip())
        if is_universal(os.path.join(path, tag)):
            return tag
    else:
        renamed = renamed_steps(path, names)
        if not steps and len(renamed) == 1:
            return renamed[0]
        raise BridgeError(
            f"{path} has no file `latest`. Choose a step with `step=`: {some([*steps, *renamed])}."
        )
    if tag not in steps:
        why = f"`step={step}`" if step is not None else "the file `latest`"
        others = [*steps, *renamed_steps(path, names)]
        raise BridgeError(
            f"{path} has no folder {tag!r}, which {why} names. Choose one of the existing steps "
            f"with `step=`: {some(others) or 'none'}."
        )
    return tag


def holds_weights(path: str) -> bool:
    """Whether a folder contains weight files of GPT-NeoX."""
    return isdir(path) and any(map(is_weights, list_folder(path)))


def is_run_step(path: str, names: Sequence[str]) -> bool:
    """Whether a folder is a step of the run in the folder above it.

    It is if its name is ``global_stepN``; if it contains weights, no yml beside them, and its name
    gives a step in another way; or if it has the ``configs`` of GPT-NeoX and there is a ``latest``
    above it. names: the contents of the folder.
    """
    path = absolute(path)
    parent, name = os.path.split(path)
    if not _can_be_run(parent):
        return False
    if STEP.fullmatch(name):
        return True
    if not any(map(is_weights, names)):
        return False
    if CONFIGS in names:
        return step_of(name) is not None or isfile(os.path.join(parent, "latest"))
    return step_of(name) is not None and not has_config_beside(path)


def _can_be_run(parent: str) -> bool:
    """Whether a folder can contain the steps of a run: not above a repository on the Hub."""
    if _HUB_OWNER.fullmatch(parent):
        return False
    return not _SNAPSHOTS.fullmatch(parent)


def is_flat(names: Sequence[str]) -> bool:
    """Whether a folder contains GPT-NeoX files directly and is not the folder of a run."""
    return any(map(is_step_file, names)) and not any(map(STEP.fullmatch, names))


def renamed_steps(path: str, names: Sequence[str]) -> list[str]:
    """Subfolders with GPT-NeoX files whose names give a step in another way."""
    steps = [(number, n) for n in names if (number := step_of(n)) is not None]
    return [
        name
        for _, name in sorted(steps)
        if not STEP.fullmatch(name) and holds_weights(os.path.join(path, name))
    ]


def step_in_name(folder: str, revision: str = "") -> int | None:
    """The step in the Hub revision, else in the name of the folder, else in its git branch.

    revision: ``org/name@step1000``, or "".
    """
    name = os.path.basename(absolute(folder)).removesuffix("_universal")
    for text in (revision, name):
        if (number := step_of(re.split("[@/]", text)[-1])) is not None:
            return number
    return step_of(_git_branch(folder))


def _git_branch(folder: str) -> str:
    """The branch that a clone has checked out; "" for other folders and a detached HEAD."""
    head = os.path.join(folder, ".git", "HEAD")
    if not is_local(folder) or not isfile(head):
        return ""
    with suppress(BridgeError):
        _, ref, branch = read_text(head, _TAG_BYTES).strip().partition("refs/heads/")
        return branch if ref else ""
    return ""


def check_step(step: int | None, place: StepFolder, number: int | None) -> None:
    """Raise UsageError if the user names a folder and a step that is not in it.

    number: the step of the folder; None if it is unknown.
    """
    if step is not None and place.named and number not in (None, step):
        raise UsageError(
            ["step"],
            f"{place.folder} is the folder of step {number}, not of {step}",
            "Leave it out" + (" or name the folder above it." if not place.flat else "."),
        )


def weights_above_finding(place: StepFolder) -> Finding | None:
    """The finding for a run folder with files of a step beside a folder of another step."""
    if not place.weights_above:
        return None
    return Finding(
        "two-places",
        "warning",
        f"{place.root} contains the files of one step, and {place.folder} contains those of "
        "another. Like GPT-NeoX, neox-bridge reads the second",
        "to read the first, move its files into a separate folder",
    )


def step_finding(
    folder: str, revision: str, saved: int | None, named: int | None
) -> Finding | None:
    """The finding if the files and the name give different steps, or neither gives one.

    revision: the Hub revision, or "". saved: ``iteration`` in the mp_rank files. named: the step in
    the revision or in the name of the folder.
    """
    if saved is None and named is None:
        return Finding(
            "step-unknown",
            "warning",
            f"the step of {folder} is unknown: its mp_rank files have no iteration, and its name "
            "has no number",
            "name it with `step=N`",
        )
    if saved is None or named in (None, saved):
        return None
    return Finding(
        "step-differs",
        "warning",
        f"{revision or folder} is step {named} by its name or branch, and step {saved} by its "
        f"files (iteration in mp_rank_*_model_states.pt); {saved} is used",
        "check which step you want. The files may have been copied to the wrong folder or branch",
    )
