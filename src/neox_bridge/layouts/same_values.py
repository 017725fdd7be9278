"""Whether two stored tensors have the same values, compared in small blocks."""

import os
from contextlib import ExitStack
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from neox_bridge.formats.tensor_values import read_box
from neox_bridge.stores.paths import is_local, open_file
from neox_bridge.tensors.dtypes import FLOAT8, FLOATING, itemsize, to_numpy
from neox_bridge.tensors.pieces import Whole, cut, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

Relation = Literal["equal", "differs", "unknown"]
BLOCK_BYTES = 1 << 20  # of each side at a time
REMOTE_BLOCK_BYTES = 8 << 20  # the same of objects, of which every block is a request
_MOST_FILES = 16  # open at a time


def relation(first: Whole, second: Whole, most_bytes: int | None = None) -> Relation:
    """How the values of two tensors of the same shape stand to each other.

    Values of different floating dtypes are compared after widening both, which is exact.

    most_bytes: of each side, to compare at most; "unknown" is the answer where these are equal and
    more is left. Raises BridgeError for a file that can't be read, or is too short.
    """
    if first.shape != second.shape:
        return "differs"
    row_bytes = max(1, prod(first.shape[1:]) * itemsize(first.dtype))
    remote = any(p.source and not is_local(p.source.file) for p in (*first.pieces, *second.pieces))
    step = max(1, (REMOTE_BLOCK_BYTES if remote else BLOCK_BYTES) // row_bytes)
    rows = first.shape[0] if first.shape else 1
    with _OpenFiles() as files:
        for low in range(0, rows, step):
            if most_bytes is not None and low * row_bytes >= most_bytes:
                return "unknown"
            count = min(step, rows - low)
            a, b = (_rows(whole, low, count, files) for whole in (first, second))
            if not _same(a, b):
                return "differs"
    return "equal"


def same_bytes(first: TensorRef, second: TensorRef, most_bytes: int | None = None) -> Relation:
    """Whether two stored tensors are the same bits, in one dtype and shape."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return "differs"
    if same_place(first, second):
        return "equal"
    bits = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}.get(itemsize(first.dtype))
    if bits is None:
        return "unknown"
    one, other = (
        whole_of(TensorRef(ref.file, ref.offset, bits, ref.shape or (1,), ref.strides))
        for ref in (first, second)
    )
    return relation(one, other, most_bytes)


def same_place(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors are the same bytes of one file, as shared storages are."""
    here = (first.offset, first.dtype, first.shape, first.strides)
    there = (second.offset, second.dtype, second.shape, second.strides)
    if here != there:
        return False
    if first.file == second.file:
        return True
    try:
        return os.path.samefile(first.file, second.file)
    except OSError:  # one of them is missing, or is in a store
        return False


class _OpenFiles(ExitStack):
    """Files by path; a few at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, BinaryIO] = {}

    def file(self, path: str) -> BinaryIO:
        if path not in self._files:
            if len(self._files) >= _MOST_FILES:
                self._files.clear()
                self.close()
            self._files[path] = self.enter_context(open_file(path))
        return self._files[path]


def _rows(whole: Whole, low: int, count: int, files: _OpenFiles) -> "Array":
    """Some rows of a tensor, in its dtype."""
    import numpy as np

    shape = (count, *whole.shape[1:])
    start = (low, *(0 for _ in whole.shape[1:]))
    out: Array = np.empty(shape, to_numpy(whole.dtype))
    for piece in cut(whole, start, shape, (0,) * len(shape)):
        place = tuple(slice(t, t + n) for t, n in zip(piece.to, piece.shape, strict=True))
        if piece.source is None:
            out[place] = piece.fill
        else:
            file = files.file(piece.source.file)
            out[place] = read_box(file, piece.source, piece.start, piece.shape)
    return out


def _same(a: "Array", b: "Array") -> bool:
    """Whether all values are the same number, or the same bits (of a NaN)."""
    import numpy as np

    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return True
    names = {str(a.dtype), str(b.dtype)}
    if not names <= {*FLOATING, *FLOAT8}:
        return bool(np.array_equal(a, b))
    wide = "float64" if "float64" in names else "float32"
    with np.errstate(all="ignore"):
        return bool(np.array_equal(a.astype(wide), b.astype(wide), equal_nan=True))
