"""Finds blobs of a Hugging Face cache whose contents are not what their names state.

huggingface_hub names a blob after the ETag of its file (file_download.py): the SHA-256 of a file in
LFS, such as weights, or the SHA-1 that git gives any other file.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from neox_bridge.layouts.hub_cache import revision_of
from neox_bridge.stores.paths import is_local
from neox_bridge.verification.opened import Opened
from neox_bridge.verification.runs import Fault
from neox_bridge.wording import human, plural, some

_CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_Links = dict[str, dict[str, list[str]]]  # per blob: the names of its files, with their steps


def blob_bytes(opened: Iterable[Opened]) -> int:
    """The bytes that ``blob_faults`` reads."""
    links = _links(opened)
    return sum(os.path.getsize(blob) for blob in links if os.path.isfile(blob))


def blob_faults(
    opened: Iterable[Opened],
    check: bool,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Fault]:
    """Faults of the blobs of a run that is in a cache; each blob is read once.

    check: whether to read them. If not, a finding says that they were not compared.
    """
    opened = list(opened)
    links = _links(opened)
    if not links:
        return
    run, count = opened[0].run, plural(len(links), "blob")
    if not check:
        message = f"{run}: {count} of this cache were not compared with the hashes in their names"
        yield Fault("blobs-not-checked", "info", message, "use `blobs=True`", run)
        return

    def problem_of(blob: str) -> str:
        try:
            size, content = os.path.getsize(blob), _content_hash(blob)
        except OSError as error:
            return f"it cannot be read: {error.strerror or error}"
        if progress is not None:
            progress(size)
        right = content == os.path.basename(blob)
        return "" if right else f"its content has the hash {content}"

    with ThreadPoolExecutor(workers or 2) as pool:
        problems = dict(zip(links, pool.map(problem_of, links), strict=True))
    wrong = {blob: problem for blob, problem in problems.items() if problem}
    for blob, problem in wrong.items():
        names, labels = list(links[blob]), [step for of in links[blob].values() for step in of]
        message = f"{run}: {blob} ({some(names)} at step {some(labels)}) is damaged: {problem}"
        remedy = "delete this file, and download the model again"
        yield Fault("wrong-blob", "error", message, remedy, run, tuple(dict.fromkeys(labels)))
    if not wrong:
        size = human(sum(os.path.getsize(blob) for blob in links))
        message = f"{run}: {count} ({size}) have the hashes in their names"
        yield Fault("blobs-checked", "info", message, "", run)


def _links(opened: Iterable[Opened]) -> _Links:
    links: _Links = {}
    for step in opened:
        for path, blob in _blobs_of(step.place.path).items():
            name = os.path.relpath(path, step.place.path)
            links.setdefault(blob, {}).setdefault(name, []).append(step.place.label)
    return links


def _blobs_of(folder: str) -> dict[str, str]:
    """The blob of each file of a snapshot in a cache, if its name is a hash.

    It is empty for other folders, and for caches without links.
    """
    if not is_local(folder) or not revision_of(folder):
        return {}
    blobs = {}
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            if not os.path.islink(path):
                continue
            blob = os.path.normpath(os.path.join(parent, os.readlink(path)))
            home, name = os.path.split(blob)
            is_hash = _SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name)
            if is_hash and os.path.basename(home) == "blobs":
                blobs[path] = blob
    return blobs


def _content_hash(blob: str) -> str:
    """The hash that a blob should be named after, of the kind that its name is."""
    with open(blob, "rb") as file:
        if _SHA256.fullmatch(os.path.basename(blob)):
            state = hashlib.sha256()
        else:
            size = os.fstat(file.fileno()).st_size
            state = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()
