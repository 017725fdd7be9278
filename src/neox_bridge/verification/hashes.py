"""Fingerprints of logical tensors: equal for equal values, independent of the layout."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import xxhash

from neox_bridge.execution.context import Context
from neox_bridge.execution.transform import boxes, load
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.optimizer.states import tensor_of
from neox_bridge.stores.paths import is_local
from neox_bridge.tensors.dtypes import FLOATING, itemsize, to_numpy
from neox_bridge.tensors.pieces import Whole, cut, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.verification.compare import each, values, without_reduction

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

VERSION = 1  # version of the hash method; a new one invalidates cached fingerprints
BLOCK_BYTES = 1 << 20  # bytes; part of the hash method, because a shard is hashed box by box
_SMALL_BYTES = 64 << 10  # tensors of this mean size or less take longer in two threads than in one
_CHUNK_ELEMENTS = 1 << 17  # elements that are converted to float64 at a time


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor-parallel rank's bytes of a tensor. constant: all elements have the same bits."""

    hash: str
    constant: bool


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A summary of a tensor's content in a few bytes.

    Attributes:
        hash: The xxh3_128, as 32 hex digits, of the elements in row-major order, the dtype and the
            shape.
        shape: The shape without rows of zeros at the end of a vocabulary, which are padding; the
            hash also ignores them.
        norm: The L2 norm of the finite elements, in float64; None if they cannot be decoded.
        bad: How many are NaN or infinite.
        constant: Whether all elements have the same bits.
        shards: The shards by tensor-parallel rank, including padding, if several ranks hold it.
    """

    hash: str
    dtype: str
    shape: tuple[int, ...]
    norm: float | None
    bad: int
    constant: bool
    shards: tuple[Shard, ...] = ()


def fingerprints(
    checkpoint: Checkpoint | StoredModel,
    *,
    known: Mapping[str, Fingerprint] | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Fingerprint]:
    """The fingerprints of all tensors, by Hugging Face name. Each is read once, in blocks.

    Row biases are hashed as the sum over the ranks if the model adds the sum. known: fingerprints
    that need not be computed. Raises BridgeError if a file cannot be read.
    """
    known = known or {}
    context = Context(progress)
    todo = [name for name in checkpoint.tensors if name not in known]
    order = _reading_order(checkpoint, todo)

    def one(name: str) -> Fingerprint:
        row, whole = checkpoint.by_name.get(tensor_of(name)), checkpoint.tensors[name]
        vocabulary = row is not None and row.weight.split == "vocab"
        result = fingerprint(whole, context, padded=vocabulary)
        context.wrote(whole.nbytes, "copied")
        return result

    size = sum(checkpoint.tensors[name].nbytes for name in order)
    threads = 2 if size > len(order) * _SMALL_BYTES else 1
    results = each(order, one, context, workers or threads)
    read = dict(zip(order, results, strict=True))
    return {name: read[name] if name in read else known[name] for name in checkpoint.tensors}


def _reading_order(checkpoint: Checkpoint | StoredModel, names: Sequence[str]) -> list[str]:
    """Largest first, so that threads end together; for stores, in file order.

    A range of a store is fetched only once if its tensors are read consecutively.
    """
    tensors = checkpoint.tensors
    if is_local(checkpoint.path):
        return sorted(names, key=lambda name: -tensors[name].nbytes)

    def place(name: str) -> tuple[str, int]:
        ref = next(iter(sources(tensors[name])), None)
        return (ref.file, ref.offset) if ref is not None else ("", 0)

    return sorted(names, key=place)


def fingerprint(whole: Whole, context: Context, *, padded: bool = False) -> Fingerprint:
    """The fingerprint of a tensor. padded: ignore zero rows at its end."""
    refs = sources(whole)
    if whole.reduce != "none":
        total = _hash(without_reduction(whole, context), context, (), padded)[0]
        parts = [_hash(whole_of(ref), context, (), False)[0] for ref in refs]
    else:
        total, parts = _hash(whole, context, refs if len(refs) > 1 else (), padded)
    shape = whole.shape
    if total.rows:
        shape = (total.fed // total.rows, *shape[1:])
    return Fingerprint(
        total.digest(f"{whole.dtype}{list(shape)}"),
        whole.dtype,
        shape,
        math.sqrt(total.squares),
        total.bad if whole.dtype in FLOATING else 0,
        total.constant,
        tuple(Shard(part.digest(), part.constant) for part in parts),
    )


def sources(whole: Whole) -> tuple[TensorRef, ...]:
    """The stored tensors that an assembled tensor consists of, by rank."""
    return tuple(dict.fromkeys(p.source for p in whole.pieces if p.source is not None))


class _Stream:
    """Computes a hash, a norm and a few facts of elements, block by block.

    rows: the bytes per row of a padded tensor, whose trailing zero rows are held back; else 0.
    """

    def __init__(self, rows: int = 0, *, measure: bool = True) -> None:
        self.state = xxhash.xxh3_128()
        self.rows, self.held, self.fed = rows, 0, 0
        self.measure, self.squares, self.bad = measure, 0.0, 0
        self.first: bytes | None = None
        self.constant = True

    def feed(self, block: "Array") -> None:
        import numpy as np

        block = np.ascontiguousarray(block).reshape(-1)
        if not block.size:
            return
        width = block.itemsize
        data = block.view(np.uint8)
        if self.constant:
            self.first = self.first or data[:width].tobytes()
            self.constant = bool((data.reshape(-1, width) == np.frombuffer(self.first, "u1")).all())
        if self.measure and block.dtype.kind not in "bc":
            self._square(block)
        if self.rows:
            data = self._without_padding(data)
        self.fed += data.size
        self.state.update(data.data)

    def digest(self, more: str = "") -> str:
        self.state.update(more.encode())
        return self.state.hexdigest()

    def _without_padding(self, data: "Array") -> "Array":
        """The bytes up to the last nonzero one. Hashes zeros that were held back before it."""
        import numpy as np

        if not data[-1] and not data[-self.rows :].any():
            used = np.flatnonzero(data)
            end = int(used[-1]) + 1 if used.size else 0
        else:
            end = data.size
        if end:
            while self.held:  # they were not padding
                step = min(self.held, BLOCK_BYTES)
                self.state.update(bytes(step))
                self.held, self.fed = self.held - step, self.fed + step
        self.held += data.size - end
        return data[:end]

    def _square(self, block: "Array") -> None:
        import numpy as np

        for low in range(0, block.size, _CHUNK_ELEMENTS):
            with np.errstate(invalid="ignore"):  # of signaling NaNs, which are counted below
                part = block[low : low + _CHUNK_ELEMENTS].astype(np.float64)
            # no BLAS, because its threads would wait for each other and compete with ours
            square = float(np.einsum("i,i->", part, part))
            if not math.isfinite(square):
                finite = np.isfinite(part)
                self.bad += int(part.size - finite.sum())
                square = float(np.square(part[finite]).sum())
            self.squares += square


def _hash(
    whole: Whole, context: Context, refs: tuple[TensorRef, ...], padded: bool
) -> tuple[_Stream, list[_Stream]]:
    """Hash an assembled tensor and, in the same pass over the files, its shards."""
    row = prod(whole.shape[1:]) * itemsize(whole.dtype) if padded and whole.shape else 0
    total = _Stream(row)
    parts = {ref: _Stream(measure=False) for ref in refs}
    for start, shape in boxes(whole.shape, max(1, BLOCK_BYTES // itemsize(whole.dtype))):
        context.check()
        if not refs:
            total.feed(values(whole, whole.dtype, start, shape, context))
            continue
        total.feed(_box(whole, start, shape, context, parts))
    if padded and row:  # fill up the last row with zeros
        total.state.update(bytes(-total.fed % row))
        total.fed += -total.fed % row
    return total, list(parts.values())


def _box(
    whole: Whole,
    start: tuple[int, ...],
    shape: tuple[int, ...],
    context: Context,
    parts: dict[TensorRef, _Stream],
) -> "Array":
    import numpy as np

    out: Array = np.empty(shape, to_numpy(whole.dtype))
    for piece in cut(whole, start, shape, (0,) * len(shape)):
        assert piece.source is not None
        block = load(piece.source, piece.start, piece.shape, context)
        parts[piece.source].feed(block)
        place = zip(piece.to, piece.shape, strict=True)
        out[tuple(slice(low, low + size) for low, size in place)] = block
    return out
