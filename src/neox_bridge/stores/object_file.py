"""Opens an object of a store as a file for reading headers, with few requests.

The start of a file is fetched in one request, and so is the end of a zip, which contains its
directory. ``started`` prefetches those of many files in parallel.
"""

import io
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import BinaryIO, cast

from neox_bridge.stores.objects import fetch, kind, look

HEAD = 64 << 10  # bytes that are fetched from the start; a safetensors header has about 50 kB
_LAYER_HEAD = 16 << 10  # a layer's pickle is 5 kB
_TORCH_HEAD = 64 << 10  # with the names and shapes of all parameters: 30 kB (12B, 36 layers)
_TORCH_TAIL = 16 << 10  # the directory of its 20 records has 2 kB
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_LAYER = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_STEP = 32 << 10  # minimum bytes per request elsewhere
_KEPT = 4 << 20  # bytes that are cached of a file
_NEAR = 32 << 10  # smaller gaps are fetched too, because a separate request is slower
_AT_ONCE = 16  # maximum number of parallel requests
_WINDOW = 48  # files whose starts are prefetched
_RECENT = 4  # files whose chunks are cached, because a file is opened several times

_Chunk = tuple[int, bytes]
_ahead: "dict[str, Future[list[_Chunk]]]" = {}
_recent: "OrderedDict[tuple[str, str], list[_Chunk]]" = OrderedDict()
_lock = threading.Lock()


class _Ranges(io.RawIOBase):
    """The bytes of an object, fetched when they are read."""

    def __init__(self, url: str, size: int, chunks: list[_Chunk]) -> None:
        self.url, self.size, self.chunks, self.at = url, size, chunks, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self.size - self.at)
        if wanted <= 0:
            return 0
        start, data = self._chunk(wanted)
        part = data[self.at - start : self.at - start + wanted]
        view[: len(part)] = part
        self.at += len(part)
        return len(part)

    def holds(self, at: int, count: int) -> bool:
        end = min(self.size, at + count)
        return any(start <= at and end <= start + len(data) for start, data in self.chunks)

    def _chunk(self, wanted: int) -> _Chunk:
        """A chunk that contains the next byte."""
        for chunk in self.chunks:
            if chunk[0] <= self.at < chunk[0] + len(chunk[1]):
                return chunk
        later = min((c[0] for c in self.chunks if c[0] > self.at), default=self.size)
        least = _STEP if self.at or self.url.endswith(_TORCH) else HEAD
        end = min(later, self.at + max(wanted + io.DEFAULT_BUFFER_SIZE, least))
        fetched = self.at, fetch(self.url, self.at, end)
        self.chunks.append(fetched)
        while sum(len(data) for _, data in self.chunks) > max(_KEPT, 2 * len(fetched[1])):
            del self.chunks[0]
        return fetched


def open_object(url: str) -> BinaryIO:
    """Open the object for reading. Raises BridgeError if it does not exist."""
    entry = look(url)
    with _lock:
        chunks = _recent.setdefault((url, entry.tag), [])
        _recent.move_to_end((url, entry.tag))
        while len(_recent) > _RECENT:
            _recent.popitem(last=False)
    if not chunks and (future := _ahead.get(url)) is not None:
        chunks += future.result()
    return cast(BinaryIO, io.BufferedReader(_Ranges(url, entry.size, chunks)))


def fetch_chunks(file: BinaryIO, offsets: Sequence[int], count: int) -> None:
    """Prefetch ``count`` bytes at each offset of a file of ``open_object``."""
    raw = cast(_Ranges, cast(io.BufferedReader, file).raw)
    spans: list[tuple[int, int]] = []
    for at in sorted(offsets):
        if raw.holds(at, count):
            continue
        end = min(raw.size, at + count)
        if spans and at - spans[-1][1] < _NEAR:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((at, end))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        fetched = pool.map(lambda span: (span[0], fetch(raw.url, *span)), spans)
        raw.chunks.extend(fetched)


def started(paths: Iterable[str]) -> Iterator[str]:
    """Yields the URLs while the starts of the next files are prefetched.

    The data of a file is dropped when the next one is taken.
    """
    rest = iter(paths)
    with ThreadPoolExecutor(_AT_ONCE) as pool, ThreadPoolExecutor(_AT_ONCE) as tails:
        waiting: list[str] = []
        try:
            for path in islice(rest, _WINDOW):
                _ahead[path] = pool.submit(_start, path, tails)
                waiting.append(path)
            while waiting:
                yield waiting[0]
                _ahead.pop(waiting.pop(0), None)
                for more in islice(rest, 1):
                    _ahead[more] = pool.submit(_start, more, tails)
                    waiting.append(more)
        finally:
            for path in waiting:
                if (future := _ahead.pop(path, None)) is not None:
                    future.cancel()


def _start(url: str, tails: ThreadPoolExecutor) -> list[_Chunk]:
    """Fetch the start of a file and, for torch files, the end, which contains the directory.

    tails: fetches the ends, at the same time.
    """
    if kind(url) != "file":
        return []  # the error is reported when the file is opened
    size = look(url).size
    if not url.endswith(_TORCH):
        return [(0, fetch(url, 0, min(size, HEAD)))] if size else []
    head = _LAYER_HEAD if _LAYER.fullmatch(url.rpartition("/")[2]) else _TORCH_HEAD
    if size <= head + _TORCH_TAIL:
        return [(0, fetch(url, 0, size))] if size else []
    tail = size - _TORCH_TAIL
    end = tails.submit(fetch, url, tail, size)
    return [(0, fetch(url, 0, head)), (tail, end.result())]


def fetch_pieces(places: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes at (URL, offset, count), fetched in parallel."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda place: fetch(place[0], place[1], place[1] + place[2]), places))
