"""What to do with a model that only GPT-NeoX can hold: the command that moves it to another layout.

A refusal cannot promise that command by itself: whether it works depends on the checkpoint. So it
is planned first, and named only if it succeeds.
"""

import shlex

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import Checkpoint, config_options
from neox_bridge.planning.options import Options


def relayout_command(checkpoint: Checkpoint, target: str) -> str:
    """The command that writes a GPT-NeoX checkpoint as one of another layout.

    Returns "" for other checkpoints, and where this version cannot write it.
    """
    from neox_bridge.planning.make import make_plan

    if checkpoint.neox is None:
        return ""
    ignored = [key.name for key in checkpoint.unknown_keys if key.effect == "model"]
    try:
        make_plan(checkpoint, Options(to="neox", ignore_keys=tuple(ignored)), target)
    except BridgeError:
        return ""
    words = ["neox-bridge", "convert", checkpoint.path, target, "--to", "neox"]
    words += config_options(checkpoint)
    return shlex.join([*words, *(w for key in ignored for w in ("--ignore-key", key))])
