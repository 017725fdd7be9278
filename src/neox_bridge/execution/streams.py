"""A target that is written sequentially: an object of a store."""

from typing import Any

from neox_bridge.execution.digests import hasher
from neox_bridge.layouts.record_file import HashName
from neox_bridge.stores.store import PARTS_AT_ONCE, Upload, part_size

# buffers per object: one is filled, one waits, one was handed over, the others are being sent
PARTS_IN_MEMORY = 3 + PARTS_AT_ONCE
_ZEROS = bytes(1 << 20)


class Stream:
    """A ``movers.Target`` that takes bytes at increasing offsets; gaps are zeros.

    Bytes for one of ``places`` are kept for the literal that follows: the CRC-32 of a tensor comes
    after the tensor.
    """

    def __init__(
        self,
        upload: Upload,
        size: int,
        hash_name: HashName | None,
        places: frozenset[int] = frozenset(),
    ) -> None:
        self._upload, self._size, self._places = upload, size, places
        self._part = part_size(size)
        self._hash: Any = hasher(hash_name) if hash_name else None
        self._kept: dict[int, bytes] = {}
        self._at = 0
        self._data = bytearray()
        self._has_sent = False

    def write(self, data: "bytes | memoryview", to: int) -> None:
        """Write bytes at an offset at or after the end of the bytes before."""
        if to in self._places:
            self._kept[to] = bytes(data)
            return
        assert to >= self._at, "written out of order"
        while self._at < to:
            self._add(memoryview(_ZEROS)[: to - self._at])
        self._add(memoryview(data))

    def literal(self, data: bytes, to: int) -> None:
        """Write bytes that may contain places."""
        patched = bytearray(data)
        for place in [p for p in self._kept if to <= p < to + len(data)]:
            kept = self._kept.pop(place)
            patched[place - to : place - to + len(kept)] = kept
        self.write(memoryview(patched), to)

    def finish(self) -> tuple[str | None, str]:
        """Complete the object. Returns (hash, tag). Raises BridgeError on failure."""
        while self._at < self._size:
            self._add(memoryview(_ZEROS)[: self._size - self._at])
        assert self._at == self._size, f"{self._at} bytes written of {self._size}"
        assert not self._kept, "CRCs without a place"
        if self._data or not self._has_sent:
            self._send()
        return self._hash.hexdigest() if self._hash else None, self._upload.finish()

    def abandon(self) -> None:
        """Abort, so that no object is left."""
        self._upload.abandon()

    def _add(self, data: memoryview) -> None:
        if self._hash:
            self._hash.update(data)
        self._at += len(data)
        while data:
            count = min(len(data), self._part - len(self._data))
            self._data += data[:count]
            data = data[count:]
            if len(self._data) == self._part:
                self._send()

    def _send(self) -> None:
        """Raises BridgeError if an earlier part could not be sent."""
        data, self._data, self._has_sent = self._data, bytearray(), True
        self._upload.send(data)
