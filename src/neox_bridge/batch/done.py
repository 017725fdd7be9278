"""Whether a checkpoint of a batch is converted already, and still whole: its record tells."""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

from neox_bridge.errors import BridgeError
from neox_bridge.execution.digests import HashName, hash_file
from neox_bridge.execution.files import Identity
from neox_bridge.execution.sink import recorded_sources
from neox_bridge.formats.bounded_json import parse_json
from neox_bridge.layouts.record_file import written_files
from neox_bridge.layouts.seal import is_whole
from neox_bridge.layouts.text_files import read_bytes
from neox_bridge.stores.objects import below
from neox_bridge.stores.paths import is_url, isdir, listdir
from neox_bridge.stores.uploads import WORK
from neox_bridge.verification.sealed import find_record, unrecorded

State = Literal["absent", "whole", "changed", "other"]
Answer = Literal["skip", "refuse", "write"]


def answer(state: State, overwrite: bool) -> Answer:
    """What a batch does where that is at a target."""
    if overwrite or state in ("absent", "changed"):
        return "write"
    return "skip" if state == "whole" else "refuse"


def state_of(
    target: str,
    asked: Mapping[str, object],
    sources: Mapping[str, Identity],
    *,
    every_hash: bool = False,
) -> tuple[State, str]:
    """What is at ``target``, and in words what isn't as it should be.

    "whole": made from these sources, with these options, and as it was written: sizes are compared,
    and hashes of the files that were touched after the record was written, or of all of them.
    "changed": made so, but not whole any more, or with files beside it that whoever loads it could
    read (``unrecorded``). "other": made from something else, or not by this tool, or in a store
    with such files: there is no place to keep them. Paths don't matter, neither those of the
    sources nor the target's.
    """
    if not isdir(target) or not (names := listdir(target)):
        return "absent", ""
    if is_url(target) and WORK in names:  # an upload that didn't end, which is gone on with
        return "absent", ""
    try:
        path = find_record(target)
        data = read_bytes(path)
        hash_name, files = written_files(parse_json(data))
    except (BridgeError, ValueError, RecursionError):
        return "other", f"{target} isn't a whole conversion of neox-bridge's"
    if not is_of(data, asked, sources):
        return "other", f"{target} was made with other options, or from other files"
    if not is_whole(data):
        return "changed", f"{path} was changed"
    folder = os.path.dirname(path)
    if is_url(folder):
        return _of_objects(folder, hash_name, files, every_hash)
    since = os.stat(path).st_mtime_ns
    for name, size, digest in files:
        if name.startswith("../"):  # above a step: the user's, once they are written
            continue
        file = os.path.join(folder, name)
        try:
            status = os.stat(file)
        except OSError:
            return "changed", f"{file} is missing"
        same = status.st_size == size
        if same and digest and hash_name and (every_hash or status.st_mtime_ns > since):
            same = hash_file(file, hash_name) == digest
        if not same:
            return "changed", f"{file} was changed"
    if added := _added(folder, files):
        return "changed", f"{added} was added"
    return "whole", ""


def _added(folder: str, files: list[tuple[str, int, str | None]]) -> str:
    """The first file that somebody added and that a reader could take for a part; "" for none."""
    for change in unrecorded(folder, {name for name, _, _ in files}):
        if change.kind == "added":
            above = change.path.startswith("../")  # stores have no ".."
            home = os.path.dirname(folder) if above else folder
            return f"{home}/{change.path.removeprefix('../')}"
    return ""


def _of_objects(
    folder: str,
    hash_name: HashName | None,
    files: list[tuple[str, int, str | None]],
    every_hash: bool,
) -> tuple[State, str]:
    """The same in a store, where objects are replaced whole: their sizes, from one listing."""
    there = below(folder)
    for name, size, digest in files:
        if name.startswith("../"):
            continue
        url = f"{folder}/{name}"
        if url not in there:
            return "changed", f"{url} is missing"
        same = there[url].size == size
        if same and digest and hash_name and every_hash:
            same = hash_file(url, hash_name) == digest
        if not same:
            return "changed", f"{url} was changed"
    if added := _added(folder, files):
        return "other", f"{added} was added"
    return "whole", ""


def is_of(record: bytes, asked: Mapping[str, object], sources: Mapping[str, Identity]) -> bool:
    """Whether a record says that something was made with these options from these files."""
    try:
        written: dict[str, Any] = parse_json(record)["written"]
        made = written["asked"], written["sources"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return made == (json.loads(json.dumps(asked)), recorded_sources(sources))
