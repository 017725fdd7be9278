"""Stores that only fsspec supports: the Hub, sftp, web servers, memory, and others."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.extras import install_command, missing
from neox_bridge.stores.retry import steadily
from neox_bridge.stores.store import FileState, Upload

# names of the fields that change whenever the object changes
_TAGS = ("ETag", "etag", "xet_hash", "blob_id", "mtime", "last_modified", "created")
_NEEDS = {  # by the protocol of a URL: an extra, or another package
    "hf": ("hub", ""),
    "ssh": ("", "paramiko"),
    "sftp": ("", "paramiko"),
    "http": ("remote", ""),
    "https": ("remote", ""),
}


class FsspecStore:
    """A file system of fsspec.

    Raises BridgeError for a kind of URL that no installed package supports.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            what = f"{url}: fsspec is missing, which reads and writes stores"
            raise missing(what, "remote") from None
        protocol = url.partition("://")[0]
        try:
            self.fs: Any = url_to_fs(url)[0]
        except ImportError as error:
            needs = _NEEDS.get(protocol)
            way = f"{error}." if needs is None else f"Install it: {install_command(*needs)}"
            raise BridgeError(f"{url}: this kind of store needs one more package. {way}") from None
        except ValueError as error:
            raise BridgeError(f"{url}: {error}. Check the URL.") from None
        except Exception as error:  # ssh connects here
            raise BridgeError(
                f"{url} cannot be reached: {type(error).__name__}: {error}. Check the address, the "
                "network and your access."
            ) from None
        # the file system of huggingface_hub would open a file per range, with a cache that reads 5
        # MB ahead
        self._reading = {"cache_type": "none"} if protocol == "hf" else {}

    def head(self, url: str) -> FileState | None:
        return _entry(self.fs.info(self._path(url)))

    def entries(self, url: str) -> Mapping[str, FileState | None]:
        path = self._path(url)
        try:
            infos = self.fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            info["name"].rstrip("/").rpartition("/")[2]: _entry(info)
            for info in infos
            if info["name"].rstrip("/") != path.rstrip("/")
        }

    def below(self, url: str) -> dict[str, FileState]:
        path = self._path(url)
        inside = path.rstrip("/") + "/"
        try:
            infos = self.fs.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            name[len(inside) :]: entry
            for name, info in infos.items()
            if name.startswith(inside) and (entry := _entry(info)) is not None
        }

    def read(self, url: str, start: int, end: int) -> bytes:
        data: bytes = self.fs.cat_file(self._path(url), start=start, end=end, **self._reading)
        return data

    def put(self, url: str, data: bytes) -> None:
        path = self._path(url)
        try:
            self.fs.pipe_file(path, data)
        except FileNotFoundError:  # a file system with real folders, which must be created
            self.fs.makedirs(self.fs._parent(path), exist_ok=True)
            self.fs.pipe_file(path, data)

    def put_if_absent(self, url: str, data: bytes) -> bool:
        """Not atomic: two simultaneous callers may both get True."""
        if self.fs.exists(self._path(url)):
            return False
        self.put(url, data)
        return True

    def remove(self, url: str) -> None:
        self.fs.rm_file(self._path(url))

    def upload(self, url: str, size: int) -> Upload:  # noqa: ARG002
        return _FileUpload(self, url)

    def abort_uploads(self, url: str) -> None:
        """Nothing to do: the next run replaces leftover parts."""

    def refresh(self) -> None:
        """Drop cached listings."""
        self.fs.invalidate_cache()

    def _path(self, url: str) -> str:
        return str(self.fs._strip_protocol(url))


class _FileUpload:
    """A file that is written sequentially under another name, then renamed.

    Retries are left to the fsspec file system.
    """

    def __init__(self, store: FsspecStore, url: str) -> None:
        self.store, self.fs, self.url = store, store.fs, url
        self.path = store._path(url)
        self.part = f"{self.path}.neox-bridge-part"
        self.file: Any = None

    def send(self, data: bytearray) -> None:
        if self.file is None:
            self.file = steadily(self.url, "written", self._open)
        self._once(lambda: self.file.write(data))

    def finish(self) -> str:
        def rename() -> None:
            self.file.close()
            if self.fs.exists(self.path):
                self.fs.rm_file(self.path)
            self.fs.mv(self.part, self.path)

        if self.file is None:
            self.send(bytearray())
        self._once(rename)
        self.store.refresh()
        entry = steadily(self.url, "looked at", lambda: self.store.head(self.url))
        return entry.tag if entry is not None else ""

    def abandon(self) -> None:
        if self.file is not None:
            with contextlib.suppress(Exception):
                self.file.close()
                self.fs.rm_file(self.part)

    def _open(self) -> Any:
        self.fs.makedirs(self.fs._parent(self.path), exist_ok=True)
        return self.fs.open(self.part, "wb")

    def _once(self, call: Callable[[], object]) -> None:
        steadily(self.url, "written", call, tries=1)


def _entry(info: Mapping[str, Any]) -> FileState | None:
    """The fsspec state of an object; None for a folder."""
    if info["type"] == "directory":
        return None
    lfs = info.get("lfs")
    if isinstance(lfs, Mapping) and "sha256" in lfs:
        tag = lfs["sha256"]
    else:
        tag = next((info[key] for key in _TAGS if info.get(key) not in (None, "")), "")
    return FileState(int(info["size"] or 0), str(tag))
