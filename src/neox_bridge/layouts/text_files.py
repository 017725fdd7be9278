"""Small text files of checkpoints, read with errors that name the file."""

import json
import os
from typing import Any

from neox_bridge.errors import BridgeError

_MOST = 64 << 20


def read_text(path: str) -> str:
    """The text of a small file. Raises BridgeError for one that isn't UTF-8 or is too large."""
    if not os.path.isfile(path):
        raise BridgeError(f"{path} is missing.")
    if os.path.getsize(path) > _MOST:
        raise BridgeError(f"{path} is larger than {_MOST >> 20} MiB: that isn't a text file.")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise BridgeError(f"{path} isn't a text file. Copy or download it again.") from None


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file. Raises BridgeError, with the line, for anything else."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BridgeError(
            f"{path} isn't JSON: {str(error)[:120]}. Correct or download it."
        ) from None
    if not isinstance(value, dict):
        raise BridgeError(f"{path} isn't a JSON object. Download it again.")
    return value


def dump_json(value: object) -> bytes:
    """JSON as Hugging Face writes it: two spaces, sorted keys, a line end."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
