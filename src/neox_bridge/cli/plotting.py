"""``--plot FILE``: the option that several commands have."""

import os
from typing import Any

import typer


def plot_file() -> Any:
    """An option that takes a picture's file name: the arguments of ``typer.Option``."""
    return {"parser": _parse, "metavar": "FILE.png|svg"}


def prepare(path: str | None) -> None:
    """Raise BridgeError, before anything long is computed, where no picture could be written."""
    if path is None:
        return
    from neox_bridge.errors import BridgeError
    from neox_bridge.verification.drawing import require

    require()
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise BridgeError(f"{path}: the folder {folder} isn't there. Make it first.")


def _parse(text: str) -> str:
    from neox_bridge.verification.plots import SUFFIXES

    if not text.lower().endswith(SUFFIXES):
        raise typer.BadParameter(f"{text!r} is neither a .png nor an .svg file.")
    return text
