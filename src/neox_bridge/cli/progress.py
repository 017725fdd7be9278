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

PROGRESS_SECONDS = 10  # between two lines off a terminal
# what the bars and lines call a phase, where its name alone would not tell
_WORDS: dict[Phase, str] = {"checking": "checking finished files"}


@contextmanager
def progress_bar(total: int | None, phase: Phase, quiet: bool) -> Iterator[Count | None]:
    """Yields what to call with the bytes of one phase, or None where nothing is shown."""
    with shown_phases(quiet) as phases:
        if phases is None:
            yield None
        else:
            phases.begin(phase, total)
            yield phases.count


@contextmanager
def shown_phases(quiet: bool) -> Iterator[Phases | None]:
    """Yields phases that are shown, or None where nothing is.

    HF_HUB_DISABLE_PROGRESS_BARS turns that off, as in Hugging Face's own tools.
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
    """How far a phase is, as one line. seconds: since it began."""
    label = _WORDS.get(progress.phase, progress.phase)
    return line_of(label, progress.done, progress.total, seconds)


def line_of(label: str, done: float, total: float | None, seconds: float) -> str:
    """The label, and how many bytes of the total were done in these seconds."""
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
    """Bars on stderr with rate and the time that is left, which vanish at the end."""
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
