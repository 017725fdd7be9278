"""The place of a tensor in a file, with its dtype and shape, and without its data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from operator import attrgetter
from typing import Any, TypeVar

from neox_bridge.tensors.dtypes import itemsize

_T = TypeVar("_T", bound=type[Any])


def packed(cls: _T) -> _T:
    """A decorator for dataclasses that makes pickling and unpickling four times as fast.

    By default, pickle calls ``dataclasses.fields`` for each object of a frozen dataclass with slots
    (Lib/dataclasses.py, _dataclass_getstate).
    """
    get = attrgetter(*(field.name for field in fields(cls)))

    def reduce(self: Any) -> tuple[Any, tuple[Any, ...]]:
        return cls, get(self)

    cls.__reduce__ = reduce  # type: ignore[assignment]
    return cls


@packed
@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor inside a file.

    Attributes:
        file: The path or URL of the file.
        offset: Bytes from the start of the file to the first element.
        dtype: A name in ``dtypes.BY_NAME``.
        shape: The shape.
        strides: The strides in elements; None for a contiguous tensor in row-major order.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The size of all elements in bytes, without gaps."""
        return prod(self.shape) * itemsize(self.dtype)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether strides (in elements) leave no gap. Those of dimensions of size 1 are ignored."""
    dense = zip(shape, strides, row_major(shape), strict=True)
    return 0 in shape or all(size == 1 or stride == want for size, stride, want in dense)


def halves(
    start: tuple[int, ...], shape: tuple[int, ...], strides: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...]]]:
    """Cut a box in two, along the dimension that spans most of the file.

    Yields:
        The start and the shape of each half, and its place in the box.
    """
    longest = max(range(len(shape)), key=lambda dim: (shape[dim] - 1) * strides[dim])
    half = shape[longest] // 2
    for low, count in ((0, half), (half, shape[longest] - half)):
        begin = (*start[:longest], start[longest] + low, *start[longest + 1 :])
        size = (*shape[:longest], count, *shape[longest + 1 :])
        yield begin, size, (*(slice(None),) * longest, slice(low, low + count))
