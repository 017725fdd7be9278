"""Reads values of a checkpoint's pickles as plain values of bounded size.

A pickle of 100 bytes can contain a tuple that takes forever to print, or a number of ranks whose
list fills the memory. The readers raise BridgeError for a value of another kind. Their ``name`` is
the place of the value, if the key alone does not show it.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickles import Global, Record

_MOST_VALUES = 100_000  # of a run's args, with those inside them
_TEXT_CHARACTERS = 1 << 20  # of them
_NAME_CHARACTERS = 500
_INT64 = 1 << 63
_MOST_COUNT = 1 << 30  # sequences of a step, ranks
_LARGEST = 1e300  # of a hyperparameter
# YAML 1.1 reads 1e-08, which has no point, as text
FLOAT = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?([eE][-+]?[0-9]{1,2})?")


def settings(meta: Mapping[str, Any], path: str) -> dict[str, Any]:
    """``args``, the settings of the run that wrote an mp_rank file.

    Raises BridgeError for another value, and for settings that are too large to print.
    """
    args = meta.get("args") or {}
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise BridgeError(f"{path}: args does not map names to settings. {_OTHER}")
    if not _small(args):
        raise BridgeError(f"{path}: args is larger than the settings of any run. {_OTHER}")
    return args


def whole(values: Mapping[str, Any], key: str, path: str) -> int | None:
    """A non-negative whole number; None if there is none. Raises BridgeError for others."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):  # as a yml may have it
        return int(value)
    if not isinstance(value, int | float) or value != value or not 0 <= value < _INT64:
        raise BridgeError(f"{path}: {key} is not a whole number. {_OTHER}")
    return int(value)


def count(values: Mapping[str, Any], key: str, path: str, name: str = "") -> int | None:
    """A number of sequences, steps or ranks: 1 or more. None if there is none."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_COUNT:
        raise unexpected(path, name or key, value, f"a whole number from 1 to {_MOST_COUNT:,}")
    return value


def number(values: Mapping[str, Any], key: str, path: str, name: str = "") -> float | None:
    """A non-negative number, also as text as in a yml; None if there is none."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, str) and FLOAT.fullmatch(value):
        value = float(value)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 <= value <= _LARGEST:  # NaN is neither
        raise unexpected(path, name or key, value, "a non-negative number")
    return value


def mapping(values: Mapping[str, Any], key: str, path: str, name: str = "") -> Mapping[str, Any]:
    """Values by their names; empty if there are none."""
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value):
        raise unexpected(path, name or key, value, "a mapping of names to values")
    return value


def sequence(values: Mapping[str, Any], key: str, path: str, name: str = "") -> Sequence[Any]:
    """A list; empty if there is none."""
    value = values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise unexpected(path, name or key, value, "a list")
    return value


def unexpected(path: str, name: str, value: object, wanted: str) -> BridgeError:
    """The error for a value of another kind than DeepSpeed or GPT-NeoX writes."""
    shown = repr(value)[:60] if isinstance(value, bool | int | float | str) else _kind(value)
    way_out = "Correct it in the yml." if path.endswith(CONFIGS) else _OTHER
    return BridgeError(f"{path}: {name} is {shown}, not {wanted}. {way_out}")


def _kind(value: object) -> str:
    words = {"NoneType": "empty", "dict": "a mapping", "list": "a list", "tuple": "a tuple"}
    words |= {"TensorRef": "a tensor", "Record": "an object", "Global": "an object"}
    return words.get(type(value).__name__, type(value).__name__)


def text(values: Mapping[str, Any], key: str) -> str:
    """A short text; empty if there is none."""
    value = values.get(key)
    return value if isinstance(value, str) and len(value) <= _NAME_CHARACTERS else ""


CONFIGS = "/configs"  # the folder of a run's yml files, which users write
_OTHER = "The file is damaged or malicious. Get it again from its source."


def _small(value: object) -> bool:
    """Whether a value is small enough to print and compare quickly."""
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
        if texts > _TEXT_CHARACTERS or seen + len(todo) > 2 * _MOST_VALUES:
            return False
    return True
