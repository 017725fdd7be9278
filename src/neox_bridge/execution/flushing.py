"""Flushes files and folders to disk."""

import os


def flush(path: str) -> None:
    """fsync of a file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_folders(folder: str) -> None:
    """fsync of every folder below and including ``folder``, the deepest first."""
    for path, _, _ in os.walk(folder, topdown=False):
        flush(path)
