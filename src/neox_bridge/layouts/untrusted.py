"""What pickles of a checkpoint say, taken as plain values of bounded size.

A pickle of 100 bytes can hold a tuple that takes forever to print, and name a number of ranks
whose list fills the memory.
"""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickles import Global, Record

_MOST_VALUES = 100_000  # of a run's args, with those inside them
_MOST_TEXT = 1 << 20  # characters of them
_LONGEST_NAME = 500  # characters
_INT64 = 1 << 63


def settings(meta: Mapping[str, Any], path: str) -> dict[str, Any]:
    """``args``, the settings of the run that wrote an mp_rank file: small enough to be printed.

    Raises BridgeError for anything else.
    """
    args = meta.get("args") or {}
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise BridgeError(f"{path}: args aren't settings by their names. {_OTHER}")
    if not _small(args):
        raise BridgeError(f"{path}: args hold more than any run's settings do. {_OTHER}")
    return args


def whole(values: Mapping[str, Any], key: str, path: str) -> int | None:
    """A number that isn't negative, or None where there is none. Raises BridgeError for others."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):  # as a yml may have it
        return int(value)
    if not isinstance(value, int | float) or value != value or not 0 <= value < _INT64:
        raise BridgeError(f"{path}: {key} isn't a whole number. {_OTHER}")
    return int(value)


def text(values: Mapping[str, Any], key: str) -> str:
    """A short text; empty where there is none."""
    value = values.get(key)
    return value if isinstance(value, str) and len(value) <= _LONGEST_NAME else ""


_OTHER = "The file is damaged or made to deceive; get it from its source again."


def _small(value: object) -> bool:
    """Whether a value can be printed and compared in no time."""
    todo, texts, seen = [value], 0, 0
    while todo:
        item, seen = todo.pop(), seen + 1
        if isinstance(item, dict):
            todo += islice(item, _MOST_VALUES)
            todo += islice(item.values(), _MOST_VALUES)
        elif isinstance(item, list | tuple | set | frozenset):
            todo += islice(item, _MOST_VALUES)
        elif isinstance(item, Record):
            todo.append(item.factory if isinstance(item.factory, Global) else None)
        elif isinstance(item, Global):
            texts += len(item.module) + len(item.name)
        elif isinstance(item, str | bytes | bytearray):
            texts += len(item)
        elif isinstance(item, int) and abs(item) > _INT64:
            return False
        if texts > _MOST_TEXT or seen + len(todo) > 2 * _MOST_VALUES:
            return False
    return True
