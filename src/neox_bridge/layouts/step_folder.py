"""Which step of a GPT-NeoX run a path means."""

import os
import re
from collections.abc import Sequence

from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.layouts.checkpoint import some
from neox_bridge.layouts.own_files import brought_along
from neox_bridge.layouts.step_names import step_of
from neox_bridge.layouts.text_files import list_folder, read_text
from neox_bridge.layouts.universal_folder import LATEST, ZERO, is_universal
from neox_bridge.stores.paths import absolute, isdir

_STEP = re.compile(r"global_step(\d+)")
_WEIGHTS = re.compile(r"(layer_\d+-model_\d+-|mp_rank_\d+_)model_states\.pt")
_LONGEST_TAG = 1024  # bytes


def step_folder(path: str, step: int | None) -> tuple[str, str]:
    """(root, folder of the step) of a path: the tag in ``latest``, or the step asked for.

    The folder is ``global_stepN``, or one of another name that holds GPT-NeoX's files.
    """
    path = absolute(path)
    names = list_folder(path)
    if _STEP.fullmatch(os.path.basename(path)) or is_step(path, names):
        if step is not None and number_of(os.path.basename(path)) != step:
            raise UsageError(
                ["step"], f"{path} is already another step than {step}", "Name the folder above it."
            )
        return os.path.dirname(path), os.path.basename(path)
    if step is None and ZERO in names and is_universal(path):
        return os.path.dirname(path), os.path.basename(path)
    steps = sorted((name for name in names if _STEP.fullmatch(name)), key=lambda n: int(n[11:]))
    if step is not None:
        tag = f"global_step{step}"
        if tag not in steps and is_universal(os.path.join(path, f"{tag}_universal")):
            return path, f"{tag}_universal"
        if tag not in steps:
            renamed = [n for n in renamed_steps(path, names) if number_of(n) == step]
            if len(renamed) == 1:
                return path, renamed[0]
    elif brought_along(latest := os.path.join(path, "latest"), path):
        tag = read_text(latest, _LONGEST_TAG).strip()
        if tag in steps:
            return path, tag
        if tag in names and holds_weights(os.path.join(path, tag)):
            return path, tag
    elif len(steps) == 1:
        tag = steps[0]
    elif brought_along(latest := os.path.join(path, LATEST), path):
        tag = os.path.basename(read_text(latest, _LONGEST_TAG).strip())
        if is_universal(os.path.join(path, tag)):
            return path, tag
    else:
        renamed = renamed_steps(path, names)
        if not steps and len(renamed) == 1:
            return path, renamed[0]
        raise BridgeError(
            f"{path} has no file `latest`. Name one with --step: {some([*steps, *renamed])}."
        )
    if tag not in steps:
        why = f"--step {step}" if step is not None else "the file `latest`"
        others = [*steps, *renamed_steps(path, names)]
        raise BridgeError(
            f"{path} has no folder {tag!r}, which {why} names. There are: "
            f"{some(others) or 'none'}; choose one with --step."
        )
    return path, tag


def holds_weights(path: str) -> bool:
    """Whether a folder holds GPT-NeoX's files of weights."""
    return isdir(path) and any(map(_WEIGHTS.fullmatch, list_folder(path)))


def is_step(path: str, names: Sequence[str]) -> bool:
    """Whether a folder is one step of a run, whatever its name."""
    named = step_of(os.path.basename(absolute(path))) is not None
    return any(map(_WEIGHTS.fullmatch, names)) and (named or "configs" in names)


def renamed_steps(path: str, names: Sequence[str]) -> list[str]:
    """The folders below with GPT-NeoX's files whose names tell a step in another way."""
    steps = [n for n in names if not _STEP.fullmatch(n) and step_of(n) is not None]
    return sorted((n for n in steps if holds_weights(os.path.join(path, n))), key=number_of)


def number_of(tag: str) -> int:
    """The step that a folder's name tells."""
    match = re.match(r"global_step(\d{1,18})", tag)
    return int(match[1]) if match else step_of(tag) or 0
