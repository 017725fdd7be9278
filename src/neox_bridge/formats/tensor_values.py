"""Reads boxes of stored tensors in bounded memory, from a disk or a store."""

from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from neox_bridge.errors import BridgeError
from neox_bridge.tensors.dtypes import itemsize, to_numpy
from neox_bridge.tensors.tensor_ref import TensorRef, halves, row_major
from neox_bridge.wording import plural

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_GAPS = 4  # a box is read as one run of bytes if that is at most so many times its size


def read_box(
    file: BinaryIO, ref: TensorRef, start: tuple[int, ...], shape: tuple[int, ...]
) -> "Array":
    """Read a box of a tensor, in the tensor's dtype.

    Args:
        file: ``ref.file``, open.
        ref: The tensor, strided or not.
        start: The first element of the box, one number for each dimension.
        shape: The size of the box.

    Raises:
        BridgeError: The file is shorter than the tensor says.
    """
    import numpy as np

    dtype, size = to_numpy(ref.dtype), itemsize(ref.dtype)
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = ref.strides or row_major(ref.shape)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if extent > _GAPS * prod(shape):  # half by half, so that gaps are not read
        out: Array = np.empty(shape, dtype)
        for begin, part, place in halves(start, shape, strides):
            out[place] = read_box(file, ref, begin, part)
        return out
    first = sum(a * b for a, b in zip(start, strides, strict=True))
    file.seek(ref.offset + first * size)
    data = file.read(extent * size)
    if len(data) < extent * size:
        missing = extent * size - len(data)
        raise BridgeError(
            f"{ref.file} is {plural(missing, 'byte')} too short. Copy or download it again."
        )
    steps = tuple(size * stride for stride in strides)
    box: Array = np.ndarray(shape, dtype, data, 0, steps)
    return box
