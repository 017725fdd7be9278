"""What processes of a pool are asked to do; light, since each of them imports it."""

import os
import signal
from pathlib import Path


def die_once(marker: str) -> str:
    """What the kernel does to a process where memory is short, the first time."""
    if not os.path.exists(marker):
        Path(marker).touch()
        die()
    return "alive"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
