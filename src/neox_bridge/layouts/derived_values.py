"""Values that aren't learned: computed from the config, never trusted from a file."""

from typing import TYPE_CHECKING, Any

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.tensors.dtypes import to_numpy

if TYPE_CHECKING:
    import numpy as np


def inv_freq(config: ModelConfig) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """float32 [rotary_dim / 2]: ``1 / base ** (arange(0, dim, 2) / dim)`` in fp32.

    GPT-NeoX megatron/model/positional_embeddings.py, RotaryEmbedding.
    """
    import numpy as np

    dim = config.rotary_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = np.float32(config.rotary_base)
    # the power in double, rounded once: correctly rounded, as libm's powf nearly always is
    power = np.power(np.float64(base), exponent.astype(np.float64)).astype(np.float32)
    result: np.ndarray[Any, np.dtype[np.float32]] = np.float32(1.0) / power
    return result


def inv_freq_bytes(config: ModelConfig, dtype: str) -> bytes:
    """The buffer as GPT-NeoX stores it: rounded to the parameters' dtype."""
    return inv_freq(config).astype(to_numpy(dtype)).tobytes()


def inv_freq_error(config: ModelConfig, stored: bytes, dtype: str) -> float:
    """The largest relative deviation of a stored buffer; inf where its length is another."""
    import numpy as np

    want = inv_freq(config).astype(np.float64)
    have = np.frombuffer(stored, to_numpy(dtype)).astype(np.float64)
    if have.shape != want.shape:
        return float("inf")
    return float(np.max(np.abs(have - want) / want, initial=0.0))
