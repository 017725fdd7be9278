"""The program that exports saved steps: ``python -m neox_bridge.training.exporter SAVE TARGET``.

It reads the iterations to export from stdin, one a line. It never stops a training: whatever fails
is logged and tried again, and the next run exports what is still left when it ends.
"""

import argparse
import fcntl
import os
import queue
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory

from neox_bridge.errors import BridgeError, DiskFull
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.stores import paths
from neox_bridge.stores.store import PART_BYTES
from neox_bridge.training import nodes
from neox_bridge.training.disk_space import Watch, bytes_below, free_bytes
from neox_bridge.training.exports import END, Exports, StepGone, owner_line
from neox_bridge.training.log_file import LogFile
from neox_bridge.training.saved_steps import latest, steps

RETRY_SECONDS = (10.0, 60.0, 300.0)  # before each further try
_NICENESS = 10
_WORKERS = 2  # threads, so that the trainer's data loaders keep their cores
_PUSHED = ".neox_bridge_push_"  # the start of the name of a folder that is being pushed
_REMOVED = ".removed"  # the end of the name of a folder that is being removed
Say = Callable[[str], None]


@dataclass
class Pending:
    """A step to export.

    Attributes:
        save_id: See ``Journal``.
        tries: How often it failed.
        due: When to try it, as a time of ``time.monotonic``.
        converted: Whether only the push is left.
        needed: While the training goes on, it waits until so many bytes are free.
    """

    iteration: int
    save_id: str = ""
    tries: int = 0
    due: float = 0.0
    converted: bool = False
    needed: int = 0


def convert_step(
    exports: Exports, iteration: int, is_over: Callable[[], bool] = lambda: True
) -> str:
    """Convert one step and verify it. Returns the folder.

    A folder of that name is replaced: a run that went back saves the same iterations again. If the
    nodes have parts of the step, those are uploaded first; only the first node converts.

    Args:
        is_over: Whether the training has ended, so that it needs no more disk space.

    Raises:
        StepGone: The step was removed before or while it was read, or saved again.
        DiskFull: The disk has no space for it, or only what the next checkpoint needs.
        BridgeError: The step cannot be converted. Also other errors: see ``run``.
    """
    from neox_bridge.api import convert

    if exports.node:
        return nodes.upload_step(exports, iteration)
    target = os.path.join(exports.target, f"step{iteration}")
    if exports.nodes > 1:
        source = nodes.collect_step(exports, iteration)
        convert(source, target, to="hf", overwrite=True, workers=_WORKERS)
        return target
    source = exports.step(iteration)
    try:
        if not os.path.isdir(source):
            raise StepGone
        watch = Watch(exports, source, is_over)
        convert(source, target, to="hf", overwrite=True, workers=_WORKERS, progress=watch)
    except BaseException as error:
        if exports.is_local:  # the training needs the disk space more than a further try
            work = os.path.join(exports.target, f".step{iteration}.neox-bridge")
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(f"{target}.unverified", ignore_errors=True)
        if not os.path.isdir(source):
            raise StepGone from error
        if isinstance(error, DiskFull):
            advice = "The partial files were removed. Free some space."
            raise DiskFull(error.reason, advice, error.needed) from error
        raise
    return target


def push_step(exports: Exports, iteration: int) -> str:
    """Push an exported step to the branch ``stepN`` of the repository. Returns the URL."""
    from neox_bridge.api import publish

    folder = os.path.join(exports.target, f"step{iteration}")
    branch = f"hf://{exports.repository}@step{iteration}"
    if exports.is_local:
        return publish(folder, branch, overwrite=True).url
    with TemporaryDirectory(prefix=_PUSHED, dir=exports.save) as copy:
        _download(folder, copy, bytes_below([exports.step(iteration)]))
        return publish(copy, branch, overwrite=True).url


def _download(url: str, folder: str, reserved: int) -> None:
    """Copy an exported step to a disk, as the Hub takes files of a disk only.

    reserved: bytes that stay free for the next checkpoint. Raises DiskFull.
    """
    from neox_bridge.stores.objects import below, fetch

    objects = below(url)
    needed = sum(state.size for state in objects.values()) + reserved
    if (free := free_bytes(folder)) < needed:
        raise DiskFull(
            f"{os.path.dirname(folder)} has {free:,} free bytes, but a copy of {url} and the next "
            f"checkpoint need {needed:,}.",
            "Free some space.",
            needed,
        )
    for place, state in objects.items():
        path = os.path.join(folder, place[len(url) + 1 :])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            for start in range(0, state.size, PART_BYTES):
                file.write(fetch(place, start, min(start + PART_BYTES, state.size)))


