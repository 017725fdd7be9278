"""Objects in stores, by URL: looked at, listed, read by ranges, written small, removed.

Everything that is asked of fsspec for reading goes through here, and through ``steadily``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from neox_bridge.errors import BridgeError
from neox_bridge.stores.retry import ShortRead, steadily

_T = TypeVar("_T")
_S3 = ("s3", "s3a")
# what a store calls the thing that changes whenever the object does
_TAGS = (
    *("ETag", "etag", "xet_hash", "blob_id", "generation", "md5Hash"),
    *("mtime", "LastModified", "last_modified", "created"),
)
_NEEDS = {
    "s3": "pip install 'neox-bridge[remote]'",
    "s3a": "pip install 'neox-bridge[remote]'",
    "gs": "pip install gcsfs",
    "gcs": "pip install gcsfs",
    "hf": "pip install 'neox-bridge[hub]'",
    "ssh": "pip install paramiko",
    "sftp": "pip install paramiko",
    "az": "pip install adlfs",
    "abfs": "pip install adlfs",
}
_AT_ONCE = 16  # requests
_MOST_LISTINGS = 64  # folders
_UNKNOWN = object()
_EMPTY = (
    "the answer is 200 and empty, as S3 never gives: perhaps AWS_ENDPOINT_URL names another kind "
    "of server, or a proxy answers in its place"
)
_pending: dict[str, bytes] = {}
_listings: dict[str, dict[str, Mapping[str, Any]]] = {}
_pins: dict[str, str] = {}  # by the URL of a revision of the Hub: the URL of its commit


@dataclass(frozen=True, slots=True)
class Object:
    """size: bytes. tag: another one as soon as the content is another."""

    size: int
    tag: str


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system, and what it calls the object.

    S3's own retries are nearly turned off, since ``steadily`` does them: only one is left, for each
    of the many requests of a long listing. Raises BridgeError for a kind of
    URL that nothing installed knows.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise BridgeError(
            f"{url}: to read and write stores fsspec is needed: pip install 'neox-bridge[remote]'."
        ) from None
    protocol, place = _protocol(url), _pinned(url) or url
    options: dict[str, Any] = {}
    if protocol in _S3:
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 1}}
    try:
        fs, path = url_to_fs(place, **options)
    except ImportError as error:
        way = _NEEDS.get(protocol, f"install what fsspec names ({error})")
        raise BridgeError(f"{url}: this kind of store needs one more package: {way}.") from None
    except ValueError as error:
        raise BridgeError(f"{url}: {error}. Is the URL right?") from None
    except Exception as error:  # ssh connects already here
        raise BridgeError(f"{url} can't be reached: {type(error).__name__}: {error}.") from None
    if protocol in _S3:
        fs.retries = 2
    return fs, str(path)


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


def look(url: str, *, again: bool = False) -> Object:
    """Size and tag. again: as it is now, not as it was when its folder was listed.

    Raises BridgeError for what isn't there.
    """
    if url in _pending:
        return Object(len(_pending[url]), sha256(_pending[url]).hexdigest())
    found = _UNKNOWN if again and _pinned(url) is None else _listed(url)
    if found is _UNKNOWN and _protocol(url) == "hf":  # one listing for all files of a folder
        _list(url.rpartition("/")[0])
        found = _listed(url)
    found = _info(url) if found is _UNKNOWN else found
    if not isinstance(found, Mapping) or found["type"] == "directory":
        raise BridgeError(f"{url} can't be read: it is missing.")
    return object_of(found)


def look_all(urls: Iterable[str]) -> dict[str, Object]:
    """``look`` again at many: one request a thousand objects of a folder, not one for each."""
    now: dict[str, Mapping[str, Any]] = {}
    found = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder not in now:
            now[folder] = _list(folder) or {}
        entry = now[folder].get(name)
        if entry is None or entry["type"] == "directory":
            raise BridgeError(f"{url} is gone. Convert again when nothing changes it.")
        found[url] = object_of(entry)
    return found


def kind(url: str) -> str | None:
    """ "file", "directory", or None where there is nothing: what was seen, or else asked for."""
    if url in _pending:
        return "file"
    found = _listed(url)
    if found is _UNKNOWN:
        if _listings.get(url) or _list(url):  # the listing of an object is empty
            return "directory"
        found = _info(url)
    if not isinstance(found, Mapping):
        return None
    return "directory" if found["type"] == "directory" else "file"


def names(url: str) -> list[str]:
    """The names in a folder, as it is now. Raises BridgeError where there is none."""
    found = set(_list(url) or ())
    found |= {u.rpartition("/")[2] for u in _pending if u.rpartition("/")[0] == url}
    if not found:
        raise BridgeError(f"{url} can't be listed: there is no such folder or bucket.")
    return sorted(found)


def below(url: str) -> dict[str, Object]:
    """Every object below a folder by its URL, as it is now; none where there is no folder."""
    fs, path = filesystem(url)

    def find() -> dict[str, Any]:
        fs.invalidate_cache()
        found: dict[str, Any] = fs.find(path, detail=True)
        return found

    try:
        found = steadily(url, "listed", find)
    except FileNotFoundError:
        return {}
    inside = path.rstrip("/") + "/"
    return {
        f"{url}/{name[len(inside) :]}": object_of(entry)
        for name, entry in found.items()
        if name.startswith(inside) and entry["type"] != "directory"
    }


def fetch(url: str, start: int, end: int) -> bytes:
    """The bytes from ``start`` up to ``end``, all of them. Raises BridgeError where that fails."""
    if (data := _pending.get(url)) is not None:
        return data[start:end]
    fs, path = filesystem(url)
    # huggingface_hub's file system opens a file for each range, whose cache reads 5 MB ahead
    options = {"cache_type": "none"} if _protocol(url) == "hf" else {}

    def get() -> bytes:
        data: bytes = fs.cat_file(path, start=start, end=end, **options)
        if len(data) != end - start:
            raise ShortRead(f"of {end - start:,} bytes only {len(data):,} came")
        return data

    return _there(url, lambda: steadily(url, "read", get))


def put_small(url: str, data: bytes) -> None:
    """Write an object in one request; what was there is replaced, whole or not at all."""
    fs, path = filesystem(url)
    try:
        steadily(url, "written", lambda: fs.pipe_file(path, data))
    except FileNotFoundError as error:
        raise BridgeError(f"{url} can't be written: {error}. Is the bucket's name right?") from None
    forget(url)


def remove(urls: Iterable[str]) -> None:
    """Remove objects; those that are gone already are no error."""

    def one(url: str) -> None:
        fs, path = filesystem(url)
        with contextlib.suppress(FileNotFoundError):
            steadily(url, "removed", lambda: fs.rm_file(path))
        forget(url)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(one, urls):
            pass


def forget(url: str) -> None:
    """Let nothing be believed any more that was seen of an object, of what is below or above it."""
    for root in [root for root in _pins if url == root or url.startswith(f"{root}/")]:
        _pins.pop(root, None)
    filesystem(url)[0].invalidate_cache()
    for folder in list(_listings):
        if url.startswith(f"{folder}/") or folder == url or folder.startswith(f"{url}/"):
            _listings.pop(folder, None)


def object_of(info: Mapping[str, Any]) -> Object:
    """What a store's own words for an object say."""
    lfs = info.get("lfs")
    told = [lfs["sha256"]] if isinstance(lfs, dict) and "sha256" in lfs else []
    told += [info[key] for key in _TAGS if info.get(key) not in (None, "")]
    return Object(int(info["size"] or 0), str(told[0]) if told else "")


