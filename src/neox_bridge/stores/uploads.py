"""Objects that are written part by part, and appear whole or not at all."""

import contextlib
from concurrent.futures import Future

from neox_bridge.stores.objects import forget, store_of
from neox_bridge.stores.store import PART_BYTES, WORK, Upload, part_size

__all__ = ["PART", "WORK", "Sender", "Upload", "abort_left_over", "part_size", "start_upload"]
PART = PART_BYTES


def start_upload(url: str, size: int) -> Upload:
    """Begin an object of so many bytes. Raises BridgeError where that fails."""
    forget(url)
    return store_of(url).upload(url, size)


class Sender:
    """Hands parts to uploads, which send them in the background."""

    def send(self, upload: Upload, number: int, data: bytearray) -> "Future[None]":
        """Hand over a part; the data must not be touched again."""
        upload.send(number, data)
        sent: Future[None] = Future()
        sent.set_result(None)
        return sent

    def close(self) -> None:
        """Nothing is left to do."""


def abort_left_over(url: str) -> None:
    """Abort uploads below a folder that a killed run left: they cost, and nobody sees them."""
    with contextlib.suppress(Exception):  # a right that not everybody has
        store_of(url).abort_uploads(url)
