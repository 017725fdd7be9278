"""Values that are not learned: computed from the config, and compared with what a file stores."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.findings import Finding
from neox_bridge.stores.paths import read_pieces
from neox_bridge.tensors.dtypes import to_numpy
from neox_bridge.tensors.tensor_ref import TensorRef

if TYPE_CHECKING:
    import numpy as np

# the rounding of a stored value, twice: once stored, once computed on another machine
_ROUNDING = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
_SUBNORMAL = {"float16": 6e-8}
_MOST_BYTES = 4 << 20  # of a bias or a buffer; what is larger is neither


@dataclass(frozen=True, slots=True)
class InvFreqMismatch:
    """A stored inv_freq that is not what the config gives.

    tensor: the one that is off the most. error: of its value; infinite if its length is another.
    """

    tensor: str
    error: float
    base: float
    fraction: float


def check_inv_freq(config: ModelConfig, stored: Mapping[str, TensorRef]) -> InvFreqMismatch | None:
    """The mismatch where a stored inv_freq isn't that of the config's base and fraction.

    Old transformers computed with the stored one, GPT-NeoX never does
    (megatron/model/positional_embeddings.py), so that such a model differs between the two.
    """
    if not stored:
        return None
    worst, where = 0.0, ""
    known = {n: r for n, r in stored.items() if r.dtype in _ROUNDING and r.strides is None}
    small = {name: ref for name, ref in known.items() if ref.nbytes <= _MOST_BYTES}
    values = dict(zip(small, _read_all(small.values()), strict=True))
    for name, ref in known.items():
        error = inv_freq_error(config, values[name], ref.dtype) if name in small else float("inf")
        if error > _ROUNDING[ref.dtype] + _subnormal(config, ref.dtype) and error > worst:
            worst, where = error, name
    if not where:
        return None
    return InvFreqMismatch(where, worst, config.rotary_base, config.rotary_pct)


def mismatch_finding(mismatch: InvFreqMismatch) -> Finding:
    """What is said of it."""
    how = f"its values differ by up to {mismatch.error:.2g} (relative)"
    if mismatch.error == float("inf"):
        how = "its length differs"
    return Finding(
        "inv-freq-differs",
        "warning",
        f"{mismatch.tensor} does not match rotary_emb_base {mismatch.base:g} and rotary_pct "
        f"{mismatch.fraction:g}: {how}",
        "check both in the config. The buffer itself is not converted",
    )


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


def is_zero(ref: TensorRef) -> bool:
    """Whether a small tensor holds nothing but zeros of either sign."""
    import numpy as np

    if ref.strides is not None or ref.nbytes > _MOST_BYTES:
        return False
    return not np.any(np.frombuffer(_read_all([ref])[0], to_numpy(ref.dtype)) != 0)


def _read_all(refs: Iterable[TensorRef]) -> list[bytes]:
    """All of each tensor, of up to ``_MOST_BYTES`` bytes."""
    return read_pieces([(ref.file, ref.offset, ref.nbytes) for ref in refs])


def _subnormal(config: ModelConfig, dtype: str) -> float:
    """What fp16's coarser steps below 6e-5 add to the relative rounding of the smallest value."""
    if dtype not in _SUBNORMAL or not config.rotary_dim:
        return 0.0
    smallest = config.rotary_base ** -((config.rotary_dim - 2) / config.rotary_dim)
    return float(_SUBNORMAL[dtype] / smallest)
