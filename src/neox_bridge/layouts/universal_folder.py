"""The files and names of DeepSpeed's universal checkpoints, which ``universal`` reads."""

import os
import re

from neox_bridge.errors import BridgeError
from neox_bridge.stores.paths import isfile

LATEST = "latest_universal"  # a file in the root with the name of the folder
ZERO = "zero"  # contains a folder for each parameter, and STATE
STATE = "optimizer_state.pt"  # states that do not belong to a parameter
STEP = "step"
INFO = "universal_checkpoint_info"  # in the mp_rank files: how ranks share parameters
Parameter = tuple[int, str]  # the number of the layer in GPT-NeoX, and the name in it
MASTER = "master"  # neox-bridge's name for the fp32 weights; other names are the optimizer's
_NAMED = re.compile(r"(?:module\.)?(?:sequential\.)?(\d{1,9})\.(.+)")
_TIED = "tied_modules.embed."  # the embeddings where the head is tied to them; see gpt2_model.py


def is_universal(folder: str) -> bool:
    """Whether a step's folder is a universal checkpoint."""
    return isfile(os.path.join(folder, ZERO, STATE))


def file_name(key: str) -> str:
    """The file of a state in a parameter's folder."""
    return f"{'fp32' if key == MASTER else key}.pt"


def parameter(name: str, path: str) -> Parameter:
    """The layer of a parameter and its name there. name: of DeepSpeed. path: for the message."""
    if name.startswith(_TIED):
        return 0, name.removeprefix(_TIED)
    match = _NAMED.fullmatch(name)
    if match is None:
        raise BridgeError(f"{path}: {name} is not a parameter name of GPT-NeoX.")
    return int(match[1]), match[2]
