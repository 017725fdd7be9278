"""What every kind of store can do. ``objects`` adds what was seen already, and tries again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

WORK = ".neox-bridge"  # the folder in a target of what is only for resuming
PART_BYTES = 8 << 20  # of an upload; S3 takes 5 MiB at least
PARTS_AT_ONCE = 2  # of one object, on their way
_MAX_PARTS = 10_000  # of an object; the limit of S3


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells whether a file is still the same.

    size: bytes. tag: of an object, changes whenever the content does (S3's ETag, for example).
    The others are of files on a disk.
    """

    size: int
    tag: str = ""
    modified_ns: int = 0
    inode: int = 0
    device: int = 0


class Upload(Protocol):
    """An object that is sent part by part, and appears whole or not at all."""

    def send(self, data: bytearray) -> None:
        """Send the next part, which nobody may touch again. All but the last have the same size."""

    def finish(self) -> str:
        """Make the object appear. Returns its tag, as ``look`` tells it."""

    def abandon(self) -> None:
        """Leave nothing of it. Never raises."""


class Store(Protocol):
    """One bucket or file system. Every place is a URL; a folder is what has objects below it.

    Methods raise FileNotFoundError for what is missing, and whatever their library raises.
    """

    def refresh(self) -> None:
        """Forget listings that the library keeps: what it says next is as it is now."""

    def head(self, url: str) -> FileState | None:
        """Size and tag of an object; None for a folder, where the store knows folders."""

    def entries(self, url: str) -> Mapping[str, FileState | None]:
        """What is in a folder, by name; None stands for a folder. Empty where there is none."""

    def below(self, url: str) -> dict[str, FileState]:
        """Every object below a folder, by its path in it."""

    def read(self, url: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``, or fewer."""

    def put(self, url: str, data: bytes) -> None:
        """Write an object in one request."""

    def put_if_absent(self, url: str, data: bytes) -> bool:
        """The same, unless there is one. Returns whether it was written."""

    def remove(self, url: str) -> None:
        """Remove an object; where it is missing, FileNotFoundError or nothing."""

    def upload(self, url: str, size: int) -> Upload:
        """Begin an object of so many bytes."""

    def abort_uploads(self, url: str) -> None:
        """Abort uploads below a folder that a killed run left."""


def part_size(size: int) -> int:
    """Bytes of a part of an object of so many: 8 MiB, more where it would have too many parts."""
    return max(PART_BYTES, (-(-size // _MAX_PARTS) + 1023) // 1024 * 1024)
