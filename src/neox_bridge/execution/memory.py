"""Estimates the peak memory of an execution."""

from math import prod

from neox_bridge.execution import buffers, digests, movers, output, streams, transform
from neox_bridge.execution.execute import default_workers
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import copied
from neox_bridge.stores import ranges
from neox_bridge.stores.paths import is_local
from neox_bridge.stores.store import part_size
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.pieces import OutputTensor

RUNTIME_BYTES = 50_000_000  # Python, numpy and the rest of the program (measured)
_FLOAT64 = 8


def peak_memory(plan: Plan, target: str, workers: int | None = None) -> int:
    """Estimate the peak memory of executing a plan and verifying the result, in bytes.

    It includes literal bytes of the plan and Python itself, but not mapped files.

    Args:
        plan: The plan to execute.
        target: The target. Objects of a store are sent in parts, which are held in memory.
        workers: Threads; by default those of ``execute``.
    """
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    literals = sum(len(data) for file in plan.files for _, data in file.literals)
    inline = sum(len(tensor.inline) for tensor in tensors if tensor.inline is not None)
    thread = movers.BUFFER_BYTES + digests.STEP_BYTES
    computed = [tensor for tensor in tensors if _is_computed(tensor)]
    thread += max(map(_block_bytes, computed), default=0)
    if any(tensor.pieces for tensor in computed):
        thread += 2 * buffers.ROOM_BYTES  # the verification has one buffer per side
    if not is_local(target):
        thread += streams.PARTS_IN_MEMORY * part_size(max(file.size for file in plan.files))
    shared = output.SMALL_BYTES
    if any(not is_local(piece.source.file) for t in tensors for piece in t.pieces if piece.source):
        shared += ranges.MEMORY
    return RUNTIME_BYTES + literals + inline + shared + (workers or default_workers()) * thread


def _is_computed(tensor: OutputTensor) -> bool:
    """Whether numpy computes some bytes of a tensor."""
    return tensor.inline is None and copied(tensor) != tensor.nbytes


def _block_bytes(tensor: OutputTensor) -> int:
    """The bytes that a thread allocates for a block of a tensor, besides its buffers."""
    elements = min(transform.block_elements(tensor), prod(tensor.shape))
    size = itemsize(tensor.dtype)
    sources = [itemsize(p.source.dtype) for p in tensor.pieces if p.source is not None]
    if tensor.reduce != "none":
        # the part of every rank, with gaps that are read; total, mean and deviations
        return elements * (transform.GAPS * sum(sources) + 4 * _FLOAT64 + 2 * size)
    is_wide = tensor.divisor != 1 or any(piece.scale != 1 for piece in tensor.pieces)
    widest = _FLOAT64 if is_wide else max((size, *sources))
    # read, assembled, cast, compared with the original, made contiguous
    return elements * (3 * widest + 2 * size)
