"""Decides which dtypes of stored weights can be converted.

16-bit and 32-bit floats can be converted. Integers instead of weights are a quantization whose
scales are missing, so they are refused. Neither framework trains in 8-bit floats or float64, so
they are converted only if the user asks for a cast.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from neox_bridge.architectures.base import Refusal
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint, refuse_all
from neox_bridge.tensors.dtypes import FLOAT8
from neox_bridge.tensors.pieces import Whole
from neox_bridge.wording import plural, some

PLAIN = ("float32", "float16", "bfloat16")
_CAST = (*FLOAT8, "float64")


@dataclass(frozen=True, slots=True)
class OddWeights:
    """Weights of a dtype in which no framework trains.

    Attributes:
        names: The names of the tensors.
        castable: Whether they can be cast with ``dtype``.
        reason: Why they cannot be converted as they are, as a part of a sentence.
        way_out: What to do, as a part of a sentence.
    """

    names: tuple[str, ...]
    castable: bool
    reason: str
    way_out: str


def odd_dtypes(checkpoint: Checkpoint) -> list[OddWeights]:
    """The weights that need a cast, or cannot be converted at all."""
    groups = _by_dtype(checkpoint.tensors)
    odd_weights = []
    odd = {name: held for name, held in groups.items() if name not in (*PLAIN, *_CAST)}
    if odd:
        names = [name for held in odd.values() for name in held]
        reason = (
            f"{plural(len(names), 'weight')} of {some(sorted(odd))}, such as {names[0]}. These are "
            "quantized values without their scales, not floating-point weights"
        )
        way_out = "convert the original, unquantized model"
        odd_weights.append(OddWeights(tuple(names), False, reason, way_out))
    for kind in _CAST:
        if held := groups.get(kind):
            reason = f"{plural(len(held), 'weight')} of {kind}, such as {held[0]}"
            way_out = "`dtype=bfloat16` (or float32, float16) of convert casts the weights"
            if kind in FLOAT8:
                reason += ". If the values had scales, they are another model without them"
                way_out += ", if the values have no scales"
            odd_weights.append(OddWeights(tuple(held), True, reason, way_out))
    return odd_weights


def dtype_refusals(checkpoint: Checkpoint, dtype: str = "keep") -> list[Refusal]:
    """Why the dtypes of the weights cannot be written. dtype: of the target, or "keep"."""
    return [
        Refusal("dtype", odd.reason, odd.way_out)
        for odd in odd_dtypes(checkpoint)
        if not odd.castable or dtype == "keep"
    ]


def check_dtypes(checkpoint: Checkpoint, dtype: str) -> list[Finding]:
    """The warnings about casts of unusual dtypes. Raises Refused for what cannot be cast."""
    refuse_all(dtype_refusals(checkpoint, dtype), checkpoint.path)
    findings = []
    groups = _by_dtype(checkpoint.tensors)
    for kind in _CAST:
        if kind not in groups:
            continue
        names = groups[kind]
        # 16-bit floats can represent all 8-bit floats, including subnormals
        how = "exactly" if kind in FLOAT8 else "rounded to nearest"
        findings.append(
            Finding(
                "cast-dtype",
                "warning",
                f"{plural(len(names), 'weight')} cast from {kind} to {dtype}, {how}: "
                f"{some(names, 3)}"
                + (". The values are used as they are, without scales" if kind in FLOAT8 else ""),
            )
        )
    return findings


def _by_dtype(tensors: Mapping[str, Whole]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, whole in tensors.items():
        groups.setdefault(whole.dtype, []).append(name)
    return groups
