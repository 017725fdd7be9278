"""The dtypes of checkpoints, with their names in each format."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype.

    Attributes:
        name: The name in torch.
        itemsize: The size of an element in bytes.
        safetensors: The name in safetensors files; "" if there is none.
        storage: The legacy storage class of torch in pickles; "" if there is none.
    """

    name: str
    itemsize: int
    safetensors: str
    storage: str


_TABLE = (
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("float32", 4, "F32", "FloatStorage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("bfloat16", 2, "BF16", "BFloat16Storage"),
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
    DType("float8_e4m3fn", 1, "F8_E4M3", ""),
    DType("float8_e5m2", 1, "F8_E5M2", ""),
    DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ", ""),
    DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ", ""),
    DType("float8_e8m0fnu", 1, "F8_E8M0", ""),
    DType("uint16", 2, "U16", ""),
    DType("uint32", 4, "U32", ""),
    DType("uint64", 8, "U64", ""),
    DType("complex64", 8, "C64", "ComplexFloatStorage"),
    DType("complex128", 16, "", "ComplexDoubleStorage"),
)
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}
BY_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}
FLOATING = ("float64", "float32", "float16", "bfloat16")
# 8-bit floats of weights; float8_e8m0fnu is only for scales
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@dataclass(frozen=True, slots=True)
class PackedDType:
    """A dtype of safetensors whose elements are smaller than a byte.

    Attributes:
        name: What the elements are.
        bits: The size of an element.
    """

    name: str
    bits: int


PACKED_SAFETENSORS = {
    "F4": PackedDType("4-bit floats", 4),
    "F6_E2M3": PackedDType("6-bit floats", 6),
    "F6_E3M2": PackedDType("6-bit floats", 6),
}


def itemsize(name: str) -> int:
    """The size of an element of a dtype in bytes."""
    return BY_NAME[name].itemsize


@cache
def to_numpy(name: str) -> "np.dtype[Any]":
    """The dtype in numpy, or in ml_dtypes if numpy does not have it."""
    import ml_dtypes
    import numpy as np

    extra = name == "bfloat16" or name.startswith("float8")
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name) if extra else name)
    return dtype
