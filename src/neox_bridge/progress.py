"""Progress of a call in phases, each with its own total in bytes."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Phase = Literal["checking", "writing", "verifying", "reading", "comparing"]
Count = Callable[[int], None]  # called with the bytes that were just read or written
Begin = Callable[[Phase, int | None], None]  # called with a phase that begins, and its total


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a call.

    Attributes:
        phase: "checking": files that a stopped run finished are read again. "writing". "verifying":
            the result is read and compared with its source. "reading" and "comparing": checkpoints.
        done: Bytes of this phase that are done.
        total: Bytes of this phase; None if that is not known.
    """

    phase: Phase
    done: int = 0
    total: int | None = None

    @property
    def percent(self) -> int | None:
        """How much of this phase is done, in whole percent; None if the total is not known."""
        if self.total is None:
            return None
        return 100 * self.done // self.total if self.total else 100


class Phases:
    """Tells a listener how far each phase of a call is. Any thread may count."""

    def __init__(self, listener: Callable[[Progress], None]) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._now: Progress | None = None

    def begin(self, phase: Phase, total: int | None) -> None:
        """Begin a phase. What the phase before it did not count is done too."""
        self.end()
        with self._lock:
            self._now = Progress(phase, 0, total)
            self._listener(self._now)

    def count(self, size: int) -> None:
        """Count bytes of the current phase."""
        with self._lock:
            if self._now is not None:
                done = self._now.done + size
                if self._now.total is not None:
                    done = min(done, self._now.total)
                self._now = replace(self._now, done=done)
                self._listener(self._now)

    def end(self) -> None:
        """End the current phase: all of it is done."""
        with self._lock:
            now, self._now = self._now, None
            if now is not None and now.total is not None and now.done < now.total:
                self._listener(replace(now, done=now.total))


def phases_of(listener: Callable[[Progress], None] | None) -> Phases | None:
    """The phases for a listener; None without one."""
    return None if listener is None else Phases(listener)
