"""Casts of weights to another dtype, in plans and verifications."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from neox_bridge.findings import Finding
from neox_bridge.wording import plural

_SHOWN = 6  # maximum number of tensors in a message


@dataclass(frozen=True, slots=True)
class Cast:
    """The number of tensors that are cast from one dtype, such as ``float32``, to another."""

    source: str
    target: str
    tensors: int


def count_casts(pairs: Iterable[tuple[str, str]]) -> tuple[Cast, ...]:
    """Count the casts, most frequent first. pairs: the dtypes in the source and in the target."""
    counts = Counter((source, target) for source, target in pairs if source != target)
    return tuple(Cast(*pair, count) for pair, count in counts.most_common())


def equality(casts: Iterable[Cast]) -> str:
    """Describe how a verified result equals its source."""
    changes = [f"{cast.source} to {cast.target}" for cast in casts]
    return f"equal after casting {' and '.join(changes)}" if changes else "equal, bit by bit"


def verified(casts: Iterable[Cast]) -> str:
    """The text of ``equality`` for the end of a result line."""
    casts = tuple(casts)
    return f"verified: {equality(casts)}" if casts else "verified bit by bit"


def overflow_finding(overflows: Mapping[str, int]) -> Finding:
    """The warning about finite values that a cast made infinite. overflows: counts by tensor."""
    total = sum(overflows.values())
    values = "finite value" if total == 1 else "finite values"
    named = [f"{name} ({count:,})" for name, count in sorted(overflows.items())]
    more = f" and {plural(len(named) - _SHOWN, 'more tensor')}" if len(named) > _SHOWN else ""
    names = ", ".join(named[:_SHOWN]) + more
    return Finding(
        "cast-overflow",
        "warning",
        f"{total:,} {values} overflowed to infinity in the cast: {names}",
        "choose `dtype=bfloat16` or float32",
    )
