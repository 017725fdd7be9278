"""Shows a batch: progress bars or lines, JSON lines for logs, and a table at the end."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from neox_bridge.cli.output import not_copied, print_line, say, with_remedy
from neox_bridge.cli.progress import PROGRESS_SECONDS, bars, line_of
from neox_bridge.cli.spelling import as_options
from neox_bridge.documents import plain_data
from neox_bridge.wording import human, plain, plural, some

if TYPE_CHECKING:
    from neox_bridge.batches.dry_run import DryRun
    from neox_bridge.batches.row import BatchRow
    from neox_bridge.batches.run import Event

    Tell = Callable[[Event], None]


@contextmanager
def view(count: int, log: str | None, quiet: bool) -> Iterator["Tell"]:
    """Yields a callback for events, which any thread may call. count: number of checkpoints."""
    with ExitStack() as stack:
        listeners: list[Tell] = []
        if log is not None:
            # unbuffered, so that a failed write is not repeated when the file is closed
            file = None if log == "-" else stack.enter_context(open(log, "ab", buffering=0))
            listeners.append(_logger(file, log))
        if not quiet:
            on_terminal = sys.stderr.isatty()
            listeners.append(stack.enter_context(_bars(count)) if on_terminal else _lines(count))
        lock = threading.Lock()

        def tell(event: "Event") -> None:
            with lock:
                for listener in listeners:
                    listener(event)

        yield tell


def _logger(file: IO[bytes] | None, name: str) -> "Tell":
    """Writes events as JSON lines, to stdout by default.

    If the log cannot be written, it warns once and the batch continues.
    """
    failed = False

    def write(event: "Event") -> None:
        nonlocal failed
        if event.kind == "written" or failed:
            return
        entry: dict[str, Any] = {"time": round(time.time(), 3), "event": event.kind}
        entry |= {"name": event.name}
        if event.kind == "begun":
            entry["bytes"] = event.size
        if event.words:
            entry["error"] = event.words
        if event.row is not None:
            entry |= event.row.to_json()
        line = json.dumps(plain_data(entry, as_options), allow_nan=False)
        try:
            if file is None:
                print(line, flush=True)
            else:
                file.write(line.encode() + b"\n")
        except OSError as error:
            failed = True
            say("warning", f"{name}: {error.strerror}. The batch continues without this log.")

    return write


@dataclass
class _Whole:
    """The progress of a batch, computed from its events."""

    count: int
    sizes: list[int] = field(default_factory=list)
    ended: "list[BatchRow]" = field(default_factory=list)
    done: int = 0

    def add(self, event: "Event") -> None:
        if event.kind == "begun":
            self.sizes.append(event.size)
        elif event.kind == "written":
            self.done += event.size
        elif event.row is not None:
            self.ended.append(event.row)

    @property
    def total(self) -> float | None:
        """Total bytes. Checkpoints that are not planned yet are assumed to be of average size."""
        if not self.sizes:
            return None
        skipped = sum(row.status != "done" for row in self.ended)
        mean = sum(self.sizes) / len(self.sizes)
        return mean * max(len(self.sizes), self.count - skipped)

    @property
    def label(self) -> str:
        return f"{len(self.ended)} of {self.count}"


def _lines(count: int) -> "Tell":
    """Print on stderr each retry, each finished checkpoint, and how far the batch is now and then.

    Bytes count when they are written, and again when they are verified.
    """
    whole = _Whole(count)
    begun = printed = time.monotonic()

    def show(event: "Event") -> None:
        nonlocal printed
        whole.add(event)
        if event.kind == "retry":
            say("warning", f"{event.name} failed, retrying: {event.words}")
        elif event.row is not None:
            print(plain(f"{event.name}: {_became(event.row)}"), file=sys.stderr, flush=True)
        elif (now := time.monotonic()) - printed >= PROGRESS_SECONDS:
            printed = now
            line = line_of(whole.label, whole.done, whole.total, now - begun)
            print(line, file=sys.stderr, flush=True)

    return show


def _became(row: "BatchRow") -> str:
    if row.status == "done":
        return f"{human(row.size)} in {row.seconds:.1f} s"
    return "already converted, skipped" if row.status == "skipped" else row.status


@contextmanager
def _bars(count: int) -> Iterator["Tell"]:
    """One bar for the batch and one per checkpoint in progress, with rate and ETA."""
    with bars() as progress:
        whole = progress.add_task(f"0 of {count}", total=None)
        tasks: dict[str, Any] = {}
        state = _Whole(count)

        def show(event: "Event") -> None:
            state.add(event)
            if event.kind == "begun":
                if (old := tasks.pop(event.name, None)) is not None:
                    progress.remove_task(old)
                tasks[event.name] = progress.add_task(f"  {plain(event.name)}", total=event.size)
            elif event.kind == "written" and event.name in tasks:
                progress.advance(tasks[event.name], event.size)
                progress.advance(whole, event.size)
            elif event.row is not None:
                if (task := tasks.pop(event.name, None)) is not None:
                    progress.remove_task(task)
                if event.row.status == "failed":
                    say("error", f"{event.name}: {event.row.error}")
            progress.update(whole, total=state.total, description=state.label)

        yield show


def print_rows(rows: "Sequence[BatchRow]") -> None:
    """Print the final table and a summary line on stdout."""
    width = _width(rows)
    print_line(_head(width, "seconds", "rate"))
    for row in rows:
        rate = f"{human(row.size / row.seconds)}/s" if row.status == "done" else ""
        took = f"{row.seconds:.1f}" if row.status == "done" else ""
        print_line(_cells(width, row, took, rate))
    done = [row for row in rows if row.status == "done"]
    counts = [
        f"{number} {status}"
        for status in ("done", "skipped", "failed")
        if (number := sum(row.status == status for row in rows))
    ]
    words = f"; {_verified(done)}" if done and all(row.verified for row in done) else ""
    print_line(
        f"{plural(len(rows), 'checkpoint')}: {', '.join(counts) or 'none'}; "
        f"{human(sum(row.size for row in done))} written{words}"
    )


def tell_warnings(rows: "Iterable[BatchRow]") -> None:
    """Print each warning of the rows, and which files are not copied, once on stderr."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for finding in row.findings:
            if finding.severity != "info":
                names.setdefault((finding.severity, with_remedy(finding)), []).append(row.name)
        if row.not_carried:
            names.setdefault(("note", not_copied(row.not_carried)), []).append(row.name)
    for (word, text), where in names.items():
        say(word, f"{some(where, 1)}: {text}")


