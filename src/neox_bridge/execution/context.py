"""What the threads of one execution share: progress, counts, a flag to stop, what was noticed."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from neox_bridge.execution.files import Files


class Stopped(Exception):
    """Another thread failed, or the user interrupted: this one gives up quietly."""


@dataclass
class Context:
    """Shared and mutable; every change goes through a method that holds the lock.

    overflows: (tensor, values that became non-finite). deviations: (tensor, file, largest one).
    """

    progress: Callable[[int], None] | None = None
    copied: int = 0
    transformed: int = 0
    overflows: list[tuple[str, int]] = field(default_factory=list)
    deviations: list[tuple[str, str, float]] = field(default_factory=list)
    files: Files = field(default_factory=Files)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raise Stopped where the work is to end."""
        if self.stop.is_set():
            raise Stopped

    def wrote(self, size: int, *, changed: bool) -> None:
        """Count ``size`` written bytes, moved as they were or made by numpy."""
        with self.lock:
            if changed:
                self.transformed += size
            else:
                self.copied += size
            if self.progress is not None:
                self.progress(size)

    def overflow(self, name: str, count: int) -> None:
        with self.lock:
            self.overflows.append((name, count))

    def deviate(self, name: str, file: str, largest: float) -> None:
        with self.lock:
            self.deviations.append((name, file, largest))
