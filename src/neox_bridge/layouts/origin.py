"""How many rows a vocabulary had before GPT-NeoX padded it, for every later checkpoint of a run.

neox_bridge.json says it for the step that was converted, but a run that trains on writes new steps.
GPT-NeoX copies its yml files into each of them (megatron/checkpointing.py). Of the keys that every
tree knows it uses one for nothing: config_files, which NeoXArgs.from_ymls overwrites with the text
of the yml files. So the number stands there.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.layouts.untrusted import whole

_KEY, _NAME, _ROWS = "config_files", "neox_bridge", "vocab_size"
COMMENT = "the model before GPT-NeoX padded its vocabulary; GPT-NeoX ignores this"


def origin_settings(rows: int) -> dict[str, Any]:
    """The yml's keys that say how many rows the model had."""
    return {_KEY: {_NAME: {_ROWS: rows}}}


def original_rows(raw: Mapping[str, Any], rows: int, path: str) -> int | None:
    """The rows before padding, of a checkpoint with this many; None if the yml does not say."""
    files = raw.get(_KEY)
    origin = files.get(_NAME) if isinstance(files, dict) else None
    if not isinstance(origin, dict):
        return None
    number = whole(origin, _ROWS, f"{path}: {_KEY}: {_NAME}")
    return number if number is not None and 0 < number < rows else None