def _list(url: str) -> Mapping[str, Mapping[str, Any]] | None:
    """What is in a folder, by name, as it is now, and remembered; None where there is nothing."""
    is_pinned = _pinned(url) is not None
    if is_pinned and url in _listings:
        return _listings[url]
    fs, path = filesystem(url)

    def ls() -> list[Mapping[str, Any]]:
        if not is_pinned:
            fs.invalidate_cache()
        try:
            found: list[Mapping[str, Any]] = fs.ls(path, detail=True)
        except FileNotFoundError:
            _check_listing(url, fs, path)
            raise
        for entry in found:
            _check_told(url, entry)
        if not found:
            _check_listing(url, fs, path)
        return [entry for entry in found if entry["name"].rstrip("/") != path.rstrip("/")]

    _listings.pop(url, None)
    try:
        entries = steadily(url, "listed", ls)
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
    while len(_listings) >= _MOST_LISTINGS:
        _listings.pop(next(iter(_listings)), None)
    _listings[url] = found
    return found


def _listed(url: str) -> "Mapping[str, Any] | object | None":
    """What a listing says of an object; None where it isn't there, _UNKNOWN where none says."""
    folder, _, name = url.rpartition("/")
    if folder in _listings:
        return _listings[folder].get(name)
    if folder.endswith(":/") or not folder:
        return _UNKNOWN
    return None if _listed(folder) is None else _UNKNOWN


def _info(url: str) -> Mapping[str, Any] | None:
    """What the store says of an object now."""
    fs, path = filesystem(url)

    def info() -> Mapping[str, Any]:
        if _pinned(url) is None:
            fs.invalidate_cache()
        found: Mapping[str, Any] = fs.info(path)
        _check_told(url, found)
        return found

    try:
        return steadily(url, "looked at", info)
    except FileNotFoundError:
        return None


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _is_s3(url: str) -> bool:
    return _protocol(url) in _S3


def _check_told(url: str, info: Mapping[str, Any]) -> None:
    """Raise ShortRead where S3 says nothing of an object: each has an ETag."""
    if _is_s3(url) and info["type"] == "file" and not object_of(info).tag:
        raise ShortRead(_EMPTY)


def _check_listing(url: str, fs: Any, path: str) -> None:
    """Raise ShortRead where S3 lists nothing because its answer is empty, which s3fs doesn't see.

    Source: the API's ListObjectsV2, whose answer always says what was listed.
    """
    if not _is_s3(url):
        return
    bucket, key, _ = fs.split_path(path)
    told = {"Prefix": f"{key}/"} if key else {}
    answer = fs.call_s3("list_objects_v2", Bucket=bucket, Delimiter="/", MaxKeys=1, **told)
    if not {"KeyCount", "IsTruncated", "Name", "MaxKeys"} & set(answer):
        raise ShortRead(_EMPTY)
    if answer.get("Contents") or answer.get("CommonPrefixes"):
        raise ShortRead("a listing left out what is there")


def _there(url: str, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except FileNotFoundError:
        raise BridgeError(f"{url} can't be read: it is missing.") from None
