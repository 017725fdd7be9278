"""The disk space that an export leaves to the training, whose next checkpoint must fit."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from neox_bridge.errors import DiskFull
from neox_bridge.execution.context import Context
from neox_bridge.execution.movers import can_share
from neox_bridge.progress import Progress
from neox_bridge.training.exports import Exports
from neox_bridge.training.saved_steps import latest, steps

CHECK_SECONDS = 0.5


class Watch:
    """The listener of a conversion. It ends an export that the training cannot afford.

    If GPT-NeoX saves on the same disk, the next checkpoint has the size of this one. As long as the
    training goes on, that much stays free, less what a save has already written.
    """

    def __init__(self, exports: Exports, source: str, is_over: Callable[[], bool]) -> None:
        self._exports, self._source, self._is_over = exports, source, is_over
        self._checkpoint_bytes = 0
        self._next_check = 0.0
        with suppress(OSError):
            if os.stat(exports.save).st_dev == os.stat(exports.target).st_dev:
                self._checkpoint_bytes = bytes_below([source])

    def __call__(self, progress: Progress) -> None:
        """Check the disk, now and then.

        Raises:
            DiskFull: The next checkpoint would not fit.
            FileNotFoundError: GPT-NeoX removed the step.
        """
        starts = progress.phase == "writing" and not progress.done
        if not starts and time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + CHECK_SECONDS
        if not os.path.isdir(self._source):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._source)
        reserved = self._reserved_bytes()
        if not reserved:
            return
        free = free_bytes(self._exports.target)
        if free >= reserved + (progress.total or 0):
            return
        size = (progress.total or 0) if starts and not self._shares_blocks() else 0
        if free < reserved + size:
            raise DiskFull(
                f"{self._exports.target} and {self._exports.save} are on one disk with {free:,} "
                f"free bytes, of which the next checkpoint needs {reserved:,}"
                f"{f' and the export {size:,}' if size else ''}.",
                "Free some space, or set save_hf to a folder on another disk.",
                reserved + (progress.total or 0),
            )

    def _reserved_bytes(self) -> int:
        if self._is_over() or not self._checkpoint_bytes:
            return 0
        save = self._exports.save
        last = latest(save)
        begun = [os.path.join(save, f"global_step{n}") for n in steps(save) if n > last]
        return max(0, self._checkpoint_bytes - bytes_below(begun))

    def _shares_blocks(self) -> bool:
        """Whether the export takes hardly any space, because the disk shares blocks."""
        with suppress(OSError):
            path = next(entry.path for entry in os.scandir(self._source) if entry.is_file())
            return can_share(path, self._exports.target, Context())
        return False


def free_bytes(folder: str) -> int:
    return shutil.disk_usage(folder).free


def bytes_below(folders: Iterable[str]) -> int:
    """The size of all files in these folders."""
    total = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):  # GPT-NeoX removes and renames files
                    total += os.path.getsize(os.path.join(parent, name))
    return total
