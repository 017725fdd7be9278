"""Objects in stores, by URL: looked at, listed, read by ranges, written small, removed.

Everything that is asked of a store goes through here: what was seen is remembered, and passing
errors are tried again.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TypeVar

from neox_bridge.errors import BridgeError
from neox_bridge.stores.retry import ShortRead, steadily
from neox_bridge.stores.store import FileState, Store, Upload

_T = TypeVar("_T")
_U = TypeVar("_U")
_MOST_LISTINGS = 64  # folders
_AT_ONCE = 16  # requests
_UNKNOWN, _MISSING = object(), object()
_pending: dict[str, bytes] = {}
_listings: dict[str, Mapping[str, FileState | None]] = {}
_pins: dict[str, str] = {}  # by the URL of a revision of the Hub: the URL of its commit
_FOLDER = None  # what stands for a folder in a listing


def store_of(url: str) -> Store:
    """The store of a URL. Raises BridgeError where what it needs is not installed."""
    from neox_bridge.stores.buckets import SCHEMES, bucket_of

    if _protocol(url) in SCHEMES:
        return bucket_of(url)
    from neox_bridge.stores.fsspec_store import FsspecStore

    return FsspecStore(_pinned(url) or url)


def pin(url: str, commit_url: str) -> None:
    """Read a revision of the Hub as it is at one commit, until it is forgotten.

    What is under ``url`` is then read under ``commit_url``, so that all files are of one commit.
    A folder of it is listed once.
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
    """For a block, this process sees these objects as if they were there already.

    So what is nearly finished can be looked at as it will be, before its manifest says that it is.
    """
    _pending.update(objects)
    try:
        yield
    finally:
        for url in objects:
            _pending.pop(url, None)


def pending_now() -> dict[str, bytes]:
    """What is ``pending``, for another process to see it too."""
    return dict(_pending)


def look(url: str, *, again: bool = False) -> FileState:
    """Size and tag. again: as it is now, not as it was when its folder was listed.

    Raises BridgeError for what isn't there.
    """
    if url in _pending:
        return FileState(len(_pending[url]), sha256(_pending[url]).hexdigest())
    entry = _UNKNOWN if again and _pinned(url) is None else _listed(url)
    if entry is _UNKNOWN and _protocol(url) == "hf":  # one listing for all files of a folder
        _list(url.rpartition("/")[0])
        entry = _listed(url)
    entry = _head(url) if entry is _UNKNOWN else entry
    if not isinstance(entry, FileState):
        raise BridgeError(f"{url} cannot be read: it does not exist.")
    return entry


def look_all(urls: Iterable[str]) -> dict[str, FileState]:
    """``look`` again at those that exist: one request a thousand objects of a folder."""
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
    """ "file", "directory", or None where there is nothing: what was seen, or else asked for."""
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
    """The names in a folder, as it is now. Raises BridgeError where there is none."""
    inside = set(_list(url))
    inside |= {u.rpartition("/")[2] for u in _pending if u.rpartition("/")[0] == url}
    if not inside:
        raise BridgeError(f"{url} cannot be listed: no such folder or bucket.")
    return sorted(inside)


def below(url: str) -> dict[str, FileState]:
    """Every object below a folder by its URL, as it is now; none where there is no folder."""
    objects = _ask(url, "listed", lambda store: store.below(_pinned(url) or url), {})
    return {f"{url}/{path}": entry for path, entry in objects.items()}


def fetch(url: str, start: int, end: int) -> bytes:
    """The bytes from ``start`` up to ``end``, all of them. Raises BridgeError where that fails."""
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
        raise BridgeError(f"{url} cannot be read: it does not exist.")
    return data


def put_small(url: str, data: bytes) -> None:
    """Write an object in one request; what was there is replaced, whole or not at all."""
    _put(url, lambda store: store.put(url, data))


def put_if_absent(url: str, data: bytes) -> bool:
    """Write an object in one request, unless there is one. Returns whether it is this one now.

    Where the answer to a first try was lost, what is there says whose it is: ``data`` must be
    like no other.
    """
    return _put(url, lambda store: store.put_if_absent(url, data)) or (
        look(url, again=True).size == len(data) and fetch(url, 0, len(data)) == data
    )


def remove(urls: Iterable[str]) -> None:
    """Remove objects; those that are gone already are no error."""

    def remove_one(url: str) -> None:
        _ask(url, "removed", lambda store: store.remove(url), None)
        forget(url)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(remove_one, urls):
            pass


def start_upload(url: str, size: int) -> Upload:
    """Begin an object of so many bytes. Raises BridgeError where that fails."""
    forget(url)
    return store_of(url).upload(url, size)


def abort_uploads(url: str) -> None:
    """Abort uploads below a folder that a killed run left: they cost, and nobody sees them."""
    with contextlib.suppress(Exception):  # a right that not everybody has
        store_of(url).abort_uploads(url)


def forget(url: str) -> None:
    """Let nothing be believed any more that was seen of an object, of what is below or above it."""
    for root in [root for root in _pins if url == root or url.startswith(f"{root}/")]:
        _pins.pop(root, None)
    for folder in list(_listings):
        if url.startswith(f"{folder}/") or folder == url or folder.startswith(f"{url}/"):
            _listings.pop(folder, None)


def _list(url: str) -> Mapping[str, FileState | None]:
    """What is in a folder, by name, as it is now, and remembered; empty where there is nothing."""
    if _pinned(url) is not None and url in _listings:
        return _listings[url]
    _listings.pop(url, None)
    entries = _ask(url, "listed", lambda store: store.entries(_pinned(url) or url), {})
    while len(_listings) >= _MOST_LISTINGS:
        _listings.pop(next(iter(_listings)), None)
    _listings[url] = entries
    return entries


def _listed(url: str) -> object:
    """What a listing says of an object; _MISSING where it isn't there, _UNKNOWN where none says."""
    folder, _, name = url.rpartition("/")
    if folder in _listings:
        return _listings[folder].get(name, _MISSING)
    if folder.endswith(":/") or not folder:
        return _UNKNOWN
    return _MISSING if _listed(folder) is _MISSING else _UNKNOWN


def _head(url: str) -> object:
    """What the store says of an object now."""
    return _ask(url, "looked at", lambda store: store.head(_pinned(url) or url), _MISSING)


def _ask(url: str, doing: str, call: Callable[[Store], _T], missing: _U) -> _T | _U:
    """What a store answers, at the end; ``missing`` where there is no such object or bucket."""
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
        raise BridgeError(
            f"{url} cannot be written: {error}. Check the name of the bucket."
        ) from None
    finally:
        forget(url)


def _protocol(url: str) -> str:
    return url.partition("://")[0]
