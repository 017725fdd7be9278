"""Checks whether a folder that neox-bridge wrote is unchanged, byte for byte."""

import os
import shlex
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from neox_bridge.errors import BridgeError
from neox_bridge.execution.digests import hash_file
from neox_bridge.findings import Command, Finding
from neox_bridge.formats.bounded_json import parse_json
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint
from neox_bridge.layouts.known_files import files_below, is_known, is_read
from neox_bridge.layouts.record_file import HashName, written_above, written_files
from neox_bridge.layouts.seal import is_whole
from neox_bridge.layouts.text_files import list_folder, read_bytes, read_json, read_text
from neox_bridge.layouts.tokenizer import FOLDER as TOKENIZER
from neox_bridge.layouts.universal_folder import LATEST
from neox_bridge.stores.paths import afresh, is_local, isdir, isfile, states
from neox_bridge.stores.paths import size as size_at
from neox_bridge.wording import some

ChangeKind = Literal["changed", "missing", "added", "edited", "extra"]
_HARMLESS = ("edited", "extra")
_TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth")
_SMALL_BYTES = 1 << 20  # size up to which a file is always hashed
_HASHED_BYTES = 256 << 20  # total size of larger source files that are hashed


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file that does not match the record. path: relative to the folder of the record.

    kind: "edited": a file above a step, which the user may edit. "added": a file that is not in the
    record and that a framework could read. "extra": a file that is not in the record and that no
    framework reads.
    """

    path: str
    kind: ChangeKind


@dataclass(frozen=True, slots=True)
class Seal:
    """The result of checking a record. unhashed: files of which only the size is recorded."""

    record: str
    files: int
    size: int
    unhashed: int
    changes: tuple[FileChange, ...]

    @property
    def holds(self) -> bool:
        return all(change.kind in _HARMLESS for change in self.changes)


def find_record(path: str) -> str:
    """The ``neox_bridge.json`` of a folder: its own, or that of a run's step.

    Raises BridgeError if there is none.
    """
    path = afresh(path)
    places = [path]
    if isfile(os.path.join(path, "latest")):
        tag = read_text(os.path.join(path, "latest")).strip()
        places.append(os.path.join(path, os.path.basename(tag)))
    elif isdir(path):
        steps = [name for name in list_folder(path) if name.startswith("global_step")]
        places += [os.path.join(path, name) for name in steps]
    for place in places:
        if isfile(os.path.join(place, RECORD)):
            return os.path.join(place, RECORD)
    raise BridgeError(
        f"{path} has no {RECORD}, which records what was written: it was not written by "
        "neox-bridge, or the file was deleted. Compare it with the checkpoint that it was "
        "converted or copied from: verify SRC DST."
    )


def check_seal(
    record: str, progress: Callable[[int], None] | None = None, workers: int | None = None
) -> Seal:
    """Check every file in a record, and look for files that are not in it.

    progress: called with bytes read.

    Raises BridgeError for a record without hashes, as early versions wrote, or an unreadable
    record.
    """
    data = read_bytes(record)
    changes = [] if is_whole(data) else [FileChange(RECORD, "changed")]
    try:
        name, files = written_files(parse_json(data))
    except (ValueError, RecursionError):
        if b'"written"' not in data and b'"seal"' not in data:
            read_json(record)  # raises the error that describes the problem
            raise BridgeError(
                f"{record} contains no hashes. Compare with the source: verify SRC DST."
            ) from None
        return Seal(record, 0, len(data), 0, tuple(changes))
    folder = os.path.dirname(record)

    def one(item: tuple[str, int, str | None]) -> FileChange | None:
        path, size, digest = item
        kind = _changed(path_of(folder, path), size, digest, name)
        if progress is not None:
            progress(size)
        if kind == "changed" and path.startswith("../"):
            kind = "edited"
        return FileChange(path, kind) if kind else None

    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        changes += filter(None, pool.map(one, sorted(files, key=lambda item: -item[1])))
    changes += unrecorded(folder, {path for path, _, _ in files})
    return Seal(
        record,
        len(files) + 1,
        sum(size for _, size, _ in files) + len(data),
        sum(digest is None for _, _, digest in files),
        tuple(changes),
    )


def source_findings(checkpoint: Checkpoint, sources: Collection[str]) -> list[Finding]:
    """Findings for source files that differ from the record in their folder.

    Compares the sizes of all files and the hashes of small files. The hash of a larger file is
    compared only if the file is newer than the record, for up to 256 MiB of files. Objects have no
    modification time, and the client of the Hub checks what it downloads.

    sources: the paths of the files with tensors, and of those that are copied.
    """
    folder = checkpoint.path if checkpoint.neox is None else checkpoint.neox.folder
    if not checkpoint.record:
        return []
    record = os.path.join(folder, RECORD)
    data = read_bytes(record)
    try:
        hash_name, recorded = written_files(parse_json(data))
    except (ValueError, RecursionError):
        return []  # an early version wrote no hashes
    names = {path_of(folder, name): name for name, _, _ in recorded if is_read(name)}
    files = [
        (path, names[path], size, digest)
        for (name, size, digest) in sorted(recorded, key=lambda entry: entry[1])
        if (path := path_of(folder, name)) in names
        and not name.startswith("../")
        and (path in sources or not name.endswith(_TENSOR_FILES))
    ]
    there = states([record, *(path for path, *_ in files)], missing_ok=True)
    is_copy = is_local(folder) and not checkpoint.revision
    changes = [] if is_whole(data) else [f"{RECORD} was edited"]
    budget, unread = _HASHED_BYTES, []
    for path, name, size, digest in files:
        if path not in there:
            changes += [f"{name} is missing"] if is_copy else []
        elif there[path].size != size:
            changes.append(f"{name} has {there[path].size:,} bytes instead of {size:,}")
        elif is_copy and digest is not None and hash_name is not None:
            is_small = size <= _SMALL_BYTES
            if not is_small and there[path].modified_ns <= there[record].modified_ns:
                continue
            if size > budget:
                unread.append(name)
                continue
            budget -= 0 if is_small else size
            if hash_file(path, hash_name) != digest:
                changes.append(f"{name} has another hash")
    for path in sorted(sources):
        name = os.path.basename(path)
        if os.path.dirname(path) == folder and path not in names and is_read(name):
            changes.append(f"{name} is not in {RECORD}")
    return _source_findings(folder, changes, unread)


def _source_findings(folder: str, changes: list[str], unread: list[str]) -> list[Finding]:
    verify = f"neox-bridge verify {shlex.quote(folder)}"
    findings = []
    if changes:
        message = (
            f"{folder} was changed after neox-bridge wrote it: {some(changes, 3)}. It is read as "
            "it is now. If the change was not intended, copy the checkpoint again"
        )
        remedy = Command(f"{verify}   # lists every changed file")
        findings.append(Finding("source-changed", "warning", message, remedy))
    if unread:
        verb = "was" if len(unread) == 1 else "were"
        message = (
            f"{folder}: {some(unread, 3)} {verb} modified or copied after {RECORD} was written. "
            "The size is right; the hash was not compared, because that reads the file once more"
        )
        remedy = Command(f"{verify}   # compares the hashes")
        findings.append(Finding("source-newer", "info", message, remedy))
    return findings


def path_of(folder: str, name: str) -> str:
    """The path of a file in a record of ``folder``. Resolves "..", which stores do not support."""
    home = os.path.dirname(folder) if name.startswith("../") else folder
    return os.path.join(home, name.removeprefix("../"))


def unrecorded(folder: str, recorded: Collection[str]) -> Iterator[FileChange]:
    """The files that are not in the record, in its folder and, for a step, above it.

    recorded: the paths that the record names, relative to its folder.
    """
    for path in files_below(folder, recorded):
        if path not in recorded and path != RECORD:
            yield FileChange(path, "added" if is_read(path) else "extra")
    if any(path.startswith("../") for path in recorded):
        root = os.path.dirname(folder)
        names, written = list_folder(root), written_above(root)
        above = [name for name in names if name == LATEST]
        if TOKENIZER in names:
            inside = list_folder(os.path.join(root, TOKENIZER))
            above += [f"{TOKENIZER}/{name}" for name in inside]
        for path in above:
            if is_known(path) and path not in written:
                yield FileChange(f"../{path}", "added")


def _changed(path: str, size: int, digest: str | None, name: HashName | None) -> ChangeKind | None:
    if not isfile(path):
        return "missing"
    same = size_at(path) == size
    if same and digest is not None and name is not None:
        same = hash_file(path, name) == digest
    return None if same else "changed"
