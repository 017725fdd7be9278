"""Buckets of S3, Google Cloud and Azure, through obstore (https://developmentseed.org/obstore)."""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from neox_bridge.errors import BridgeError
from neox_bridge.extras import missing
from neox_bridge.stores import retry
from neox_bridge.stores.retry import ShortRead, steadily
from neox_bridge.stores.store import PARTS_AT_ONCE, FileState, Upload, part_size

if TYPE_CHECKING:
    from obstore.store import ObjectStore

S3 = ("s3", "s3a")
GOOGLE = ("gs", "gcs")
AZURE = ("az", "abfs", "abfss", "adl", "azure")
SCHEMES = (*S3, *GOOGLE, *AZURE)
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_", "STORAGE_EMULATOR_HOST", "HOME")
_EMPTY = (
    "the answer is empty with status 200, which S3 never sends. AWS_ENDPOINT_URL may name another "
    "kind of server, or a proxy may answer instead"
)
_WAIT_SECONDS = 0.1  # between two checks whether an upload has failed
_CLIENT = {
    "timeout": "10m",  # timeout of a request, including its body
    "read_timeout": "2m",
    "connect_timeout": "10s",
    "allow_http": True,  # schemes of endpoint URLs
}


def bucket_of(url: str) -> "Bucket":
    """The bucket of a URL. Raises BridgeError if it cannot be configured."""
    scheme, _, rest = url.partition("://")
    settings = tuple((k, v) for k, v in sorted(os.environ.items()) if k.startswith(_SETTINGS))
    return _bucket(scheme, rest.partition("/")[0], retry.FIRST_SECONDS, settings)


@lru_cache(maxsize=16)
def _bucket(scheme: str, name: str, pause_seconds: float, settings: object) -> "Bucket":  # noqa: ARG001
    """One client per bucket; a new one if the environment changes."""
    return Bucket(scheme, name, pause_seconds)


