"""Results as JSON documents: what ``--json`` prints and ``to_json`` returns."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from neox_bridge.findings import Command

# Grows when a key of a document is renamed or removed, or changes its meaning. Keys may be added
# without it.
SCHEMA_VERSION = 1
# the keys whose values are sentences, which may name parameters
_PROSE = frozenset(
    "error fix incomplete message note notes others reason remedy steps text way_out why".split()
)


def document(**facts: object) -> dict[str, Any]:
    """A JSON document of these facts, with ``schema_version`` first."""
    return {"schema_version": SCHEMA_VERSION, **plain_data(facts)}


def plain_data(
    value: object, reword: Callable[[str], str] | None = None, is_prose: bool = False
) -> Any:
    """The value with dictionaries for dataclasses, and lists for tuples, in one walk.

    JSON has no infinity: it becomes the string "Infinity" or "-Infinity". NaN becomes null.

    Args:
        value: What is walked.
        reword: Called with each sentence of a message, finding or note.
        is_prose: Whether the value itself is such a sentence.
    """
    if isinstance(value, str):
        return reword(value) if is_prose and not isinstance(value, Command) and reword else value
    if isinstance(value, Mapping):
        return {key: plain_data(part, reword, key in _PROSE) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(part, reword, is_prose) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if is_dataclass(value):
        return {
            entry.name: plain_data(getattr(value, entry.name), reword, entry.name in _PROSE)
            for entry in fields(value)
        }
    return value
