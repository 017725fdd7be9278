"""Decides whether GPT-NeoX resumes a run from a checkpoint, with the settings in its yml."""

import os
from collections.abc import Iterator
from contextlib import suppress

from neox_bridge.doctor.judge_neox import fix_for
from neox_bridge.doctor.verdict import Case, case, failure, near, opening_options
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Command, Details
from neox_bridge.formats.yml import read_yml
from neox_bridge.frameworks.changes import change_named
from neox_bridge.frameworks.deepspeed import NO_VERSION, SUB_PARTITIONS, StatesForm, release_of
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.targets import Target, name_of
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.untrusted import mapping
from neox_bridge.optimizer.saved_states import SavedStates, reshard_command, saved_states
from neox_bridge.wording import plural, sentence

# GPT-NeoX v1.0 reads a key of the mp_rank files that DeepSpeed renamed (fcb3ca5e, 0.5.5).
_RENAMED_KEY = "KeyError: 'csr_tensor_module_names'"
_RENAMED_SINCE = (0, 5, 5)


def cannot_resume(checkpoint: Checkpoint, form: StatesForm) -> bool:
    """Whether the yml says to resume from states that a tree with this format cannot load."""
    state, finetune = checkpoint.neox, checkpoint.raw.get("finetune")
    if state is None or finetune:
        return False
    if not checkpoint.has_optimizer:
        return finetune is False
    with suppress(BridgeError):  # a file that cannot be read stays as it is
        states = saved_states(checkpoint)
        return states is not None and not _resumes(checkpoint, states, form)
    return False


def judge_resuming(checkpoint: Checkpoint, target: Target) -> Iterator[Case]:
    """The cases of loading the optimizer states, which GPT-NeoX does after the weights.

    transformers loads none, so it has no such cases.
    """
    state = checkpoint.neox
    if state is None or not isinstance(target, TreeFacts) or checkpoint.raw.get("finetune"):
        return
    if not checkpoint.has_optimizer:
        yield from _no_states(checkpoint, target)
        return
    count = sum(drop.kind == "optimizer" for drop in checkpoint.dropped)
    try:
        states = saved_states(checkpoint)
    except BridgeError as error:
        message = f"the optimizer states cannot be read: {error}"
        yield case("optimizer-unreadable", "warning", message)
        return
    if states is not None and states.incomplete:
        if not state.missing_ranks:  # another case reports those
            yield failure("optimizer-incomplete", states.incomplete)
        return
    form = target.states
    if states is not None and not _resumes(checkpoint, states, form):
        judge = _not_of_v1 if form == "sub-partitions" else _old_states
        yield judge(checkpoint, target, states, count)
        return
    message = (
        f"the checkpoint has optimizer states ({count} files or entries). Without finetune: true, "
        "GPT-NeoX resumes from them, but only with the number of data-parallel ranks that saved "
        "them. With finetune: true, it ignores them"
    )
    if states is not None and states.resumption is not None and form == "sub-partitions":
        ranks = "on any number of" if states.resumption.any_dp else "on the same number of"
        message = (
            f"the checkpoint has optimizer states ({plural(count, 'file')}). Without finetune: "
            f"true, this GPT-NeoX resumes from them {ranks} data-parallel ranks"
        )
        message += "" if states.resumption.keeps_step else ". Adam's step restarts at 1"
    yield case("optimizer-states", "info", message)


def resharding(checkpoint: Checkpoint, target: Target) -> str:
    """The command that writes the run for a tree that cannot resume from its states.

    It also removes keys that the tree rejects, renames parameters, and turns a flat folder into a
    run. "" if the tree resumes, if the states cannot be read, or if the tree cannot train such a
    run.
    """
    state = checkpoint.neox
    if state is None or not isinstance(target, TreeFacts) or checkpoint.raw.get("finetune"):
        return ""
    with suppress(BridgeError):  # another case reports what cannot be read
        states = saved_states(checkpoint) if checkpoint.has_optimizer else None
        if states is not None and not states.incomplete:
            resumes = _resumes(checkpoint, states, target.states)
            return "" if resumes else _reshard_command(checkpoint, target, states)
    return ""


def _reshard_command(checkpoint: Checkpoint, target: TreeFacts, states: SavedStates) -> str:
    """The command that rewrites states for a tree; "" if there is none."""
    options = opening_options(checkpoint)
    if target.states == "sub-partitions":  # ZeRO of DeeperSpeed 0.3.15
        if checkpoint.config.dtype != "float16":
            return ""
        options = [*options, *(() if states.stage == 1 else ("--zero", "1"))]
    elif states.form is None:
        return ""
    return Command(reshard_command(near(checkpoint.path), options, name_of(target)))