class Bucket:
    """A bucket, or a container of Azure.

    Requests are made once, because ``objects`` retries them. Long operations use ``patient``, which
    retries each of their requests.
    """

    def __init__(self, scheme: str, name: str, pause_seconds: float) -> None:
        self.scheme, self.name = scheme, name
        self.root = f"{scheme}://{name}"
        self.store = self._open(1, pause_seconds)
        self.patient = self._open(retry.TRIES, pause_seconds)

    def refresh(self) -> None:
        """Does nothing, because obstore has no cache."""

    def head(self, url: str) -> FileState:
        return self._object(self.store.head(self._key(url)))

    def entries(self, url: str) -> Mapping[str, FileState | None]:
        answer = self.store.list_with_delimiter(self._key(url) or None)
        entries: dict[str, FileState | None] = dict.fromkeys(
            prefix.rstrip("/").rpartition("/")[2] for prefix in answer["common_prefixes"]
        )
        for meta in answer["objects"]:
            entries[meta["path"].rpartition("/")[2]] = self._object(meta)
        return entries

    def below(self, url: str) -> dict[str, FileState]:
        key = self._key(url)
        start = len(key) + 1 if key else 0
        answer = self.patient.list(key or None).collect()
        return {meta["path"][start:]: self._object(meta) for meta in answer}

    def read(self, url: str, start: int, end: int) -> bytes:
        return bytes(self.store.get_range(self._key(url), start=start, end=end))

    def put(self, url: str, data: bytes) -> None:
        self.store.put(self._key(url), data, use_multipart=False)

    def put_if_absent(self, url: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        try:
            self.store.put(self._key(url), data, mode="create")
        except AlreadyExistsError:
            return False
        except Exception as error:
            if not retry.is_unknown(error):
                raise
            # this S3 server has no conditional writes, so the check cannot be atomic
            with contextlib.suppress(FileNotFoundError):
                self.head(url)
                return False
            self.put(url, data)
        return True

    def remove(self, url: str) -> None:
        self.store.delete(self._key(url))

    def upload(self, url: str, size: int) -> Upload:
        several = size > part_size(size)
        return _Multipart(self, url, part_size(size)) if several else _Single(self, url)

    def abort_uploads(self, url: str) -> None:
        """Abort unfinished uploads, which only S3 keeps and obstore cannot list."""
        if self.scheme in S3:
            from neox_bridge.stores.credentials import s3_client

            client = s3_client()
            uploads = client.list_multipart_uploads(Bucket=self.name, Prefix=f"{self._key(url)}/")
            for entry in uploads.get("Uploads", ()):
                client.abort_multipart_upload(
                    Bucket=self.name, Key=entry["Key"], UploadId=entry["UploadId"]
                )

    def _key(self, url: str) -> str:
        key = url[len(self.root) :].strip("/")
        if "//" in key:
            raise BridgeError(f"{url} contains two slashes in a row, which obstore cannot request.")
        return key

    def _object(self, meta: Mapping[str, Any]) -> FileState:
        """Raises ShortRead if S3 returns no ETag, which every object has."""
        tag = meta["e_tag"] or meta["version"]
        if not tag and self.scheme in S3:
            raise ShortRead(_EMPTY)
        return FileState(meta["size"], self.tag(meta))

    @staticmethod
    def tag(meta: Mapping[str, Any]) -> str:
        """The ETag with quotes, which Azure listings omit."""
        tag = meta.get("e_tag") or meta.get("version") or meta.get("last_modified", "")
        return '"{}"'.format(str(tag).strip('"'))

    def _open(self, tries: int, pause_seconds: float) -> "ObjectStore":
        """A client with this many tries. Raises BridgeError if it cannot be created."""
        try:
            import obstore  # noqa: F401
        except ImportError:
            what = f"{self.root}: obstore is missing, which reads and writes this kind of store"
            raise missing(what, "remote") from None
        from neox_bridge.stores.credentials import azure_options, google_options, s3_options

        again: Any = {
            "max_retries": tries - 1,
            "retry_timeout": timedelta(minutes=3),
            "backoff": {
                "init_backoff": timedelta(seconds=pause_seconds),
                "max_backoff": timedelta(seconds=retry.LONGEST_SECONDS),
                "base": 2.0,
            },
        }
        client: dict[str, Any] = dict(_CLIENT)
        if authorities := os.environ.get("AWS_CA_BUNDLE"):
            with open(authorities) as file:
                client["root_certificate"] = file.read()
        shared: Any = {"client_options": client, "retry_config": again}
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store

        try:
            if self.scheme in S3:
                # not every S3 server can delete many objects in one request
                options = {"disable_bulk_delete": True, **s3_options(self.root)}
                return S3Store(self.name, **options, **shared)
            if self.scheme in GOOGLE:
                return GCSStore(self.name, **google_options(self.root), **shared)
            container, _, host = self.name.partition("@")
            return AzureStore(container, **azure_options(self.root, host), **shared)
        except (BaseError, ValueError) as error:
            raise BridgeError(
                f"{self.root} cannot be opened: {retry.describe(error)}. Check the environment "
                "variables of the store."
            ) from None


class _Single:
    """An object of one part."""

    def __init__(self, bucket: Bucket, url: str) -> None:
        self.bucket, self.url, self.data = bucket, url, bytearray()

    def send(self, data: bytearray) -> None:
        self.data = data

    def finish(self) -> str:
        key = self.bucket._key(self.url)
        try:
            answer = steadily(
                self.url,
                "written",
                lambda: self.bucket.store.put(key, self.data, use_multipart=False),
            )
        except FileNotFoundError as error:
            raise retry.no_bucket(self.url, error) from None
        return Bucket.tag(answer)

    def abandon(self) -> None:
        self.data = bytearray()


class _Abandoned(Exception):
    pass


class _Multipart:
    """A multipart upload. obstore takes parts in its own thread, as fast as it sends them."""

    def __init__(self, bucket: Bucket, url: str, part_bytes: int) -> None:
        self.bucket, self.url, self.part_bytes = bucket, url, part_bytes
        self.parts: queue.Queue[bytearray | None] = queue.Queue(1)
        self.taken = 0
        self.tag: Future[str] = Future()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def send(self, data: bytearray) -> None:
        self._hand_over(data)

    def finish(self) -> str:
        self._hand_over(bytearray())
        return self.tag.result()

    def abandon(self) -> None:
        """Abort the upload. obstore does so when its source fails."""
        with contextlib.suppress(Exception):
            self._hand_over(None)
        self.thread.join()

    def _hand_over(self, data: bytearray | None) -> None:
        """Wait until a part can be queued. Raises BridgeError as soon as the upload has failed."""
        while not self.tag.done():
            with contextlib.suppress(queue.Full):
                self.parts.put(data, timeout=_WAIT_SECONDS)
                return
        self.tag.result()

    def _iterate(self) -> Iterator[bytearray]:
        while data := self.parts.get():
            self.taken += 1
            yield data
        if data is None:
            raise _Abandoned

    def _run(self) -> None:
        try:
            self.tag.set_result(steadily(self.url, "written", self._send_all))
        except FileNotFoundError as error:
            self.tag.set_exception(retry.no_bucket(self.url, error))
        except BaseException as error:
            self.tag.set_exception(error)

    def _send_all(self) -> str:
        """Send all parts. Raises Unreachable, which is not retried, if parts are lost."""
        key = self.bucket._key(self.url)
        try:
            answer = self.bucket.patient.put(
                key,
                self._iterate(),
                use_multipart=True,
                chunk_size=self.part_bytes,
                max_concurrency=PARTS_AT_ONCE,
            )
        except FileNotFoundError:
            if not self.taken:
                raise
            # the upload is complete, but the answer was lost, and the upload no longer exists
            return steadily(self.url, "looked at", lambda: self.bucket.head(self.url)).tag
        except Exception as error:
            if not self.taken:
                raise
            raise retry.failed(self.url, "written", error, retry.TRIES) from None
        return Bucket.tag(answer)
