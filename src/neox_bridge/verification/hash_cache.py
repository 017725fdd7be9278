"""A cache of fingerprints, so that unchanged checkpoints are not read again.

It has one small JSON file per checkpoint folder, which is replaced by a rename, so that
simultaneous audits do not interfere. A damaged or foreign file is ignored.
"""

import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

import xxhash

from neox_bridge.errors import BridgeError
from neox_bridge.execution.lock import locked
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.stores.paths import real, states
from neox_bridge.stores.store import FileState
from neox_bridge.tensors.pieces import Whole
from neox_bridge.verification.hashes import VERSION, Fingerprint, Shard, sources

_PREFIX, _SUFFIX = "audit-", ".tmp"  # name of a file that is being written
_FIELDS = tuple(field.name for field in fields(Fingerprint))
YOUNG_SECONDS = 2.0  # the coarsest timestamp of a file system; a younger file may change unnoticed


def default_folder() -> str:
    """``neox-bridge/audit`` in XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "neox-bridge", "audit")


def identify(checkpoint: Checkpoint | StoredModel) -> dict[str, FileState]:
    """The state of the weight files, to detect changes. Raises BridgeError if one was deleted."""
    return states({ref.file: None for t in checkpoint.tensors.values() for ref in sources(t)})


def look_up(
    folder: str | None, checkpoint: Checkpoint | StoredModel, files: Mapping[str, FileState]
) -> dict[str, Fingerprint]:
    """The cached fingerprints of tensors whose files are unchanged."""
    if folder is None:
        return {}
    try:
        with open(_file(folder, checkpoint), encoding="utf-8") as stream:
            stored = json.load(stream)
        entries = stored["tensors"] if stored["version"] == VERSION else {}
        return {
            name: _parse(entries[name]["print"])
            for name, whole in checkpoint.tensors.items()
            if name in entries and entries[name]["key"] == _key(whole, files)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def remember(
    folder: str | None,
    checkpoint: Checkpoint | StoredModel,
    files: Mapping[str, FileState],
    fingerprints: Mapping[str, Fingerprint],
) -> None:
    """Store the fingerprints of these files. Failures to write the cache are ignored.

    Files that changed within the last two seconds are left out.
    """
    if folder is None:
        return
    newest = (time.time() - YOUNG_SECONDS) * 1e9
    old = {file for file, state in files.items() if state.modified_ns < newest}
    entries = {
        name: {"key": _key(whole, files), "print": _plain(fingerprints[name])}
        for name, whole in checkpoint.tensors.items()
        if all(ref.file in old for ref in sources(whole))
    }
    document = {"version": VERSION, "path": checkpoint.path, "tensors": entries}
    text = json.dumps(document).encode()
    with suppress(OSError, BridgeError):
        os.makedirs(folder, exist_ok=True)
        _remove_left_over(folder)
        temporary = os.path.join(folder, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
        with locked(temporary, temporary) as fd:
            try:
                os.fchmod(fd, 0o600)
                with open(fd, "wb", closefd=False) as stream:
                    stream.write(text)
                os.replace(temporary, _file(folder, checkpoint))
            except BaseException:
                os.unlink(temporary)
                raise


def _remove_left_over(folder: str) -> None:
    """Delete temporary files of killed audits. Files that are being written are locked."""
    for name in os.listdir(folder):
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            path = os.path.join(folder, name)
            with suppress(OSError, BridgeError), locked(path, path):
                os.unlink(path)


def check_same(before: Mapping[str, FileState], checkpoint: Checkpoint | StoredModel) -> None:
    """Raise BridgeError if a file changed while it was read."""
    for file, state in identify(checkpoint).items():
        if before.get(file) != state:
            raise BridgeError(
                f"{file} changed while it was read. Audit again when no other process writes to it."
            )


def _file(folder: str, checkpoint: Checkpoint | StoredModel) -> str:
    place = checkpoint.path if checkpoint.neox is None else checkpoint.neox.folder
    name = xxhash.xxh3_128(os.fsencode(real(place))).hexdigest()
    return os.path.join(folder, f"{name}.json")


def _key(whole: Whole, files: Mapping[str, FileState]) -> str:
    """The cache key of a fingerprint: the state of the files, and the places of its pieces."""
    pieces: list[Any] = []
    for piece in whole.pieces:
        ref = piece.source
        where = ref and (files[ref.file], ref.offset, ref.dtype, ref.shape, ref.strides)
        pieces.append((where, piece.start, piece.to, piece.shape, piece.fill))
    text = repr((whole.dtype, whole.shape, whole.reduce, pieces))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _plain(fingerprint: Fingerprint) -> dict[str, Any]:
    """The fingerprint for JSON. ``dataclasses.asdict`` takes 40 µs per tensor."""
    values = {name: getattr(fingerprint, name) for name in _FIELDS}
    return values | {"shards": [{"hash": s.hash, "constant": s.constant} for s in values["shards"]]}


def _parse(stored: Mapping[str, Any]) -> Fingerprint:
    shards = tuple(Shard(str(s["hash"]), bool(s["constant"])) for s in stored["shards"])
    return Fingerprint(
        str(stored["hash"]),
        str(stored["dtype"]),
        tuple(int(size) for size in stored["shape"]),
        float(stored["norm"]),
        int(stored["bad"]),
        bool(stored["constant"]),
        shards,
    )
