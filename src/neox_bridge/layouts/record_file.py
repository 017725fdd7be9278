"""``neox_bridge.json``, which this tool writes beside what it converts: read, and held to its form.

Written by planning/record.py.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from neox_bridge.architectures.setting_types import check_hf, check_neox, is_count, is_name
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.layouts.own_files import brought_along
from neox_bridge.layouts.text_files import read_json


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_size(value: object) -> bool:
    return is_count(value) and value != 0


_KINDS: dict[str, Callable[[object], bool]] = {
    "vocab_size": _is_size,
    "tokenizer_size": _is_size,
    "config": _is_object,
    "generation_config": _is_object,
    "neox": _is_object,
    "source": _is_object,
    "gqa_order": is_name,
    "written_by": is_name,
}
_NEOX: dict[str, Callable[[object], bool]] = {"iteration": is_count, "yml": _is_object}


def read_record(folder: str) -> dict[str, Any]:
    """The record in a folder; empty where there is none.

    Raises BridgeError, naming the key, where a value is of another kind than this tool writes.
    """
    path = os.path.join(folder, RECORD)
    if not brought_along(path, folder):
        return {}
    record = read_json(path)
    _check(record, _KINDS, path, "")
    told = record.get("neox") or {}
    _check(told, _NEOX, path, "neox.")
    check_neox(told.get("yml") or {}, f"{path}: neox.yml")
    check_hf(record.get("config") or {}, f"{path}: config")
    return record


def _check(
    values: Mapping[str, Any], kinds: Mapping[str, Callable[[object], bool]], path: str, above: str
) -> None:
    for key, fits in kinds.items():
        if key in values and not fits(values[key]):
            raise BridgeError(
                f"{path}: {above}{key}: {str(values[key])[:60]!r} isn't what neox-bridge writes "
                "there. Remove the file to go on without it."
            )
