"""Compares the blobs of a Hugging Face cache with the hashes in their names.

huggingface_hub names a blob after the ETag of its file (file_download.py): the SHA-256 of a file in
LFS, such as weights, or the SHA-1 that git gives any other file.
"""

import hashlib
import os
import re

from neox_bridge.layouts.hub_cache import revision_of
from neox_bridge.stores.paths import is_local

_CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


def blobs_of(folder: str) -> dict[str, str]:
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


def content_hash(blob: str) -> str:
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
