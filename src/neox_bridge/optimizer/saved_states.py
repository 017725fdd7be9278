"""Finds the kind of optimizer states of a checkpoint, and what can resume them.

Only the first state file is read, without its tensors.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.deepspeed import NO_VERSION, STAGE_3, Resumption, resumption
from neox_bridge.layouts.checkpoint import Checkpoint, NeoxState, new_folder
from neox_bridge.layouts.file_names import OPTIMIZER
from neox_bridge.layouts.missing_files import rank_files, refuse_missing_ranks
from neox_bridge.layouts.untrusted import text
from neox_bridge.layouts.zero3 import states_file_of
from neox_bridge.optimizer.rank_states import (
    STEP,
    generation_of,
    interval_counts,
    kind_of,
    zero_stage,
)
from neox_bridge.optimizer.read_files import optimizer_states
from neox_bridge.optimizer.states import SavedForm


@dataclass(frozen=True)
class SavedStates:
    """The files of ZeRO's optimizer states of a checkpoint.

    Attributes:
        form: The format of the states; None if the first file has no masters in a known format.
        stage: The ZeRO stage.
        version: The version of DeepSpeed; "" if not recorded.
        resumption: The versions that can resume them; None if the format is unknown.
        incomplete: A description of missing or surplus files; "" if the files are complete.
    """

    form: SavedForm | None
    stage: int
    version: str
    resumption: Resumption | None
    incomplete: str = ""

    @property
    def refusal(self) -> str:
        """The error of the DeepSpeed of the current GPT-NeoX; "" if it can resume them."""
        if self.resumption is not None:
            return self.resumption.refusal
        return "" if self.version else NO_VERSION


def reshard_command(path: str, options: Sequence[str] = (), era: str = "today") -> str:
    """The command that writes these states for another GPT-NeoX, in a sibling folder.

    Args:
        options: The options that open the checkpoint again, see ``config_options``.
        era: A value of ``--for``.
    """
    words = ["neox-bridge", "reshard", path, new_folder(path, "resharded"), "--for", era]
    return shlex.join([*words, *options])


def saved_states(checkpoint: Checkpoint) -> SavedStates | None:
    """The kind of states; None without separate files, and for universal checkpoints.

    Raises:
        BridgeError: the first file cannot be read.
    """
    state = checkpoint.neox
    if state is None or state.universal or not state.optimizer:
        return None
    path = os.path.join(state.folder, state.optimizer[0])
    if state.is_zero3:
        version = text(states_file_of(path), "ds_version")
        resumes = resumption(STAGE_3, "rigid", version, has_step=True)
        return SavedStates(SavedForm("rigid", STAGE_3, state.dp or 1, ()), 3, version, resumes)
    value = optimizer_states(path)
    inner = value["optimizer_state_dict"]
    version = text(inner, "ds_version")
    stage = zero_stage(value, checkpoint.raw, path)
    try:
        intervals = interval_counts(inner, path)
    except BridgeError:
        return SavedStates(None, stage, version, None, _incomplete(state))
    present = len({m[2] for name in state.optimizer if (m := OPTIMIZER.fullmatch(name))})
    form = SavedForm(kind_of(inner), generation_of(inner), state.dp or present, intervals)
    has_step = inner.get(STEP) is not None
    resumes = resumption(form.generation, form.kind, version, has_step=has_step)
    return SavedStates(form, stage, version, resumes, _incomplete(state))


def _incomplete(state: NeoxState) -> str:
    """What is wrong with the state files, judged by their names; "" if nothing is."""
    try:
        refuse_missing_ranks(state)
        rank_files(state.folder, state.optimizer, state.dp, state.tp * max(1, state.pp))
    except BridgeError as error:
        return str(error)
    return ""
