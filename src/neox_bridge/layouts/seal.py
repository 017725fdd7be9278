"""The end of ``neox_bridge.json``: sizes and hashes of the files that were written with it.

Paths are relative to the record's folder, so that the folder may be moved and renamed. The last
line is the hash of all bytes before it, so that the record itself can be checked.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from neox_bridge.layouts.text_files import dump_json

_CLOSING = b"\n}\n"  # how dump_json ends an object that has keys
_END = b',\n  "seal": "%s"\n}\n'


def sealed(record: bytes, hash_name: str, files: Mapping[str, Any], **made: object) -> bytes:
    """The record, a JSON object, with what was written.

    files: (size in bytes, hash or None) by path. made: what else tells a conversion from others:
        the plan's hash, the options, the sources.
    """
    value = json.loads(unsealed(record))
    value["written"] = {"hash": hash_name, "files": dict(files), **made}
    head = dump_json(value).removesuffix(_CLOSING)
    return head + _END % _digest(head)


def entries(folder: str, files: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What ``sealed`` takes of finished files (``size``, ``hash``), by their paths in the target.

    folder: the record's, in the target.
    """
    return {
        os.path.relpath(path, folder or ".").replace(os.sep, "/"): [file.size, file.hash]
        for path, file in files.items()
    }


def unsealed(record: bytes) -> bytes:
    """The record without what ``sealed`` adds. Raises ValueError for what isn't a JSON object."""
    value = json.loads(record)
    if not isinstance(value, dict):
        raise ValueError("it isn't a JSON object")
    return dump_json({key: value[key] for key in value if key not in ("written", "seal")})


def is_whole(record: bytes) -> bool:
    """Whether every byte of a sealed record is as it was written."""
    head = record[: len(record) - len(_END % _digest(b""))]
    return record == head + _END % _digest(head)


def _digest(data: bytes) -> bytes:
    import xxhash

    return xxhash.xxh3_128(data).hexdigest().encode()
