"""Checks by its record whether a checkpoint of a batch is already converted and intact."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from neox_bridge.errors import BridgeError
from neox_bridge.execution.digests import hash_file
from neox_bridge.execution.files import Identity
from neox_bridge.execution.sink import recorded_sources
from neox_bridge.formats.bounded_json import parse_json
from neox_bridge.layouts.record_file import HashName, written_files
from neox_bridge.layouts.seal import is_whole
from neox_bridge.layouts.text_files import read_bytes
from neox_bridge.stores.paths import is_local, isdir, listdir, states, walk
from neox_bridge.stores.store import WORK
from neox_bridge.verification.sealed import find_record, path_of, unrecorded
from neox_bridge.wording import some

TargetState = Literal["absent", "whole", "changed", "other"]
Decision = Literal["skip", "refuse", "write"]


def decision(state: TargetState, overwrite: bool) -> Decision:
    """The action of a batch for this state of a target."""
    if overwrite or state in ("absent", "changed"):
        return "write"
    return "skip" if state == "whole" else "refuse"


def state_of(
    target: str,
    options: Mapping[str, object],
    sources: Mapping[str, Identity],
    texts: Sequence[Sequence[str]] = (),
    *,
    every_hash: bool = False,
) -> tuple[TargetState, str]:
    """The state of ``target``, and a description of what is wrong.

    "whole": converted from these sources with these options, and unchanged. Sizes are compared, and
    hashes of files that were modified after the record was written, or of all files. "changed":
    converted like this, but changed since, or with additional files that a framework could read
    (``unrecorded``), or from a source whose small files changed (``recorded_texts``). "other":
    converted from something else, or not by neox-bridge, or in a store with such additional files,
    which cannot be set aside there. Paths of sources and target do not matter.
    """
    if not isdir(target) or not (names := listdir(target)):
        return "absent", ""
    # an incomplete upload, which is resumed
    if WORK in names and any(walk(f"{target}/{WORK}")):
        return "absent", ""
    try:
        path = find_record(target)
        data = read_bytes(path)
        hash_name, files = written_files(parse_json(data))
    except (BridgeError, ValueError, RecursionError):
        return "other", f"{target} is not a complete conversion by neox-bridge"
    if not is_of(data, options, sources):
        return "other", f"{target} was converted with other options, or from other files"
    if not is_whole(data):
        return "changed", f"{path} was changed"
    folder = os.path.dirname(path)
    if change := _first_change(path, hash_name, files, every_hash):
        return "changed", change
    if names := changed_texts(data, texts):
        return "changed", f"{some(names)} of the source changed after {target} was written"
    if added := _added(folder, files):
        return "other" if not is_local(folder) else "changed", f"{added} was added"
    return "whole", ""


def _first_change(
    record: str,
    hash_name: HashName | None,
    files: Sequence[tuple[str, int, str | None]],
    every_hash: bool,
) -> str:
    """What is wrong with the first file that does not match the record; "" if all match."""
    folder = os.path.dirname(record)
    paths = {name: path_of(folder, name) for name, _, _ in files}
    there = states([record, *paths.values()], missing_ok=True)
    for name, size, digest in files:
        file = paths[name]
        if file not in there:
            return f"{file} is missing"
        if name.startswith("../"):
            continue  # a file above a step may be edited
        # objects have no modification time, but are replaced atomically
        touched = there[file].modified_ns > there[record].modified_ns
        same = there[file].size == size
        if same and digest and hash_name and (every_hash or touched):
            same = hash_file(file, hash_name) == digest
        if not same:
            return f"{file} was changed"
    return ""


def _added(folder: str, files: Sequence[tuple[str, int, str | None]]) -> str:
    """The first added file that a framework could read as part of the checkpoint; "" if none."""
    for change in unrecorded(folder, {name for name, _, _ in files}):
        if change.kind == "added":
            return path_of(folder, change.path)
    return ""


def changed_texts(record: bytes, texts: Sequence[Sequence[str]]) -> list[str]:
    """The small files of the source that are not as a record has them. Early records have none."""
    recorded = parse_json(record)["written"].get("texts")
    if not isinstance(recorded, list):
        return []
    before = {tuple(map(str, text)) for text in recorded if isinstance(text, list) and text}
    return sorted({name for name, *_ in before ^ {tuple(text) for text in texts}})


def is_of(record: bytes, options: Mapping[str, object], sources: Mapping[str, Identity]) -> bool:
    """Whether a record matches these options and source files."""
    try:
        written: dict[str, Any] = parse_json(record)["written"]
        recorded = written["options"], written["sources"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return recorded == (json.loads(json.dumps(options)), recorded_sources(sources))
