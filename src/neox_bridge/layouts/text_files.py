"""Small text files of checkpoints, read with errors that name the file."""

import json
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.bounded_json import DEPTH, parse_json
from neox_bridge.formats.file_kinds import refuse_misplaced
from neox_bridge.stores.local_folder import unlisted
from neox_bridge.stores.paths import listdir, open_file

_CONFIG_BYTES = 4 << 20  # of a config
LARGE_BYTES = 48 << 20  # of a tokenizer or an index


def read_text(path: str, most: int = _CONFIG_BYTES) -> str:
    """The text of a small file. Raises BridgeError if it is not UTF-8 or is too large."""
    raw = read_bytes(path, most)
    refuse_misplaced(path, raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _no_text(path) from None


def read_json(path: str, most: int = _CONFIG_BYTES, depth: int | None = DEPTH) -> dict[str, Any]:
    """A JSON object from a file. Raises BridgeError, with the line, for anything else.

    most: bytes. depth: see ``parse_json``.
    """
    raw = read_bytes(path, most)
    try:
        value = parse_json(raw, depth)
    except UnicodeDecodeError:
        refuse_misplaced(path, raw)
        raise _no_text(path) from None
    except ValueError as error:
        refuse_misplaced(path, raw)
        raise BridgeError(
            f"{path} is not valid JSON: {str(error)[:120]}. Correct the file or download it again."
        ) from None
    if not isinstance(value, dict):
        raise BridgeError(
            f"{path} is not a JSON object with names and values. Correct the file or download it "
            "again."
        )
    return value


def read_bytes(path: str, most: int = _CONFIG_BYTES) -> bytes:
    """All bytes of a small file. Raises BridgeError if it is too large or not a file."""
    with open_file(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise BridgeError(
            f"{path} is larger than {most:,} bytes. No model has such a large file of this kind. "
            "Copy or download it again."
        )
    return raw


def _no_text(path: str) -> BridgeError:
    return BridgeError(f"{path} is not a text file in UTF-8. Copy or download it again.")


def list_folder(path: str) -> list[str]:
    """The names in a folder, sorted. Raises BridgeError if it cannot be listed."""
    try:
        return sorted(listdir(path))
    except OSError as error:
        raise unlisted(path, error) from None


def dump_json(value: object) -> bytes:
    """JSON as Hugging Face writes it: two spaces, sorted keys, a line end."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
