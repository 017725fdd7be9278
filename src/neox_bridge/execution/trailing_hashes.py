"""The hash of a file whose tensors are written by several threads: it follows behind them."""

import errno
import os
import threading
from collections.abc import Sequence
from typing import Any

from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import HashName, hash_range, hasher
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

_LEAST_BYTES = 8 << 20  # worth going on for


class Trail:
    """Hashes what is written for good, from the file's start, while the rest is written.

    A tensor's own bytes and what lies between it and the next are for good when it is written; a
    zip's directory at the end when all are. No hash is taken of a file that shares blocks with a
    source, unless ``shared``: of these blocks as the source has them, which are in memory once.
    """

    def __init__(
        self,
        file: OutputFile,
        path: str,
        context: Context,
        hash_name: HashName | None,
        shared: bool,
    ) -> None:
        self.tensors: Sequence[OutputTensor] = sorted(file.tensors, key=lambda t: t.offset)
        self._ends = [*(tensor.offset for tensor in self.tensors[1:]), file.size]
        self._written = [False] * len(self.tensors)
        self._path, self._size, self._context, self._shared = path, file.size, context, shared
        self._state: Any = None if hash_name is None else hasher(hash_name)
        self._next, self._at = 0, 0
        status = os.stat(path)
        self._file = status.st_dev, status.st_ino
        self._lock = threading.Lock()

    def written(self, number: int) -> None:
        """A tensor, by its place in ``tensors``, is written; this thread may go on hashing."""
        self._written[number] = True
        if self._state is not None and self._lock.acquire(blocking=False):
            try:
                while self._next < len(self._ends) - 1 and self._written[self._next]:
                    self._next += 1
                limit = self._ends[self._next - 1] if self._next else 0
                if limit - self._at >= _LEAST_BYTES and not self._skipped():
                    self._read(limit)
            finally:
                self._lock.release()

    def digest(self) -> str | None:
        """The hash in hexadecimal, when all is written; None where none is taken."""
        if self._state is None or self._skipped():
            return None
        with self._lock:
            self._read(self._size)
        return str(self._state.hexdigest())

    def _skipped(self) -> bool:
        return not self._shared and self._file in self._context.cloned

    def _read(self, limit: int) -> None:
        """Hash up to ``limit``: what shares blocks with a source, where that has it in memory."""
        parts = self._context.cloned.get(self._file, ())
        for part in sorted((p for p in parts if p.to >= self._at), key=lambda part: part.to):
            if part.to >= limit:
                break
            self._own(part.to)
            self._add(part.source, part.start, part.size)
            self._at += part.size
        self._own(limit)

    def _own(self, limit: int) -> None:
        self._add(self._path, self._at, limit - self._at)
        self._at = limit

    def _add(self, path: str, start: int, size: int) -> None:
        end = start + size
        if hash_range(self._state, path, start, end, self._context.check) < end:
            raise OSError(errno.EIO, "the file ended early", path)
