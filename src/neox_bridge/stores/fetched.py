"""Caches ranges of Hub files on disk, because a conversion and its verification read them twice.

The output is compared with its source afterwards, and a tensor-parallel source is read at several
places at once. A nearby object store can be read again, but the Hub is slow and limits requests. So
ranges are cached next to the output, where a resumed run and other processes of the same run can
use them.
"""

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256

from neox_bridge.stores.folder import is_hub
from neox_bridge.stores.objects import fetch, look

UNIT_BYTES = 8 << 20  # bytes of one cached file, and of one request
FOLDER = "fetched"
_MARGIN_BYTES = 64 << 20  # bytes that stay free on the disk
_lock = threading.Lock()
_folders: dict[str, str] = {}  # by URL: the folders of current runs
_busy: dict[str, threading.Lock] = {}


@contextlib.contextmanager
def keeping(folder: str | None, urls: Iterable[str]) -> Iterator[None]:
    """Cache ranges of these objects in a folder during the block; None disables the cache.

    The folder is created if missing. It is not deleted; the owner of its parent does that.
    """
    kept = [url for url in urls if is_hub(url)] if folder is not None else []
    if folder is not None and kept:
        os.makedirs(folder, exist_ok=True)
        with _lock:
            _folders.update(dict.fromkeys(kept, folder))
    try:
        yield
    finally:
        with _lock:
            for url in kept:
                if _folders.get(url) == folder:
                    del _folders[url]
            if not _folders:
                _busy.clear()


def range_folder(work: str, sizes: Mapping[str, int], written: int) -> str | None:
    """The folder for ``keeping`` in a work folder; None if nothing should be cached.

    sizes: the bytes of the sources by path or URL. written: the bytes of the result. Nothing is
    cached unless a source is on the Hub and the disk has space for both.
    """
    needed = sum(size for url, size in sizes.items() if is_hub(url))
    room = shutil.disk_usage(work).free + kept_bytes(work)
    if not needed or room < needed + written + _MARGIN_BYTES:
        return None
    return os.path.join(work, FOLDER)


def fetch_folder(files: str) -> str | None:
    """The folder next to the output in which another process of this run caches ranges."""
    folder = os.path.join(os.path.dirname(files), FOLDER)
    return folder if os.path.isdir(folder) else None


def kept_bytes(work: str) -> int:
    """The bytes that are cached in a work folder."""
    try:
        with os.scandir(os.path.join(work, FOLDER)) as entries:
            return sum(entry.stat().st_size for entry in entries)
    except OSError:
        return 0


def fetch_kept(url: str, start: int, end: int) -> bytes:
    """``objects.fetch``, from the cache on disk if possible.

    Raises BridgeError with the name of the object if it cannot be read.
    """
    folder = _folders.get(url)
    if folder is None:
        return fetch(url, start, end)
    parts = []
    for unit in range(start // UNIT_BYTES, -(-end // UNIT_BYTES)):
        first = unit * UNIT_BYTES
        parts.append(_read_unit(folder, url, unit, max(start, first) - first, end - first))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_unit(folder: str, url: str, unit: int, low: int, high: int) -> bytes:
    """Some bytes of a unit, which is fetched as a whole if it is not cached."""
    entry = look(url)
    name = sha256(f"{url}\n{entry.tag}\n{entry.size}\n{unit}".encode()).hexdigest()
    path = os.path.join(folder, name)
    first = unit * UNIT_BYTES
    size = min(entry.size - first, UNIT_BYTES)
    with _lock:
        busy = _busy.setdefault(name, threading.Lock())
    with busy:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == size:
                file.seek(low)
                return file.read(min(high, size) - low)
        data = fetch(url, first, first + size)
        _write(path, data)
    return data[low:high]


def _write(path: str, data: bytes) -> None:
    """Cache a unit. If that fails, it is fetched again when needed."""
    part = f"{path}.{uuid.uuid4().hex}"
    try:
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
