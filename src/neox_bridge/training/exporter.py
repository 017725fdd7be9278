"""The program that exports saved steps: ``python -m neox_bridge.training.exporter SAVE TARGET``.

It reads the iterations to export from stdin, one a line. It never stops a training: whatever fails
is logged and tried again, and what is still left when it ends is exported by the next run.
"""

import argparse
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.training.exporting import LOG, Exports

JOURNAL = ".neox_bridge_exports"
WAITS_SECONDS = (10.0, 60.0, 300.0)  # before each further try
_NICENESS = 10
_WORKERS = 2  # threads, so that the trainer's data loaders keep their cores
_STEP = re.compile(r"step(\d+)")


@dataclass
class Pending:
    """A step to export. due: a time of time.monotonic()."""

    iteration: int
    tries: int = 0
    due: float = 0.0


def export(exports: Exports, iteration: int) -> str:
    """Export one step, and return what was done, as a part of a sentence.

    Raises BridgeError or OSError if it fails. A step that GPT-NeoX has removed is left out.
    """
    from neox_bridge.api import convert

    source = os.path.join(exports.save, f"global_step{iteration}")
    target = os.path.join(exports.target, f"step{iteration}")
    if os.path.exists(os.path.join(target, RECORD)):
        done = "was exported before"
    else:
        if not os.path.isdir(source):
            return "is gone (keep_last_n_checkpoints), so it is not exported"
        try:
            convert(source, target, to="hf", workers=_WORKERS)
        except (BridgeError, OSError):
            if not os.path.isdir(source):
                return "was removed while it was read (keep_last_n_checkpoints); not exported"
            raise
        done = f"exported to {target}, verified"
    if exports.repository:
        from neox_bridge.api import publish

        published = publish(target, f"hf://{exports.repository}@step{iteration}")
        done += f", pushed to {published.url}"
    _remove_old(exports)
    return done


def _remove_old(exports: Exports) -> None:
    """Remove the oldest exported steps, as many as are above ``keep``."""
    if not exports.keep:
        return
    steps = [
        (int(match[1]), name)
        for name in os.listdir(exports.target)
        if (match := _STEP.fullmatch(name))
        and os.path.exists(os.path.join(exports.target, name, RECORD))
    ]
    for _, name in sorted(steps)[: -exports.keep]:
        gone = os.path.join(exports.target, f".{name}.removed")
        os.rename(os.path.join(exports.target, name), gone)  # so that no half folder has its name
        shutil.rmtree(gone, ignore_errors=True)


def run(
    exports: Exports,
    iterations: Iterable[str],
    say: Callable[[str], None],
    export_step: Callable[[Exports, int], str] = export,
) -> bool:
    """Export every iteration, until there are no more and all were tried often enough.

    Returns:
        Whether all were exported.
    """
    journal = _Journal(os.path.join(exports.target, JOURNAL))
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in iterations:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    pending = [Pending(iteration) for iteration in journal.left()]
    if pending:
        say(f"{len(pending)} steps of an earlier run are exported now")
    more, failed = True, False
    while more or pending:
        now = time.monotonic()
        due = min((one.due for one in pending), default=None)
        wait = None if due is None else max(0.0, due - now)
        if more and (wait is None or wait > 0 or not lines.empty()):
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                continue
            if line is None:
                more = False
            elif line.strip().isdigit():
                iteration = int(line)
                journal.note("saved", iteration)
                pending = [one for one in pending if one.iteration != iteration]
                pending.append(Pending(iteration))
            continue
        one = min(pending, key=lambda entry: entry.due)
        if wait:
            time.sleep(wait)
        pending.remove(one)
        try:
            done = export_step(exports, one.iteration)
        except (BridgeError, OSError) as error:
            if one.tries == len(WAITS_SECONDS):
                failed = True
                say(f"step {one.iteration} is not exported: {error}. The next run tries again")
                continue
            seconds = WAITS_SECONDS[one.tries]
            say(f"step {one.iteration} could not be exported: {error}. Next try in {seconds:g} s")
            pending.append(Pending(one.iteration, one.tries + 1, time.monotonic() + seconds))
        else:
            journal.note("done", one.iteration)
            say(f"step {one.iteration} {done}")
    return not failed


class _Journal:
    """Which steps were saved and which are done, in a file that survives a crash."""

    def __init__(self, path: str) -> None:
        self.path = path

    def left(self) -> list[int]:
        """The iterations that were saved and are not done, in order."""
        if not os.path.exists(self.path):
            return []
        saved: dict[int, bool] = {}
        with open(self.path, encoding="ascii", errors="replace") as file:
            for line in file:
                word, _, number = line.strip().partition(" ")
                if number.isdigit() and word in ("saved", "done"):
                    saved[int(number)] = word == "done"
        return sorted(iteration for iteration, done in saved.items() if not done)

    def note(self, word: str, iteration: int) -> None:
        with open(self.path, "a", encoding="ascii") as file:
            file.write(f"{word} {iteration}\n")


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("save")
    parser.add_argument("target")
    parser.add_argument("--interval", type=int, default=0)
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("--push", default="")
    options = parser.parse_args()
    os.nice(_NICENESS)
    exports = Exports(options.save, options.target, options.interval, options.keep, options.push)
    log = os.path.join(exports.target, LOG)

    def say(text: str) -> None:
        line = f"neox-bridge: {text}"
        with suppress(OSError):  # the trainer's stderr may be closed
            print(line, file=sys.stderr, flush=True)
        with suppress(OSError), open(log, "a", encoding="utf-8") as file:  # the disk may be full
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    sys.exit(0 if run(exports, sys.stdin, say) else 1)


if __name__ == "__main__":
    main()
