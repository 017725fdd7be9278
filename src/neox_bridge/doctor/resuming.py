"""Whether GPT-NeoX resumes a run from a checkpoint, with the settings in its yml."""

import os
from collections.abc import Iterator
from contextlib import suppress

from neox_bridge.compat.targets import Target
from neox_bridge.compat.verdict import Case, case, fix_command
from neox_bridge.errors import BridgeError
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.layouts.checkpoint import Checkpoint, NeoxState


def cannot_resume(checkpoint: Checkpoint) -> bool:
    """Whether the yml asks GPT-NeoX to resume from states that it cannot resume from."""
    state, finetune = checkpoint.neox, checkpoint.raw.get("finetune")
    if state is None or finetune:
        return False
    if not checkpoint.has_optimizer:
        return finetune is False
    with suppress(BridgeError):  # a file that cannot be read stays as it is
        return lacks_version(state)
    return False


def judge_resuming(checkpoint: Checkpoint, target: Target) -> Iterator[Case]:
    """The cases of loading the optimizer, which GPT-NeoX does after the weights."""
    state = checkpoint.neox
    if state is None or bool(checkpoint.raw.get("finetune")):
        return
    if not checkpoint.has_optimizer:
        yield from _no_states(checkpoint, target)
        return
    count = sum(drop.kind == "optimizer" for drop in checkpoint.dropped)
    try:
        resumable = not lacks_version(state)
    except BridgeError as error:
        yield case("optimizer-unreadable", "warning", f"its optimizer cannot be read: {error}")
        return
    if not resumable:
        yield case(
            "optimizer-version",
            "error",
            f"its optimizer states ({count} files) have no ds_version, like those of GPT-NeoX "
            "v1.0, and later trees cannot resume from them. Its weights load with finetune: true, "
            "which starts a new optimizer",
            fix_command(checkpoint, target),
            "AssertionError: Empty ds_version in checkpoint, not clear how to proceed",
        )
        return
    yield case(
        "optimizer-states",
        "info",
        f"it holds optimizer states ({count} files or entries). Without finetune: true, GPT-NeoX "
        "resumes from them, but only with the number of data-parallel ranks that saved them; with "
        "finetune: true it ignores them",
    )


def lacks_version(state: NeoxState) -> bool:
    """Whether the ZeRO partitions say no DeepSpeed version, which their loader insists on.

    DeepSpeed runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py,
    _load_legacy_checkpoint. Universal checkpoints have another loader.
    """
    if state.universal or not state.optimizer:
        return False
    value = read_torch(os.path.join(state.folder, state.optimizer[0]))
    states = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    return isinstance(states, dict) and not states.get("ds_version")


def _no_states(checkpoint: Checkpoint, target: Target) -> Iterator[Case]:
    prints = "TypeError: 'NoneType' object is not subscriptable"
    if checkpoint.raw.get("finetune") is False:
        yield case(
            "no-optimizer-states",
            "error",
            "the yml says finetune: false, and the checkpoint holds no optimizer states to resume "
            "from",
            fix_command(checkpoint, target),
            prints,
        )
        return
    yield case(
        "no-optimizer-states",
        "info",
        "it holds no optimizer states: without finetune: true in the yml, GPT-NeoX ends with "
        f"{prints}",
        "set finetune: true in the yml",
    )
