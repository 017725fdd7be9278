"""The interface of all kinds of stores. ``objects`` adds caching and retries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

# the folder in a store's target for the files that are only needed to resume, and on a disk the end
# of the name of the folder beside a target in which it is made
WORK = ".neox-bridge"
PART_BYTES = 8 << 20  # part size of uploads; S3 requires at least 5 MiB
PARTS_AT_ONCE = 2  # maximum number of parts of one object in flight
_MAX_PARTS = 10_000  # maximum number of parts of an object; the limit of S3


@dataclass(frozen=True, slots=True)
class FileState:
    """The state of a file, to detect changes.

    size: bytes. tag: changes whenever the content of an object does (the ETag of S3, for example).
    The other fields are for local files.
    """

    size: int
    tag: str = ""
    modified_ns: int = 0
    inode: int = 0
    device: int = 0


class Upload(Protocol):
    """An upload in parts. The object appears atomically."""

    def send(self, data: bytearray) -> None:
        """Send the next part, which must not change afterwards. Only the last may be smaller."""

    def finish(self) -> str:
        """Complete the upload. Returns the tag, as ``look`` does."""

    def abandon(self) -> None:
        """Abort the upload. Never raises."""


class Store(Protocol):
    """One bucket or file system. Places are URLs. A folder exists if it contains objects.

    Methods raise FileNotFoundError for missing objects, and exceptions of their library.
    """

    def refresh(self) -> None:
        """Drop listings that the library has cached."""

    def head(self, url: str) -> FileState | None:
        """Size and tag of an object; None for a folder, if the store has folders."""

    def entries(self, url: str) -> Mapping[str, FileState | None]:
        """The entries of a folder, by name; None for a subfolder. Empty if it does not exist."""

    def below(self, url: str) -> dict[str, FileState]:
        """All objects below a folder, by relative path."""

    def read(self, url: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``, or fewer."""

    def put(self, url: str, data: bytes) -> None:
        """Write an object in one request."""

    def put_if_absent(self, url: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether it was written."""

    def remove(self, url: str) -> None:
        """Delete an object. Raises FileNotFoundError, or nothing, if it is missing."""

    def upload(self, url: str, size: int) -> Upload:
        """Start an upload of ``size`` bytes."""

    def abort_uploads(self, url: str) -> None:
        """Abort unfinished uploads of killed runs below a folder."""


def part_size(size: int) -> int:
    """Part size for an object: 8 MiB, or more if there would be too many parts."""
    return max(PART_BYTES, (-(-size // _MAX_PARTS) + 1023) // 1024 * 1024)
