"""What is where in DeepSpeed's universal checkpoints; see ``universal``, which reads them."""

import os

from neox_bridge.stores.paths import isfile

LATEST = "latest_universal"  # in the root: the folder's name
ZERO = "zero"  # in the folder: one for each parameter, and
STATE = "optimizer_state.pt"  # what isn't by parameter
STEP = "step"
INFO = "universal_checkpoint_info"  # in the mp_rank files: how ranks share parameters


def is_universal(folder: str) -> bool:
    """Whether a step's folder is a universal checkpoint."""
    return isfile(os.path.join(folder, ZERO, STATE))


def file_name(key: str) -> str:
    """The file of a state in a parameter's folder."""
    from neox_bridge.optimizer.states import MASTER  # every command opens, few have an optimizer

    return f"{'fp32' if key == MASTER else key}.pt"
