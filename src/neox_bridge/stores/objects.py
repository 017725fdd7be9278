"""Operations on objects by URL: stat, list, read ranges, write small objects, delete.

All requests to stores go through here. Results are cached, and transient errors are retried.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TypeVar

from neox_bridge.errors import BridgeError
from neox_bridge.stores.retry import ShortRead, no_bucket, steadily
from neox_bridge.stores.store import FileState, Store, Upload

_T = TypeVar("_T")
_U = TypeVar("_U")
_MOST_LISTINGS = 64  # maximum number of cached listings, one per folder
_AT_ONCE = 16  # maximum number of parallel requests
_UNKNOWN, _MISSING = object(), object()
_pending: dict[str, bytes] = {}
_listings: dict[str, Mapping[str, FileState | None]] = {}
_pins: dict[str, str] = {}  # URL of a Hub revision to URL of its commit
_FOLDER = None  # the entry for a folder in a listing


def store_of(url: str) -> Store:
    """The store of a URL. Raises BridgeError if its library is not installed."""
    from neox_bridge.stores.buckets import SCHEMES, bucket_of

    if _protocol(url) in SCHEMES:
        return bucket_of(url)
    from neox_bridge.stores.fsspec_store import FsspecStore

    return FsspecStore(_pinned(url) or url)


def pin(url: str, commit_url: str) -> None:
    """Pin a Hub revision to one commit, until ``forget``.

    Files under ``url`` are then read under ``commit_url``, so that all files are from one commit.
    Each folder is listed only once.
    """
    if _pins.get(url) != commit_url:
        forget(url)
    _pins[url] = commit_url


def _pinned(url: str) -> str | None:
    for root, commit_url in _pins.items():
        if url == root or url.startswith(f"{root}/"):
            return commit_url + url[len(root) :]
    return None


@contextlib.contextmanager
def pending(objects: Mapping[str, bytes]) -> Iterator[None]:
    """Make these objects visible to this process during the block, as if they already existed.

    A nearly finished target can thus be checked in its final form, before its record is written.
    """
    _pending.update(objects)
    try:
        yield
    finally:
        for url in objects:
            _pending.pop(url, None)


def pending_now() -> dict[str, bytes]:
    """The current ``pending`` objects, to pass them to another process."""
    return dict(_pending)


def look(url: str, *, again: bool = False) -> FileState:
    """Size and tag of an object. again: ignore the cache.

    Raises BridgeError if it does not exist.
    """
    if url in _pending:
        return FileState(len(_pending[url]), sha256(_pending[url]).hexdigest())
    entry = _UNKNOWN if again and _pinned(url) is None else _listed(url)
    if entry is _UNKNOWN and _protocol(url) == "hf":  # a listing has all files of the folder
        _list(url.rpartition("/")[0])
        entry = _listed(url)
    entry = _head(url) if entry is _UNKNOWN else entry
    if not isinstance(entry, FileState):
        raise _missing(url)
    return entry


def look_all(urls: Iterable[str]) -> dict[str, FileState]:
    """The current state of existing objects, with one request per thousand objects of a folder."""
    listings: dict[str, Mapping[str, FileState | None]] = {}
    objects = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder not in listings:
            listings[folder] = _list(folder)
        if entry := listings[folder].get(name):
            objects[url] = entry
    return objects


def kind(url: str) -> str | None:
    """ "file", "directory", or None if nothing exists. May be cached."""
    if url in _pending:
        return "file"
    entry = _listed(url)
    if entry is _UNKNOWN:
        if _listings.get(url) or _list(url):  # the listing of an object is empty
            return "directory"
        entry = _head(url)
    if isinstance(entry, FileState):
        return "file"
    return "directory" if entry is _FOLDER else None


def names(url: str) -> list[str]:
    """The current names in a folder. Raises BridgeError if it does not exist."""
    inside = set(_list(url))
    inside |= {u.rpartition("/")[2] for u in _pending if u.rpartition("/")[0] == url}
    if not inside:
        raise BridgeError(
            f"{url} cannot be listed: the store has no such folder or bucket. Check the URL."
        )
    return sorted(inside)


def below(url: str) -> dict[str, FileState]:
    """All current objects below a folder, by URL; empty if there is no folder."""
    objects = _ask(url, "listed", lambda store: store.below(_pinned(url) or url), {})
    return {f"{url}/{path}": entry for path, entry in objects.items()}


def fetch(url: str, start: int, end: int) -> bytes:
    """All bytes from ``start`` to ``end``. Raises BridgeError on failure."""
    if (data := _pending.get(url)) is not None:
        return data[start:end]
    if start >= end:
        return b""

    def read(store: Store) -> bytes:
        data = store.read(_pinned(url) or url, start, end)
        if len(data) != end - start:
            raise ShortRead(f"only {len(data):,} of {end - start:,} bytes were received")
        return data

    data = _ask(url, "read", read, None)
    if data is None:
        raise _missing(url)
    return data


def put_small(url: str, data: bytes) -> None:
    """Write an object in one request; replaces an existing one atomically."""
    _put(url, lambda store: store.put(url, data))


def put_if_absent(url: str, data: bytes) -> bool:
    """Write an object unless it exists. Returns whether ``data`` is the content now.

    If the answer to the first try was lost, the content shows who wrote it, so ``data`` must be
    unique.
    """
    return _put(url, lambda store: store.put_if_absent(url, data)) or (
        look(url, again=True).size == len(data) and fetch(url, 0, len(data)) == data
    )


def remove(urls: Iterable[str]) -> None:
    """Delete objects; missing ones are not an error."""

    def remove_one(url: str) -> None:
        _ask(url, "removed", lambda store: store.remove(url), None)
        forget(url)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(remove_one, urls):
            pass


def start_upload(url: str, size: int) -> Upload:
    """Start an upload of ``size`` bytes. Raises BridgeError on failure."""
    forget(url)
    return store_of(url).upload(url, size)


def abort_uploads(url: str) -> None:
    """Abort unfinished uploads of killed runs below a folder: they cost money and are invisible."""
    with contextlib.suppress(Exception):  # not every user has this permission
        store_of(url).abort_uploads(url)


def forget(url: str) -> None:
    """Drop cached information about an object and everything above and below it."""
    for root in [root for root in _pins if url == root or url.startswith(f"{root}/")]:
        _pins.pop(root, None)
    for folder in list(_listings):
        if url.startswith(f"{folder}/") or folder == url or folder.startswith(f"{url}/"):
            _listings.pop(folder, None)


def _list(url: str) -> Mapping[str, FileState | None]:
    """List a folder, by name, and cache the result; empty if it does not exist."""
    if _pinned(url) is not None and url in _listings:
        return _listings[url]
    _listings.pop(url, None)
    entries = _ask(url, "listed", lambda store: store.entries(_pinned(url) or url), {})
    while len(_listings) >= _MOST_LISTINGS:
        _listings.pop(next(iter(_listings)), None)
    _listings[url] = entries
    return entries


def _listed(url: str) -> object:
    """The state of an object in a cached listing; _MISSING or _UNKNOWN otherwise."""
    folder, _, name = url.rpartition("/")
    if folder in _listings:
        return _listings[folder].get(name, _MISSING)
    if folder.endswith(":/") or not folder:
        return _UNKNOWN
    return _MISSING if _listed(folder) is _MISSING else _UNKNOWN


def _head(url: str) -> object:
    """Request the state of an object."""
    return _ask(url, "looked at", lambda store: store.head(_pinned(url) or url), _MISSING)


def _ask(url: str, doing: str, call: Callable[[Store], _T], missing: _U) -> _T | _U:
    """Call a store with retries; returns ``missing`` if the object or bucket does not exist."""
    store = store_of(url)

    def ask() -> _T:
        if _pinned(url) is None:
            store.refresh()
        return call(store)

    try:
        return steadily(url, doing, ask)
    except FileNotFoundError:
        return missing


def _put(url: str, call: Callable[[Store], _T]) -> _T:
    store = store_of(url)
    try:
        return steadily(url, "written", lambda: call(store))
    except FileNotFoundError as error:
        raise no_bucket(url, error) from None
    finally:
        forget(url)


def _missing(url: str) -> BridgeError:
    return BridgeError(f"{url} cannot be read: it does not exist.")


def _protocol(url: str) -> str:
    return url.partition("://")[0]
