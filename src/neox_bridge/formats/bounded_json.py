"""Parses JSON from untrusted files within bounds of time, memory and depth."""

import json
import sys
from collections.abc import Callable
from typing import Any

# The estimated memory that the parser may use, in bytes: the text, its strings, and one object of
# CPython for each syntax character (those within strings count too).
_MOST_BYTES = 216 << 20
_COSTS = {"{": 200, "[": 72, ":": 200, ",": 64}
_DIGITS = 40  # of a number; transformers writes 10**30 for "no limit"
DEPTH = 64


def parse_json(
    raw: bytes,
    depth: int | None = DEPTH,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """Parse JSON.

    Args:
        depth: How deeply containers may nest; None for any depth, if no code walks them.
        pairs: ``object_pairs_hook`` of json.loads.
        constant: ``parse_constant`` of json.loads.

    Raises:
        ValueError: The text is not JSON or exceeds a bound. The message is a short reason.
    """
    text = raw.decode("utf-8")
    memory = 2 * sys.getsizeof(text) + sum(text.count(mark) * c for mark, c in _COSTS.items())
    if memory > _MOST_BYTES:
        raise ValueError(
            f"parsing it would take about {memory >> 20:,} MiB, more than the limit of "
            f"{_MOST_BYTES >> 20} MiB"
        )
    try:
        value = json.loads(text, parse_int=_int, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if depth is not None and deeper(value, depth):
        raise ValueError("it is nested too deeply")
    return value


def deeper(value: object, depth: int) -> bool:
    """Whether lists and dictionaries nest more deeply than this; without recursion."""
    level = [value]
    for _ in range(depth + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return False
        level = below
    return True


def _int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)