def _resumes(checkpoint: Checkpoint, states: SavedStates, form: StatesForm) -> bool:
    """Whether a tree resumes from states.

    GPT-NeoX v1.0 loads elastic states unless elastic_checkpoint is false, and then only rigid ones
    (DeeperSpeed 0.3.15, runtime/zero/stage1.py). It loads states of stage 2 in any case.
    """
    if form == "partitions":
        return not states.refusal
    if states.form is None or states.form.generation is not SUB_PARTITIONS:
        return states.form is not None and states.stage == 2 and not states.version
    zero = mapping(checkpoint.raw, "zero_optimization", "the yml")
    elastic = zero.get("elastic_checkpoint", True) is not False
    return elastic == (states.form.kind == "elastic")


def _not_of_v1(checkpoint: Checkpoint, target: TreeFacts, states: SavedStates, count: int) -> Case:
    """The case of states that GPT-NeoX v1.0 cannot load."""
    if states.form is not None and states.form.generation is SUB_PARTITIONS:
        what = (
            f"are {states.form.kind}, and zero_optimization.elastic_checkpoint in the yml says "
            "otherwise"
        )
        prints = "KeyError: 0" if states.form.kind == "rigid" else ""
    else:
        what = "were saved by a later DeepSpeed than 0.3.15, which it requires"
        release = release_of(states.version) or (0, 0, 0)
        prints = _RENAMED_KEY if release >= _RENAMED_SINCE else ""
    message = (
        f"this GPT-NeoX cannot resume from the optimizer states ({plural(count, 'file')}): they "
        f"{what}"
    )
    command = _reshard_command(checkpoint, target, states)
    cannot_train = f"It cannot train in {checkpoint.config.dtype} with ZeRO either"
    message += f". {'reshard rewrites them' if command else cannot_train}"
    return failure("optimizer-version", message, command, prints)


def _old_states(checkpoint: Checkpoint, target: TreeFacts, states: SavedStates, count: int) -> Case:
    """The case of states that the DeepSpeed of later trees rejects."""
    fix = _reshard_command(checkpoint, target, states)
    if states.form is None:
        kind, fix = "", fix_for(checkpoint, target)
        way_out = "The weights load with finetune: true, which starts a new optimizer"
        others: tuple[str, ...] = ()
    else:
        kind = (
            f"are {states.form.kind} ZeRO {states.stage} states of {states.form.dp} data-parallel "
            f"ranks, as {states.form.generation.releases} saves them. They "
        )
        weights_only = fix_for(checkpoint, target, drop_optimizer=True)
        others = (weights_only,)
        way_out = (
            "reshard rewrites them. The weights alone load with finetune: true, which starts a new "
            f"optimizer: {weights_only}"
        )
    defect = (
        "have no ds_version, like those of GPT-NeoX v1.0"
        if states.refusal == NO_VERSION
        else "are elastic and do not contain Adam's step"
    )
    cause = (
        f"the optimizer states ({plural(count, 'file')}) {kind}{defect}, and later trees cannot "
        "resume from them"
    )
    return failure(
        "optimizer-version",
        f"{cause}. {way_out}",
        fix,
        states.refusal,
        details=Details(
            why=sentence(cause),
            others=others,
            more=(change_named("neox-deepspeed-08").link,),
        ),
    )


def _no_states(checkpoint: Checkpoint, target: TreeFacts) -> Iterator[Case]:
    prints = "TypeError: 'NoneType' object is not subscriptable"
    if checkpoint.raw.get("finetune") is False:
        yield failure(
            "no-optimizer-states",
            "the yml says finetune: false, and the checkpoint has no optimizer states to resume "
            "from",
            fix_for(checkpoint, target),
            prints,
        )
        return
    message = "the checkpoint has no optimizer states: without finetune: true in the yml, GPT-NeoX "
    message += f"fails with {prints}"
    way_out = "set finetune: true in the yml"
    if _finetunes(checkpoint):
        message, way_out = f"{message}. finetune.yml beside it sets that", ""
    yield case("no-optimizer-states", "info", message, way_out)


def _finetunes(checkpoint: Checkpoint) -> bool:
    """Whether the yml that ``convert`` writes into the root starts a run without states."""
    path = os.path.join(checkpoint.neox_state.root, "finetune.yml")
    with suppress(BridgeError, OSError):
        return os.path.isfile(path) and read_yml(path).get("finetune") is True
    return False