def _verified(rows: "Sequence[BatchRow]") -> str:
    """In which way the results equal their sources, in words."""
    from neox_bridge.planning.casts import verified

    pairs = {(cast.source, cast.target): cast for row in rows for cast in row.casts}
    return verified(pairs.values())


def print_dry_run(preview: "DryRun") -> None:
    """Print the preview of a batch."""
    width = _width(preview.rows)
    print_line(_head(width, "", ""))
    for row in preview.rows:
        print_line(_cells(width, row, "", ""))
    planned = sum(row.status == "planned" for row in preview.rows)
    line = f"{plural(planned, 'checkpoint')} to convert, {human(preview.size)}"
    if preview.seconds is not None and preview.rate is not None:
        line += f"; about {_long(preview.seconds)} at {human(preview.rate)}/s, measured on a sample"
    print_line(line)


def _width(rows: "Sequence[BatchRow]") -> int:
    """The width of the first column in characters."""
    return max([24, *(len(plain(row.name)) + 1 for row in rows)])


def _head(width: int, *more: str) -> str:
    cells = f"{'checkpoint':<{width}}{'':<9}{'files':>6}{'bytes':>10}{'shared':>8}"
    return (cells + "".join(f"{word:>10}" for word in more)).rstrip()


def _cells(width: int, row: "BatchRow", *more: str) -> str:
    shared = f"{row.shared / row.size:.0%}" if row.status == "done" and row.size else ""
    cells = (
        f"{plain(row.name):<{width}}{row.status:<9}{row.files:>6,}{human(row.size):>10}{shared:>8}"
    )
    return (cells + "".join(f"{word:>10}" for word in more)).rstrip()


def _long(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
