"""How long a batch will take: from a sample of it, copied where the batch will write."""

import os
import tempfile
import time

from neox_bridge.execution.context import Context
from neox_bridge.execution.movers import BUFFER_BYTES, move, read
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.paths import is_local

_SAMPLE_BYTES = 128 << 20


def rate_of(plan: Plan, target: str, verify: bool) -> float | None:
    """Bytes a second of a copy of one of the plan's sources onto the target's disk, flushed.

    verify: whether both are read again. None where nothing can be written there, or nothing read.
    The copy is gone afterwards.
    """
    pieces = (p for f in plan.files for t in f.tensors for p in t.pieces if p.source is not None)
    largest = max(pieces, key=lambda p: p.source.nbytes if p.source else 0, default=None)
    if largest is None or largest.source is None:
        return None
    file, start = largest.source.file, largest.source.offset
    size = min(largest.source.nbytes, _SAMPLE_BYTES)
    if not is_local(target):
        return None
    folder = os.path.dirname(os.path.abspath(target))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    context = Context()
    try:
        with tempfile.TemporaryFile(dir=folder) as sample:
            begin = time.perf_counter()
            move(file, start, sample.fileno(), start % 4096, size, context, None)
            os.fsync(sample.fileno())
            if verify:
                _read(sample.fileno(), start % 4096, size)
            return size / (time.perf_counter() - begin)
    except OSError:
        return None
    finally:
        context.files.close()


def _read(fd: int, start: int, size: int) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for at in range(0, size, BUFFER_BYTES):
        read(fd, "the sample", buffer[: min(BUFFER_BYTES, size - at)], start + at)
