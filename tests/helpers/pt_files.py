"""Reading tensors through torch, and a tar header that legacy ``.pt`` files may start with."""

from pathlib import Path

import torch

from neox_bridge.tensors.tensor_ref import TensorRef


def tar_header(name: bytes, magic: bytes = b"ustar\x0000") -> bytes:
    """A tar's first header; without a magic one of V7, which only its checksum tells."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:136] = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % 0
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257 : 257 + len(magic)] = magic
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tensor_of(ref: TensorRef) -> torch.Tensor:
    """The tensor that a reference means, through torch."""
    raw = bytearray(Path(ref.file).read_bytes()[ref.offset :])
    dtype = getattr(torch, ref.dtype)
    size = len(raw) // dtype.itemsize * dtype.itemsize
    if 0 in ref.shape:
        return torch.empty(ref.shape, dtype=dtype)
    flat = torch.frombuffer(raw[:size], dtype=dtype)
    if ref.strides is None:
        return flat[: ref.nbytes // dtype.itemsize].reshape(ref.shape)
    return flat.as_strided(ref.shape, ref.strides)
