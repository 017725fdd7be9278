"""Casts blocks of values with a single rounding, in the fastest way that gives the same bits."""

from functools import cache
from typing import TYPE_CHECKING, Any

from neox_bridge.tensors.dtypes import to_numpy

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_CACHED = 1 << 15  # elements per step, so that intermediates stay in the CPU cache


def cast(values: "Array", dtype: "np.dtype[Any]") -> "Array":
    """Cast with one rounding, to nearest even. Returns the values themselves for an equal dtype."""
    import numpy as np

    if values.dtype == dtype:
        return values
    half, brain = to_numpy("float16"), to_numpy("bfloat16")
    if (values.dtype, dtype) in ((half, brain), (brain, half), (half, to_numpy("float32"))):
        taken: Array = np.take(_table(values.dtype, dtype), values.view(np.uint16))
        return taken
    result: Array
    with np.errstate(all="ignore"):
        if (values.dtype, dtype) == (to_numpy("float32"), half):
            return _to_half(values)
        if dtype.itemsize <= 2 and dtype.kind in "Vf" and values.dtype.itemsize <= 2:
            values = values.astype(np.float32)
        elif dtype == brain and values.dtype == np.float64:
            values = _to_odd(values)  # ml_dtypes casts through float32, which would round twice
        result = values.astype(dtype)
    return result


@cache
def _table(source: "np.dtype[Any]", dtype: "np.dtype[Any]") -> "Array":
    """A lookup table from a 2-byte dtype to another dtype: four times as fast as casting.

    bfloat16 and float16 are cast through float32, because numpy has no direct cast that rounds
    once.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        every = np.arange(65536, dtype=np.uint16).view(source)
        table: Array = every.astype(np.float32).astype(dtype)
    return table


def _to_half(values: "Array") -> "Array":
    """Cast float32 to float16 on its bits: three times as fast as numpy, with the same result."""
    import numpy as np

    flat = np.ascontiguousarray(values).reshape(-1)
    out: Array = np.empty(flat.shape, np.float16)
    for at in range(0, flat.size, _CACHED):
        out[at : at + _CACHED] = _rounded(flat[at : at + _CACHED])
    reshaped: Array = out.reshape(values.shape)
    return reshaped


def _rounded(values: "Array") -> "Array":
    """Normal values: the exponent bias becomes 15 instead of 127, and 13 mantissa bits are dropped.

    Subnormal ones are multiples of 2**-24, the last place of 0.5 in float32: the adder rounds.
    Values that overflow or are not finite are left to numpy.
    """
    import numpy as np

    word = np.uint32
    bits = values.view(word)
    size = bits & word(0x7FFFFFFF)
    if size.max() >= word(0x477FF000):  # 65520, halfway between 65504 and the overflow at 65536
        left: Array = values.astype(np.float16)
        return left
    out = size >> word(13)
    out &= word(1)
    out += size
    out += word((0xFFF - (112 << 23)) & 0xFFFFFFFF)
    out >>= word(13)
    half = out.astype(np.uint16)
    small = np.flatnonzero(size < word(0x38800000))  # 2**-14
    lifted = size[small].view(np.float32) + np.float32(0.5)
    half[small] = lifted.view(word) - word(0x3F000000)
    np.right_shift(bits, word(16), out=out)
    half |= out.astype(np.uint16) & np.uint16(0x8000)
    rounded: Array = half.view(np.float16)
    return rounded


def _to_odd(values: "Array") -> "Array":
    """Round float64 to float32 to odd: set the last bit if bits were lost, so no tie appears."""
    import numpy as np

    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    bits -= (np.abs(near.astype(np.float64)) > np.abs(values)).astype(np.uint32)
    bits |= ((near.astype(np.float64) != values) & ~np.isnan(values)).astype(np.uint32)
    return near