def remove_old(exports: Exports, own: Iterable[int], kept: Collection[int] = ()) -> None:
    """Remove the oldest exported steps, so that ``keep`` are left.

    own: the steps that this run has exported, in the order in which it saved them. A run that went
    back saves lower numbers later. kept: steps that must not be removed yet.
    """
    if not exports.keep:
        return
    names = paths.listdir(exports.target)
    steps = [
        iteration
        for iteration in own
        if f"step{iteration}" in names
        and paths.exists(os.path.join(exports.target, f"step{iteration}", RECORD))
    ]
    for iteration in steps[: -exports.keep]:
        if iteration not in kept:
            _remove(exports.target, f"step{iteration}")
    for name in names:
        if name.startswith(".step") and name.endswith(_REMOVED):  # of a killed process
            shutil.rmtree(os.path.join(exports.target, name), ignore_errors=True)


def _remove(target: str, name: str) -> None:
    """Remove an exported step, so that no part of it ever looks like a whole one."""
    folder = os.path.join(target, name)
    if paths.is_local(target):
        removed = os.path.join(target, f".{name}{_REMOVED}")
        os.rename(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)
        return
    from neox_bridge.stores.objects import below, remove

    remove([f"{folder}/{RECORD}"])
    remove(below(folder))


def run(
    exports: Exports,
    lines: Iterable[str],
    say: Say,
    convert: Callable[[Exports, int], str] | None = None,
    push: Callable[[Exports, int], str] = push_step,
) -> bool:
    """Export the steps that an earlier run left, and those of ``lines``, until all are settled.

    The newest step is first, because GPT-NeoX removes the oldest. A step that fails is tried again
    after RETRY_SECONDS each, and on a full disk not before there is space or the training has
    ended. An error of any kind counts as a failure: the process must go on with the next step.

    Returns:
        Whether no step failed for good.
    """
    journal = Journal(exports.journal, say)
    incoming: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()

    is_over = threading.Event()
    convert = convert or partial(convert_step, is_over=is_over.is_set)
    pending = [Pending(iteration, save_id) for iteration, save_id in journal.left(exports).items()]

    def read() -> None:
        """Note each step at once, as a conversion takes long and may be killed."""
        try:
            for line in lines:
                if line.strip() == END:
                    break
                if not line.strip().isdigit():
                    continue
                step = Pending(int(line))
                if exports.nodes == 1:  # otherwise, the trainer has noted it
                    step.save_id = uuid.uuid4().hex
                    journal.note("saved", step.iteration, step.save_id)
                incoming.put(step)
        finally:
            is_over.set()
            incoming.put(None)

    threading.Thread(target=read, daemon=True).start()
    if pending:
        say(f"steps left by an earlier run: {', '.join(str(p.iteration) for p in pending)}")
    is_open, failed = True, False
    while is_open or pending:
        step = min(pending, key=lambda p: (p.due, -p.iteration), default=None)
        seconds = None if step is None else max(0.0, step.due - time.monotonic())
        if is_open and (seconds != 0.0 or not incoming.empty()):
            with suppress(queue.Empty):
                saved = incoming.get(timeout=seconds)
                if saved is None:
                    is_open = False
                    for p in pending:
                        p.due = 0.0 if p.needed else p.due
                    continue
                if exports.nodes > 1 and saved.iteration not in journal.left(exports):
                    continue
                pending = [p for p in pending if p.iteration != saved.iteration]
                pending.append(saved)
            continue
        assert step is not None
        time.sleep(seconds or 0.0)
        if is_open and not _has_space(exports, step):
            step.due = time.monotonic() + RETRY_SECONDS[0]
            continue
        pending.remove(step)
        saving = exports
        try:
            if exports.nodes > 1:
                saving = nodes.with_last_save(exports, step.iteration)
                step.save_id = saving.saved.id
            _export(saving, step, say, journal, convert, push)
            if not exports.node:
                unpushed = {p.iteration for p in pending if p.converted}
                remove_old(exports, journal.own(), unpushed)
        except StepGone as gone:
            say(f"step {step.iteration} {gone}, skipped")
        except Exception as error:  # also a bug: it must not end the exports of a long run
            text = str(error) or type(error).__name__
            if step.tries == len(RETRY_SECONDS):
                failed = True
                say(f"step {step.iteration} failed: {text} The next run tries again")
                continue
            seconds = RETRY_SECONDS[step.tries]
            step.needed = error.needed if isinstance(error, DiskFull) else 0
            when = "once there is space" if step.needed and is_open else f"in {seconds:g} s"
            say(f"step {step.iteration} failed: {text} Retry {when}")
            step.tries, step.due = step.tries + 1, time.monotonic() + seconds
            pending.append(step)
            continue
        journal.note("done", step.iteration, step.save_id)
        if exports.nodes > 1 and not exports.node:
            with suppress(Exception):  # the next one removes them
                nodes.remove_parts(exports, journal.left(exports))
    return not failed


def _has_space(exports: Exports, step: Pending) -> bool:
    """Whether a try makes sense, as far as the free space is known."""
    with suppress(OSError):
        return free_bytes(exports.home) >= step.needed
    return True


