"""Writes the index of shards again, from what the shards contain. That is safe for any family."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.doctor.fix_changes import Edit, FileChange
from neox_bridge.doctor.fixes import other_files, read_back, refuse_not_copied
from neox_bridge.doctor.repository import Repository, Shards, read_repository
from neox_bridge.errors import BridgeError, Refused, Unverified
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint
from neox_bridge.layouts.text_files import LARGE_BYTES, dump_json, read_json
from neox_bridge.planning.common import text_file
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.record import FORMAT
from neox_bridge.stores.paths import is_local, isfile
from neox_bridge.tensors.pieces import OutputFile
from neox_bridge.version import __version__
from neox_bridge.wording import plural, some


@dataclass(frozen=True)
class IndexFix:
    """A plan that copies a repository with right indexes.

    Attributes:
        plan: The files of the copy.
        changes: What changes in each file.
    """

    plan: Plan
    changes: tuple[FileChange, ...]


def plan_index_fix(repository: Repository, *, in_place: bool = False) -> IndexFix | None:
    """Plan a copy whose indexes name the shard of every tensor and the right total size.

    in_place: whether the copy replaces the repository. Returns None if no index has to change.

    Raises:
        BridgeError: Files are missing or damaged.
        Refused: The repository cannot be replaced.
    """
    path, revision = repository.model.path, repository.model.revision
    if repository.damage:
        raise BridgeError(
            f"{path} cannot be fixed: {repository.damage[0].message}. Only whole files can be "
            "fixed. Get the missing and damaged files first."
        )
    if not repository.fixable:
        return None
    if in_place and (revision or not is_local(path)):
        raise Refused(
            f"{revision or path} is on the Hub, where `in_place=True` cannot replace it. Write a "
            "copy with `fix=DST`."
        )
    if in_place:
        refuse_not_copied(path)
    files: list[OutputFile] = []
    changes: list[FileChange] = []
    for shards in repository.fixable:
        inside = os.path.join(shards.folder, shards.index)
        old = _read(os.path.join(path, inside))
        files.append(text_file(inside, dump_json(_index(shards, old))))
        edits = tuple(_edits(shards, old))
        changes.append(FileChange(inside, "changed" if old else "added", edits))
    written = {file.path for file in files}
    files += other_files(path, written.__contains__)
    name = revision.split("@")[0] or os.path.basename(path.rstrip("/"))
    source = {"kind": "hf", "name": name}
    if not any(file.path == RECORD for file in files):
        record = {"format": FORMAT, "written_by": f"neox-bridge {__version__}", "source": source}
        files.append(text_file(RECORD, dump_json(record), seals=True))
        changes.append(FileChange(RECORD, "added"))
    return IndexFix(Plan(dict(source), {"kind": "hf"}, tuple(files)), tuple(changes))


def with_right_indexes(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan of a fix, which also writes the indexes again that it would copy."""
    if checkpoint.kind != "hf" or not checkpoint.index_findings:
        return plan
    path = checkpoint.path
    indexes = {
        os.path.join(one.folder, one.index): one for one in read_repository(path, "").fixable
    }
    files = [
        text_file(file.path, dump_json(_index(indexes[file.path], _read(file.copy_of))))
        if file.copy_of is not None and file.path in indexes
        else file
        for file in plan.files
    ]
    return replace(plan, files=tuple(files))


def _read(path: str) -> dict[str, Any]:
    return read_json(path, LARGE_BYTES, None) if isfile(path) else {}


def _index(shards: Shards, old: dict[str, Any]) -> dict[str, Any]:
    metadata = old.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    return {
        **old,
        "metadata": {**metadata, "total_size": shards.total_size},
        "weight_map": dict(shards.weight_map),
    }


def _edits(shards: Shards, old: dict[str, Any]) -> Iterator[Edit]:
    before, after = old.get("weight_map", {}), shards.weight_map
    metadata = old.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if size != shards.total_size:
        name, value = "metadata.total_size", f"{shards.total_size}"
        if size is None:
            yield Edit("added", "", f"{name}: {value}")
        else:
            yield Edit("changed", f"{name}: {size}", value)
    if added := sorted(after.keys() - before.keys()):
        yield Edit("added", "", f"weight_map: {plural(len(added), 'tensor')} ({some(added, 2)})")
    if moved := sorted(key for key in after.keys() & before.keys() if after[key] != before[key]):
        names = f"weight_map: {plural(len(moved), 'tensor')} ({some(moved, 2)})"
        yield Edit("changed", names, f"in {some(sorted({after[key] for key in moved}), 2)}")


def index_checker(repository: Repository) -> Callable[[str], None]:
    """A check for ``execute``: raises Unverified if a fixed folder is not as planned."""

    def check(folder: str) -> None:
        copy = read_back(folder, lambda folder: read_repository(folder, ""))
        if copy.damage or copy.fixable or _places(copy) != _places(repository):
            raise Unverified(f"The fixed copy differs from {repository.model.path}.")

    return check


def _places(repository: Repository) -> dict[str, tuple[str, int, tuple[int, ...], str]]:
    """Where each tensor is, below the repository."""
    base = os.path.join(repository.model.path, "")
    return {
        name: (one.dtype, one.ref.offset, one.shape, one.ref.file.removeprefix(base))
        for name, one in repository.model.stored.items()
    }
