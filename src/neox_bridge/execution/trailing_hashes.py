"""Hashes a file while several threads write its tensors."""

import errno
import os
import threading
from collections.abc import Sequence
from typing import Any

from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import hash_range, hasher
from neox_bridge.layouts.record_file import HashName
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

_LEAST_BYTES = 8 << 20  # minimum bytes to hash at once


class Trail:
    """Hashes the finished start of a file while the rest is written.

    The bytes of a tensor, and those up to the next tensor, are final once it is written. The
    directory of a zip at the end is final once all are. A file that shares blocks with a source is
    hashed only with ``shared``; these blocks are read from the source, so that the page cache holds
    them only once.
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
        """Record that the tensor with this index is written. This thread may continue hashing."""
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
        """The hash in hexadecimal, when all is written; None if the file is not hashed."""
        if self._state is None or self._skipped():
            return None
        with self._lock:
            self._read(self._size)
        return str(self._state.hexdigest())

    def _skipped(self) -> bool:
        return not self._shared and self._file in self._context.cloned

    def _read(self, limit: int) -> None:
        """Hash up to ``limit``. Shared blocks are read from the source."""
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
