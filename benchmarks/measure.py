"""Runs commands and says what each took: seconds, anonymous memory, bytes written, disk blocks."""

import json
import os
import select
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from places import Place, settle

POLL_MS = 5


class Failed(Exception):
    """A command ended otherwise than expected; the text names it and ends with its last line."""


@dataclass(frozen=True, slots=True)
class Run:
    """seconds: wall time. cpu: seconds of processor, all threads. memory: bytes, the most that was
    anonymous (RssAnon, looked at every 5 ms). written: bytes that the process made dirty in the
    page cache. blocks: bytes of disk that its output took and shares with nothing. executing:
    seconds that a conversion by this tool counts itself, once it is planned; 0 for other programs.
    """

    seconds: float
    cpu: float
    memory: int
    written: int
    blocks: int = 0
    executing: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """A command that writes a folder, or compares and writes none.

    who: whose program it is, "cp", "tool" or "other". expected: its exit code.
    flush: whether its files are flushed by this process, on its time, as the tool does by itself.
    """

    title: str
    who: str
    command: tuple[str, ...]
    source: Path
    target: Path | None = None
    flush: bool = False
    expected: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """rounds: the runs of each round; most jobs run once in one."""

    title: str
    who: str
    rounds: tuple[tuple[Run, ...], ...]

    @property
    def seconds(self) -> list[float]:
        return [run.seconds for runs in self.rounds for run in runs]

    def most(self, name: str) -> int:
        """The largest of a field over all runs."""
        return max(int(getattr(run, name)) for runs in self.rounds for run in runs)

    def middle(self, name: str) -> float:
        """The median of a field over all runs."""
        return statistics.median(float(getattr(run, name)) for runs in self.rounds for run in runs)

    def times(self, base: "Row") -> list[float]:
        """Its seconds as ratios to another row's, round by round."""
        return [
            statistics.median(run.seconds for run in mine)
            / statistics.median(run.seconds for run in theirs)
            for mine, theirs in zip(self.rounds, base.rounds, strict=True)
        ]


def run(
    command: Sequence[str],
    *,
    expected: int = 0,
    environment: Mapping[str, str] | None = None,
    flush: Path | None = None,
) -> Run:
    """One run of a command, start-up included. Raises Failed where it ends with another code."""
    with tempfile.TemporaryFile() as result, tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=result,
            stderr=said,
            env={**os.environ, **(environment or {})},
        )
        try:
            memory = _watch(process.pid)
        except BaseException:
            process.kill()
            process.wait()  # what it has open can't be unmounted
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if flush is not None:
            for path in _files(flush):
                _fsync(path)
        seconds = time.perf_counter() - start
        if process.returncode != expected:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or ["nothing said"]
            raise Failed(f"{' '.join(command)}: exit {process.returncode}, {lines[-1]}")
        result.seek(0)
        executing = json.load(result)["result"]["seconds"] if "--json" in command else 0.0
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu, memory, usage.ru_oublock * 512, executing=executing)


def run_job(job: Job, place: Place, aside: Path | None = None) -> Run:
    """One run with a warm cache and a quiet disk; what it wrote stays until the next.

    aside: as in ``discard``.
    """
    if job.target is not None:
        discard(job.target, aside)
    settle(place.folder)
    _warm(job.source)
    before = place.free()
    done = run(
        job.command,
        expected=job.expected,
        environment=job.environment,
        flush=job.target if job.flush else None,
    )
    if job.target is None:
        return done
    settle(place.folder)
    return replace(done, blocks=place.taken(before, job.target))


def discard(folder: Path, aside: Path | None) -> None:
    """Remove what a run wrote; or keep it in another folder, for the end.

    An ext4 without a journal doesn't use an inode again for some minutes, and looks at all of
    those when it creates a file: after thousands were removed that takes 0.5 ms, and not 0.03.
    """
    if aside is None:
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        aside.mkdir(exist_ok=True)
        folder.rename(aside / str(len(list(aside.iterdir()))))


def rounds(
    jobs: Sequence[Job],
    bases: Sequence[Job],
    runs: int,
    place: Place,
    aside: Path | None = None,
) -> tuple[list[Row], list[str]]:
    """Every job once a round, the bases twice; each round begins elsewhere in the list.

    Also gives what was skipped: those of others' programs that fail. aside: as in ``discard``.
    """
    found: dict[str, list[list[Run]]] = {job.title: [] for job in (*bases, *jobs)}
    skipped: dict[str, str] = {}
    for number in range(runs):
        first = number * len(jobs) // runs
        turn = [*jobs[first:], *jobs[:first]]
        half = (len(turn) + 1) // 2
        for taken in found.values():
            taken.append([])
        for job in (*bases, *turn[:half], *bases, *turn[half:]):
            if job.title in skipped:
                continue
            try:
                found[job.title][-1].append(run_job(job, place, aside))
            except Failed as error:
                if job.who != "other":
                    raise
                skipped[job.title] = f"{job.title}: {error}"
    rows = [
        Row(job.title, job.who, tuple(map(tuple, found[job.title])))
        for job in (*bases, *jobs)
        if job.title not in skipped
    ]
    return rows, list(skipped.values())


def _watch(pid: int) -> int:
    """The most anonymous memory, in bytes, that a process had until it ended."""
    most = 0
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        while not poll.poll(POLL_MS):
            try:
                with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
                    _, found, rest = file.read(8192).partition(b"RssAnon:")
            except OSError:
                continue
            if found:
                most = max(most, int(rest.split(maxsplit=1)[0]) << 10)
    finally:
        os.close(ended)
    return most


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _warm(source: Path) -> None:
    """Read all of a source, so that every run finds it in memory."""
    buffer = bytearray(1 << 20)
    for path in [source] if source.is_file() else _files(source):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
