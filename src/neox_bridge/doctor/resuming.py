"""Whether GPT-NeoX resumes a run from a checkpoint, with the settings in its yml."""

from collections.abc import Iterator
from contextlib import suppress

from neox_bridge.compat.facts import TreeFacts
from neox_bridge.compat.targets import Target, name_of
from neox_bridge.compat.verdict import Case, case, fix_command
from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.deepspeed import NO_VERSION
from neox_bridge.layouts.checkpoint import Checkpoint, config_options
from neox_bridge.optimizer.saved_states import SavedStates, reshard_command, saved_states


def cannot_resume(checkpoint: Checkpoint) -> bool:
    """Whether the yml asks GPT-NeoX to resume from states that it cannot resume from."""
    state, finetune = checkpoint.neox, checkpoint.raw.get("finetune")
    if state is None or finetune:
        return False
    if not checkpoint.has_optimizer:
        return finetune is False
    with suppress(BridgeError):  # a file that cannot be read stays as it is
        states = saved_states(checkpoint)
        return states is not None and bool(states.refusal)
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
        states = saved_states(checkpoint)
    except BridgeError as error:
        yield case("optimizer-unreadable", "warning", f"its optimizer cannot be read: {error}")
        return
    if states is not None and states.refusal:
        yield _old_states(checkpoint, target, states, count)
        return
    yield case(
        "optimizer-states",
        "info",
        f"it holds optimizer states ({count} files or entries). Without finetune: true, GPT-NeoX "
        "resumes from them, but only with the number of data-parallel ranks that saved them; with "
        "finetune: true it ignores them",
    )


def _old_states(checkpoint: Checkpoint, target: Target, states: SavedStates, count: int) -> Case:
    """The case of states that the DeepSpeed of later trees refuses."""
    if states.form is None:
        kind, fix = "", fix_command(checkpoint, target)
        way_out = "Its weights load with finetune: true, which starts a new optimizer"
    else:
        kind = (
            f"are {states.form.kind} ZeRO {states.stage} states of {states.form.dp} data-parallel "
            f"ranks, as {states.form.generation.releases} saves them. They "
        )
        era = name_of(target) if isinstance(target, TreeFacts) else "today"
        fix = reshard_command(checkpoint.path, config_options(checkpoint), era)
        weights_only = fix_command(checkpoint, target, "--drop-optimizer")
        way_out = (
            "Resharding writes them anew. Its weights alone load with finetune: true, which starts "
            f"a new optimizer: {weights_only}"
        )
    lacking = (
        "have no ds_version, like those of GPT-NeoX v1.0"
        if states.refusal == NO_VERSION
        else "are elastic and hold no step of Adam"
    )
    return case(
        "optimizer-version",
        "error",
        f"its optimizer states ({count} files) {kind}{lacking}, and later trees cannot resume from "
        f"them. {way_out}",
        fix,
        states.refusal,
    )


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
