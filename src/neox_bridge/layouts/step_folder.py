"""Which step of a GPT-NeoX run a path means."""

import os
import re

from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.layouts.checkpoint import some
from neox_bridge.layouts.own_files import brought_along
from neox_bridge.layouts.text_files import list_folder, read_text
from neox_bridge.layouts.universal_folder import LATEST, ZERO, is_universal
from neox_bridge.stores.paths import absolute

_STEP = re.compile(r"global_step(\d+)")
_LONGEST_TAG = 1024  # bytes


def step_folder(path: str, step: int | None) -> tuple[str, str]:
    """(root, global_stepN) of a path: the tag in ``latest``, or the step asked for."""
    path = absolute(path)
    if _STEP.fullmatch(os.path.basename(path)):
        if step is not None and os.path.basename(path) != f"global_step{step}":
            raise UsageError(
                ["step"], f"{path} is already another step than {step}", "Name the folder above it."
            )
        return os.path.dirname(path), os.path.basename(path)
    names = list_folder(path)
    if step is None and ZERO in names and is_universal(path):
        return os.path.dirname(path), os.path.basename(path)
    steps = sorted((name for name in names if _STEP.fullmatch(name)), key=lambda n: int(n[11:]))
    if step is not None:
        tag = f"global_step{step}"
        if tag not in steps and is_universal(os.path.join(path, f"{tag}_universal")):
            return path, f"{tag}_universal"
    elif brought_along(latest := os.path.join(path, "latest"), path):
        tag = read_text(latest, _LONGEST_TAG).strip()
    elif len(steps) == 1:
        tag = steps[0]
    elif brought_along(latest := os.path.join(path, LATEST), path):
        tag = os.path.basename(read_text(latest, _LONGEST_TAG).strip())
        if is_universal(os.path.join(path, tag)):
            return path, tag
    else:
        raise BridgeError(f"{path} has no file `latest`. Name one with --step: {some(steps)}.")
    if tag not in steps:
        why = f"--step {step}" if step is not None else "the file `latest`"
        raise BridgeError(
            f"{path} has no folder {tag!r}, which {why} names. There are: {some(steps) or 'none'}; "
            "choose one with --step."
        )
    return path, tag


def number_of(tag: str) -> int:
    """The step that a folder's name tells."""
    match = re.match(r"global_step(\d{1,18})", tag)
    return int(match[1]) if match else 0
