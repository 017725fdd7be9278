"""Replaces a folder with another, atomically if the kernel supports it."""

import ctypes
import os

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def swap(new: str, old: str) -> None:
    """Put ``new`` where ``old`` is; the old one is then at ``new`` or at ``new.old``.

    Uses one exchange if the kernel supports it (renameat2, RENAME_EXCHANGE). Otherwise, it renames
    twice, and undoes the first rename if the second fails.
    """
    if not _exchange(new, old):
        aside = f"{new}.old"
        try:
            os.rename(old, aside)
            os.rename(new, old)
        except BaseException:  # Ctrl-C may arrive after either rename
            if not os.path.lexists(old):
                os.rename(aside, old)
            raise


def _exchange(first: str, second: str) -> bool:
    """Whether the two names were exchanged in one step."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    return bool(call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
