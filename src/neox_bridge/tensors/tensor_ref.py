"""Where a tensor lies: a file, an offset, a dtype, a shape. Never its data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from operator import attrgetter
from typing import Any, TypeVar

from neox_bridge.tensors.dtypes import itemsize

_T = TypeVar("_T", bound=type[Any])


def packed(cls: _T) -> _T:
    """A decorator for dataclasses: pickles that are made and read in a quarter of the time.

    Those of frozen dataclasses with slots go through ``dataclasses.fields`` for each object
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

    offset: bytes from the file's start to the first element.
    dtype: a name of ``dtypes.BY_NAME``.
    strides: in elements, for tensors that aren't contiguous in row-major order; else None.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take, without gaps."""
        return prod(self.shape) * itemsize(self.dtype)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these strides (in elements) leave no gap; a dimension of size 1 has any."""
    dense = zip(shape, strides, row_major(shape), strict=True)
    return 0 in shape or all(size == 1 or stride == want for size, stride, want in dense)


def halves(
    start: tuple[int, ...], shape: tuple[int, ...], strides: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...]]]:
    """A box cut in two where it is longest in the file: starts, shapes, and places in the box."""
    longest = max(range(len(shape)), key=lambda dim: (shape[dim] - 1) * strides[dim])
    half = shape[longest] // 2
    for low, count in ((0, half), (half, shape[longest] - half)):
        begin = (*start[:longest], start[longest] + low, *start[longest + 1 :])
        size = (*shape[:longest], count, *shape[longest + 1 :])
        yield begin, size, (*(slice(None),) * longest, slice(low, low + count))
