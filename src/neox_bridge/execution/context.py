"""State that the threads of one execution share: progress, counts, a stop flag and findings."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from neox_bridge.execution.files import Files
from neox_bridge.progress import Begin, Count, Phase
from neox_bridge.tensors.pieces import OutputTensor
from neox_bridge.tensors.tensor_ref import TensorRef

Disks = tuple[int, int]  # st_dev of the source and of the target
How = Literal["shared", "copied", "transformed", "kept"]


class Stopped(Exception):
    """Another thread failed or the user interrupted, so this thread stops."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes of an output file from ``to`` on that share blocks with a source from ``start`` on."""

    to: int
    size: int
    source: str
    start: int


@dataclass(frozen=True, slots=True)
class Overflow:
    """Finite values of a tensor that became infinite in a cast. source: one of its sources."""

    tensor: str
    count: int
    source: TensorRef | None


@dataclass
class Context:
    """Mutable state. Every change goes through a method that holds the lock.

    Attributes:
        progress: Called with the bytes just read or written.
        phase: Called when a phase begins. The total of "writing" does not include files that are
            kept from an earlier run.
        every_crc: Whether to read bytes for their CRC-32 that the kernel could copy unread.
        maps_gaps: Whether parts of a local file with gaps between them are mapped, however small
            the gaps are. Otherwise they are read with the gaps if these are small.
        cloned: The parts that share blocks with a source, by output file (st_dev, st_ino).
        sharing: Whether two disks can share blocks, for the pairs that were tried.
        overflows: Values that became non-finite, by tensor.
        deviations: (tensor, file, largest one).
        roundings: (tensor, values that a scale made too small or too large for their dtype).
    """

    progress: Count | None = None
    phase: Begin | None = None
    every_crc: bool = False
    maps_gaps: bool = False
    written: Counter[How] = field(default_factory=Counter)
    cloned: dict[tuple[int, int], list[Shared]] = field(default_factory=dict)
    sharing: dict[Disks, bool] = field(default_factory=dict)
    overflows: list[Overflow] = field(default_factory=list)
    deviations: list[tuple[str, str, float]] = field(default_factory=list)
    roundings: list[tuple[str, int]] = field(default_factory=list)
    files: Files = field(default_factory=Files)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raise Stopped if the work must end."""
        if self.stop.is_set():
            raise Stopped

    def wrote(self, size: int, how: How) -> None:
        """Count ``size`` written bytes by the way they were written."""
        with self.lock:
            self.written[how] += size
            if self.progress is not None and not (how == "kept" and self.phase is not None):
                self.progress(size)

    def begin(self, phase: Phase, total: int) -> None:
        """Report that a phase begins, and how many bytes it has."""
        if self.phase is not None:
            self.phase(phase, total)

    def read_again(self, size: int) -> None:
        """Count bytes that an earlier run wrote and that are compared with their hash."""
        if self.progress is not None and self.phase is not None:
            self.progress(size)

    def share(self, file: tuple[int, int], part: Shared) -> None:
        """Count and record bytes of an output file that share blocks with a source."""
        with self.lock:
            self.cloned.setdefault(file, []).append(part)
        self.wrote(part.size, "shared")

    def overflow(self, tensor: OutputTensor, count: int) -> None:
        """Record how many finite values of a tensor became infinite in a cast."""
        source = next((p.source for p in tensor.pieces if p.source is not None), None)
        with self.lock:
            self.overflows.append(Overflow(tensor.name, count, source))

    def round_scaled(self, name: str, count: int) -> None:
        with self.lock:
            self.roundings.append((name, count))

    def deviate(self, name: str, file: str, largest: float) -> None:
        with self.lock:
            self.deviations.append((name, file, largest))
