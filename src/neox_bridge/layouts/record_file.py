"""Reads ``neox_bridge.json``, the record that neox-bridge writes beside a result, and checks it.

planning/record.py writes it.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from neox_bridge.architectures.setting_types import check_hf, check_neox, is_count, is_name
from neox_bridge.errors import BridgeError
from neox_bridge.formats.bounded_json import parse_json
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.text_files import list_folder, read_bytes, read_json
from neox_bridge.stores.paths import isfile

HashName = Literal["xxh3_128", "sha256"]
STEP_FOLDER = re.compile(r"global_step\d+(_universal)?")


Entry = tuple[int, str | None, HashName | None]  # size, hash and kind of hash of a file


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_size(value: object) -> bool:
    return is_count(value) and value != 0


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(is_name, value))


_KINDS: dict[str, Callable[[object], bool]] = {
    "vocab_size": _is_size,
    "tokenizer_size": _is_size,
    "config": _is_object,
    "generation_config": _is_object,
    "neox": _is_object,
    "source": _is_object,
    "ignored_keys": _is_names,
    "gqa_order": is_name,
    "written_by": is_name,
    "head": is_name,
}
_NEOX: dict[str, Callable[[object], bool]] = {"iteration": is_count, "yml": _is_object}


def read_record(folder: str) -> dict[str, Any]:
    """The record in a folder; empty if there is none.

    Raises BridgeError, with the key, for a value that neox-bridge does not write.
    """
    path = os.path.join(folder, RECORD)
    if not brought_along(path, folder):
        return {}
    record = read_json(path)
    _check(record, _KINDS, path, "")
    neox = record.get("neox") or {}
    _check(neox, _NEOX, path, "neox.")
    check_neox(neox.get("yml") or {}, f"{path}: neox.yml")
    check_hf(record.get("config") or {}, f"{path}: config")
    return record


def written_files(record: Any) -> tuple[HashName | None, list[tuple[str, int, str | None]]]:
    """The kind of hash in a record, and the path, size and hash of each file.

    Raises ValueError for a record that neox-bridge does not write.
    """
    try:
        written = record["written"]
        name, files = written["hash"], list(_entries(written["files"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None
    if name not in ("xxh3_128", "sha256", "none"):
        raise ValueError(name)
    return None if name == "none" else name, files


def _entries(files: dict[str, Any]) -> Iterator[tuple[str, int, str | None]]:
    """The entries of a record, whose paths are in its folder or directly above it.

    Other paths raise ValueError, so that a record cannot name files elsewhere.
    """
    for path, (size, digest) in files.items():
        inside = path.removeprefix("../").split("/")
        fits = isinstance(size, int) and (digest is None or isinstance(digest, str))
        if ".." in inside or "" in inside or not fits:
            raise ValueError(path)
        yield path, size, digest


def recorded_files(folder: str) -> set[str]:
    """The files in a folder, or in a run and its steps, that this tool's records there name."""
    paths = set()
    for name, path, _ in _recorded(folder, ["", *list_folder(folder)]):
        if path.startswith("../"):
            paths |= {path[3:]} if name else set()
        else:
            paths.add(f"{name}/{path}" if name else path)
    return paths


def written_above(root: str) -> dict[str, set[Entry]]:
    """What this tool wrote into a run's root, beside its steps, by their records.

    By path, each size with the hash and its kind, where there is one; several where steps were
    written one after another.
    """
    files: dict[str, set[Entry]] = {}
    for _, path, entry in _recorded(root, list_folder(root)):
        if path.startswith("../"):
            files.setdefault(path[3:], set()).add(entry)
    return files


def _recorded(folder: str, names: Iterable[str]) -> Iterator[tuple[str, str, Entry]]:
    """(step, path, entry) of all files that the records of a folder's steps name, "" of its own."""
    for name in names:
        record = os.path.join(folder, name, RECORD)
        if (name and not STEP_FOLDER.fullmatch(name)) or not isfile(record):
            continue
        with contextlib.suppress(BridgeError, ValueError, RecursionError):
            hash_name, entries = written_files(parse_json(read_bytes(record)))
            for path, size, digest in entries:
                yield name, path, (size, digest, hash_name)


def _check(
    values: Mapping[str, Any], kinds: Mapping[str, Callable[[object], bool]], path: str, above: str
) -> None:
    for key, fits in kinds.items():
        if key in values and not fits(values[key]):
            raise BridgeError(
                f"{path}: {above}{key}: {str(values[key])[:60]!r} is not a value that "
                "neox-bridge writes. Remove the file to continue without it."
            )
