"""Progress on stderr: a bar on a terminal, elsewhere a plain line now and then."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.streams import for_progress
from neox_bridge.progress import Count, Phase, Phases, Progress
from neox_bridge.wording import human

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

PROGRESS_SECONDS = 10  # seconds between two lines if stderr is not a terminal
# labels of phases whose names are not clear enough
_WORDS: dict[Phase, str] = {"checking": "checking finished files"}


@contextmanager
def progress_bar(total: int | None, phase: Phase, quiet: bool) -> Iterator[Count | None]:
    """Yields a function to call with the bytes of one phase, or None if nothing is shown."""
    with shown_phases(quiet) as phases:
        if phases is None:
            yield None
        else:
            phases.begin(phase, total)
            yield phases.count


@contextmanager
def shown_phases(quiet: bool) -> Iterator[Phases | None]:
    """Yields the object to report phases to, or None if nothing is shown.

    HF_HUB_DISABLE_PROGRESS_BARS disables progress, as in the tools of Hugging Face.
    """
    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    if quiet or off:
        yield None
    elif sys.stderr.isatty():
        with bars() as display:
            yield Phases(_bar(display))
    else:
        yield Phases(_lines())


def _bar(display: "Bars") -> Callable[[Progress], None]:
    """Shows one bar for the current phase."""
    tasks: dict[Phase, Any] = {}

    def show(progress: Progress) -> None:
        phase = progress.phase
        if phase not in tasks:
            for task in tasks.values():
                display.remove_task(task)
            tasks.clear()
            tasks[phase] = display.add_task(_WORDS.get(phase, phase), total=progress.total)
        display.update(tasks[phase], completed=progress.done)

    return show


def _lines() -> Callable[[Progress], None]:
    """Prints a line every ``PROGRESS_SECONDS``."""
    begun = printed = time.monotonic()
    phase: Phase | None = None

    def show(progress: Progress) -> None:
        nonlocal begun, printed, phase
        now = time.monotonic()
        if progress.phase != phase:
            phase, begun = progress.phase, now
        if now - printed < PROGRESS_SECONDS:
            return
        printed = now
        with suppress(OSError):
            print(progress_line(progress, now - begun), file=sys.stderr, flush=True)

    return show


def progress_line(progress: Progress, seconds: float) -> str:
    """The progress of a phase as one line. seconds: since it began."""
    label = _WORDS.get(progress.phase, progress.phase)
    return line_of(label, progress.done, progress.total, seconds)


def line_of(label: str, done: float, total: float | None, seconds: float) -> str:
    """A line with the label, the bytes done, the total, the rate and the ETA."""
    words = f"{label}: {human(done)}"
    rate = done / seconds if seconds > 0 else 0
    if total:
        words += f" of {human(total)} ({min(1, done / total):.0%})"
    if rate:
        words += f", {human(rate)}/s"
    if rate and total:
        words += f", ETA {timedelta(seconds=round(max(0, total - done) / rate))}"
    return words


def bars() -> "Bars":
    """Bars on stderr with rate and ETA, which disappear at the end."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(file=for_progress()),
        transient=True,
    )
