"""Objects that are written part by part, and appear whole or not at all."""

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from neox_bridge.errors import BridgeError
from neox_bridge.stores.objects import filesystem, forget, look
from neox_bridge.stores.retry import steadily

WORK = ".neox-bridge"  # the folder in a target of what is only for going on with it
PART = 8 << 20  # bytes; S3 takes 5 MiB at least
_PARTS = 10_000  # of an object, S3's limit
_AT_ONCE = 4  # parts on their way; each is in memory twice while it goes
_S3 = ("s3", "s3a")
_WHOLE = ("gs", "gcs", "az", "abfs", "abfss")  # what isn't finished isn't there


def part_size(size: int) -> int:
    """Bytes of a part of an object of so many: 8 MiB, more where it would have too many parts."""
    return max(PART, (-(-size // _PARTS) + 1023) // 1024 * 1024)


class Upload(Protocol):
    """An object on its way.

    sends_any: whether parts may be sent in any order, and several at once.
    """

    sends_any: bool

    def send(self, number: int, data: bytearray) -> None:
        """Send part ``number``, from 0. All but the last have the same size."""

    def finish(self) -> str:
        """The object is there from now on. Returns its tag, as ``look`` tells it."""

    def abandon(self) -> None:
        """Nothing is left of it. Never raises."""


def start_upload(url: str, size: int) -> Upload:
    """Begin an object of so many bytes. Raises BridgeError where that fails."""
    protocol = url.partition("://")[0]
    if protocol in _S3:
        return _S3Upload(url, several=size > part_size(size))
    return _FileUpload(url, renamed=protocol not in _WHOLE)


@dataclass
class Sender:
    """Sends parts in the background; a few are in memory, whatever is written."""

    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_AT_ONCE))
    room: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(_AT_ONCE)
    )

    def send(self, upload: Upload, number: int, data: bytearray) -> "Future[None]":
        """Send a part as soon as there is room for it; the data must not be touched again."""
        if not upload.sends_any:
            upload.send(number, data)
            done: Future[None] = Future()
            done.set_result(None)
            return done
        self.room.acquire()
        try:
            return self.pool.submit(self._send, upload, number, data)
        except BaseException:
            self.room.release()
            raise

    def _send(self, upload: Upload, number: int, data: bytearray) -> None:
        try:
            upload.send(number, data)
        finally:
            self.room.release()

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


class _S3Upload:
    """A multipart upload, or one request for an object of one part."""

    sends_any = True

    def __init__(self, url: str, several: bool) -> None:
        self.url, (self.fs, path) = url, filesystem(url)
        self.bucket, self.key, _ = self.fs.split_path(path)
        self.parts: dict[int, dict[str, Any]] = {}
        self.tag = ""
        self.id: str | None = None
        if several:
            self.id = str(self._call("create_multipart_upload")["UploadId"])

    def send(self, number: int, data: bytearray) -> None:
        if self.id is None:
            self.tag = str(self._call("put_object", Body=data).get("ETag", ""))
            return
        place = {"PartNumber": number + 1, "UploadId": self.id}
        found = self._call("upload_part", Body=data, **place)
        sums = {k: v for k, v in found.items() if k.startswith("Checksum") and k != "ChecksumType"}
        self.parts[number] = {"PartNumber": number + 1, "ETag": found["ETag"], **sums}

    def finish(self) -> str:
        if self.id is not None:
            parts = [self.parts[number] for number in sorted(self.parts)]
            told = {"UploadId": self.id, "MultipartUpload": {"Parts": parts}}
            try:
                self.tag = str(self._call("complete_multipart_upload", **told).get("ETag", ""))
            except FileNotFoundError:  # an answer was lost, and it is complete
                self.tag = look(self.url, again=True).tag
        forget(self.url)
        return self.tag

    def abandon(self) -> None:
        if self.id is not None:
            with contextlib.suppress(Exception):
                self._call("abort_multipart_upload", UploadId=self.id)

    def _call(self, method: str, **told: Any) -> dict[str, Any]:
        place = {"Bucket": self.bucket, "Key": self.key}

        def call() -> dict[str, Any]:
            found: dict[str, Any] = self.fs.call_s3(method, **place, **told)
            return found

        try:
            return steadily(self.url, "written", call)
        except FileNotFoundError as error:
            if method == "complete_multipart_upload":
                raise
            raise BridgeError(
                f"{self.url} can't be written: {error}. Is the bucket's name right, and does "
                "nobody else write or clear the same target?"
            ) from None


class _FileUpload:
    """A file that fsspec writes from its start to its end; retries are those of its library.

    renamed: written under another name first, where a file is there before it is whole.
    """

    sends_any = False

    def __init__(self, url: str, renamed: bool) -> None:
        self.url, (self.fs, self.path) = url, filesystem(url)
        self.place = f"{self.path}.neox-bridge-part" if renamed else self.path
        self.renamed = renamed
        self.file: Any = None

    def send(self, number: int, data: bytearray) -> None:  # noqa: ARG002, they come in order
        if self.file is None:
            self.file = steadily(self.url, "written", self._open)
        steadily(self.url, "written", lambda: self.file.write(data), tries=1)

    def finish(self) -> str:
        def finish() -> None:
            self.file.close()
            if self.renamed:
                if self.fs.exists(self.path):
                    self.fs.rm_file(self.path)
                self.fs.mv(self.place, self.path)
            else:
                self.file.commit()

        if self.file is None:
            self.send(0, bytearray())
        steadily(self.url, "written", finish, tries=1)
        forget(self.url)
        return look(self.url, again=True).tag

    def abandon(self) -> None:
        if self.file is None:
            return
        with contextlib.suppress(Exception):
            if self.renamed:
                self.file.close()
                self.fs.rm_file(self.place)
            else:
                self.file.discard()
                self.file.closed = True

    def _open(self) -> Any:
        if self.renamed:
            self.fs.makedirs(self.fs._parent(self.path), exist_ok=True)
            return self.fs.open(self.place, "wb")
        return self.fs.open(self.place, "wb", block_size=PART, autocommit=False)


def abort_left_over(url: str) -> None:
    """Abort uploads below a folder that a killed run left: they cost, and nobody sees them."""
    if url.partition("://")[0] not in _S3:
        return
    fs, path = filesystem(url)
    bucket, key, _ = fs.split_path(path)
    with contextlib.suppress(Exception):  # a right that not everybody has
        found = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
        for entry in found.get("Uploads", ()):
            told = {"Bucket": bucket, "Key": entry["Key"], "UploadId": entry["UploadId"]}
            fs.call_s3("abort_multipart_upload", **told)
