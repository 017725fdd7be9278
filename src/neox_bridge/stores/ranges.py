"""Reads tensors of objects in large ranges, with read-ahead.

Each thread reads a tensor or a file sequentially, in small pieces. The pieces come from ranges of 8
MiB that are fetched once and shared. When a thread reads two adjacent ranges, the next one is
prefetched. If a thread alternates between places, as for a tensor on many ranks, ranges become
smaller, so that all ranges in use fit into memory.
"""

import threading
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from neox_bridge.stores.fetched import fetch_kept as fetch
from neox_bridge.stores.objects import look

RANGE = 8 << 20  # bytes per request
LEAST = 256 << 10
MEMORY = 80 << 20  # bytes of all ranges, in flight or in memory
_AT_ONCE = 8  # maximum number of parallel requests
_LONG = 4  # visits after which the pattern is known
_SEEN = 256  # number of recent ranges of a thread that are searched

_Key = tuple[str, int]  # URL, first byte


@dataclass
class _Habit:
    """The recent reads of one thread."""

    ranges: "OrderedDict[_Key, None]" = field(default_factory=OrderedDict)
    between: "deque[int]" = field(default_factory=lambda: deque([0] * _LONG, _LONG))

    def visit(self, key: _Key) -> int:
        """Count the ranges that the thread visits before it returns to this one, including it."""
        if key in self.ranges:
            others = 0
            for other in reversed(self.ranges):
                if other == key:
                    break
                others += 1
            self.between.append(others)
        self.ranges[key] = None
        self.ranges.move_to_end(key)
        if len(self.ranges) > _SEEN:
            self.ranges.popitem(last=False)
        return min(self.between) + 1


@dataclass
class Ranges:
    """The ranges in memory, shared by all threads of an execution."""

    size: int = RANGE
    _sizes: dict[str, int] = field(default_factory=dict)
    _known: "OrderedDict[_Key, Future[bytes]]" = field(default_factory=OrderedDict)
    _habits: dict[int, _Habit] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Drop all ranges and cancel requests that have not started."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._known.clear()
            self._sizes.clear()
            self._habits.clear()
            self.size = RANGE
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def get(self, url: str, at: int) -> tuple[int, bytes]:
        """The range that contains a byte of an object, and its start offset.

        Empty beyond the end of the object. Raises BridgeError if it cannot be read.
        """
        end = self._end(url)
        if at >= end:
            return at, b""
        with self._lock:
            self._fit((url, at // self.size * self.size))
            key = url, at // self.size * self.size
            before, after = key[1] - self.size, key[1] + self.size
            fetched = self._take(key, end)
            if (url, before) in self._known and after < end:
                self._take((url, after), end)
        try:
            return key[1], fetched.result()
        except BaseException:
            with self._lock:  # the next reader retries the request
                self._known.pop(key, None)
            raise

    def _end(self, url: str) -> int:
        if url not in self._sizes:
            self._sizes[url] = look(url).size
        return self._sizes[url]

    def _fit(self, key: _Key) -> None:
        """Make ranges smaller if those in use do not fit into memory."""
        habit = self._habits.setdefault(threading.get_ident(), _Habit())
        needed = 2 * habit.visit(key) * len(self._habits)
        if needed * self.size <= MEMORY or self.size <= LEAST:
            return
        while needed * self.size > MEMORY and self.size > LEAST:
            self.size //= 2
        self._known.clear()
        for other in self._habits.values():
            other.ranges.clear()
            other.between.extend([0] * _LONG)

    def _take(self, key: _Key, end: int) -> "Future[bytes]":
        fetched = self._known.get(key)
        if fetched is None:
            while len(self._known) >= MEMORY // self.size:
                self._known.popitem(last=False)
            self._pool = self._pool or ThreadPoolExecutor(_AT_ONCE)
            url, start = key
            fetched = self._pool.submit(fetch, url, start, min(end, start + self.size))
            self._known[key] = fetched
        self._known.move_to_end(key)
        return fetched


@dataclass(frozen=True, slots=True)
class Remote:
    """An object that is being read, in place of a file descriptor."""

    url: str
    ranges: Ranges

    def read_into(self, buffer: memoryview, start: int) -> int:
        """Fill a buffer from one range. Returns the number of bytes; 0 at the end of the object."""
        first, data = self.ranges.get(self.url, start)
        at = start - first
        count = min(len(buffer), len(data) - at)
        buffer[:count] = data[at : at + count]
        return max(0, count)
