"""What is where in DeepSpeed's universal checkpoints; see ``universal``, which reads them."""

import os
import re

from neox_bridge.errors import BridgeError
from neox_bridge.stores.paths import isfile

LATEST = "latest_universal"  # in the root: the folder's name
ZERO = "zero"  # in the folder: one for each parameter, and
STATE = "optimizer_state.pt"  # what isn't by parameter
STEP = "step"
INFO = "universal_checkpoint_info"  # in the mp_rank files: how ranks share parameters
Parameter = tuple[int, str]  # GPT-NeoX's number of the layer, and the name in it
MASTER = "master"  # our key for the fp32 weights; all others are the optimizer's own
_NAMED = re.compile(r"(?:module\.)?(?:sequential\.)?(\d{1,9})\.(.+)")
_TIED = "tied_modules.embed."  # the embeddings where the head is tied to them; see gpt2_model.py


def is_universal(folder: str) -> bool:
    """Whether a step's folder is a universal checkpoint."""
    return isfile(os.path.join(folder, ZERO, STATE))


def file_name(key: str) -> str:
    """The file of a state in a parameter's folder."""
    return f"{'fp32' if key == MASTER else key}.pt"


def parameter(name: str, path: str) -> Parameter:
    """The layer and the name in it of a parameter as DeepSpeed names it."""
    if name.startswith(_TIED):
        return 0, name.removeprefix(_TIED)
    match = _NAMED.fullmatch(name)
    if match is None:
        raise BridgeError(f"{path}: {name} is not a parameter name of GPT-NeoX.")
    return int(match[1]), match[2]
