"""``--plot FILE``: what several commands do with it."""

import os


def prepare(path: str | None) -> None:
    """Raise BridgeError, before anything long is computed, where no picture could be written."""
    if path is None:
        return
    from neox_bridge.errors import BridgeError
    from neox_bridge.verification.drawing import require

    require()
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise BridgeError(f"{path}: the folder {folder} does not exist. Create it first.")