def _export(
    exports: Exports,
    step: Pending,
    say: Say,
    journal: "Journal",
    convert: Callable[[Exports, int], str],
    push: Callable[[Exports, int], str],
) -> None:
    if not step.converted:
        if not exports.node:
            journal.claim(exports, step.iteration)
        start = time.monotonic()
        folder = convert(exports, step.iteration)
        seconds = time.monotonic() - start
        if exports.node:
            say(f"step {step.iteration}: the files of this node are in {folder} ({seconds:.1f} s)")
            return
        say(f"step {step.iteration} exported to {folder} and verified in {seconds:.1f} s")
        step.converted = True
    if exports.repository:
        say(f"step {step.iteration} pushed to {push(exports, step.iteration)}")


def _is_taken(folder: str) -> bool:
    if paths.is_local(folder):
        return os.path.lexists(folder)
    from neox_bridge.stores.objects import below

    return bool(below(folder))  # an emptied folder may still exist


class Journal:
    """Which steps were saved and which are done, in a file that survives a crash.

    A line is a word and an iteration: ``saved``, ``done``, ``own`` for a step whose folder in the
    target this run has created, or ``after`` for the last step that the run had when its exports
    began. ``saved`` and ``done`` have an id of the save too. If several nodes have a ``save`` of
    their own, the trainer writes ``saved``, with the fingerprint of the save. The first line names
    the ``save``: see ``exports.owner_line``.
    """

    def __init__(self, path: str, say: Say) -> None:
        self.path, self._say = path, say
        self._file = LogFile(path)
        self._lock = threading.Lock()
        self._own: set[int] = set()
        self._saved: dict[int, str | None] = {}  # the id of each last save; None if it is done

    def left(self, exports: Exports) -> dict[int, str]:
        """The iterations that were saved and are not done, in order, with the ids of the saves.

        These include steps that are later than the last in the journal: the process was killed
        before it knew of them.
        """
        newest = latest(exports.save)
        if not os.path.exists(self.path):
            self._write(owner_line(exports.save))
            self.note("after", newest)
            return {}
        with open(self.path, encoding="ascii", errors="replace") as file:
            for line in file:
                word, number, save_id = (*line.split(), "", "", "")[:3]
                if number.lstrip("-").isdigit():
                    self._read(word, int(number), save_id)
        last = next(reversed(self._saved), newest)
        if exports.nodes > 1:  # a node has only its part of steps that it does not know
            last = newest
        for unknown in sorted(n for n in steps(exports.save) if last < n <= newest):
            if exports.is_due(unknown):
                self.note("saved", unknown, uuid.uuid4().hex)
        return {n: save_id for n, save_id in sorted(self._saved.items()) if save_id is not None}

    def _read(self, word: str, iteration: int, save_id: str) -> None:
        if word == "own":
            self._own.add(iteration)
        elif word == "saved":
            self._saved.pop(iteration, None)  # so that the last save is the last key
            self._saved[iteration] = save_id
        elif word == "after" or (word == "done" and save_id in ("", self._saved.get(iteration))):
            self._saved[iteration] = None  # not another save since

    def own(self) -> list[int]:
        """The steps that the run has exported, in the order of their last saves."""
        return [iteration for iteration in [*self._saved] if iteration in self._own]

    def claim(self, exports: Exports, iteration: int) -> None:
        """Note that this run creates the folder of a step.

        Raises BridgeError if the folder exists and was not created by this run.
        """
        if iteration in self._own:
            return
        folder = os.path.join(exports.target, f"step{iteration}")
        if _is_taken(folder):
            raise BridgeError(
                f"{folder} exists, and this run has not exported it. Move it away, or set save_hf "
                "to another folder."
            )
        self.note("own", iteration)

    def note(self, word: str, iteration: int, save_id: str = "") -> None:
        """Append a line. If the disk is full, say so. From any thread."""
        self._write(f"{word} {iteration} {save_id}".rstrip())
        self._read(word, iteration, save_id)

    def _write(self, line: str) -> None:
        with self._lock:
            error = self._file.append(line)
        if error:
            self._say(f"{self.path} cannot be written: {error}")


@contextmanager
def _alone(target: str, say: Say) -> Iterator[None]:
    """Wait until the exporter of an earlier run has ended, which still writes into this folder."""
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for the exports of an earlier run, which still writes into {target}")
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("save")
    parser.add_argument("target")
    parser.add_argument("--interval", type=int, default=0)
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("--push", default="")
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args()
    os.nice(_NICENESS)
    exports = Exports(
        options.save,
        options.target,
        options.interval,
        options.keep,
        options.push,
        options.node,
        options.nodes,
    )
    log = LogFile(exports.log)

    def say(text: str) -> None:
        line = f"neox-bridge: {text}"
        with suppress(OSError):  # the trainer's stderr may be closed
            print(line, file=sys.stderr, flush=True)
        log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    os.makedirs(exports.home, exist_ok=True)  # it may have been removed since the run started
    with _alone(exports.home, say):
        sys.exit(0 if run(exports, sys.stdin, say) else 1)


if __name__ == "__main__":
    main()
