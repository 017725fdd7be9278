"""A journal of finished files: one line per file, written when the file is on disk.

It lets a conversion resume after it was killed. The first line identifies the plan and the sources.
Incomplete lines, and files that do not match their line, are ignored.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import STEP_BYTES, hash_file
from neox_bridge.execution.files import Identity
from neox_bridge.execution.work import Work
from neox_bridge.layouts.record_file import HashName


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file. hash: hexadecimal, or None if the file was not hashed."""

    size: int
    hash: str | None


@dataclass(frozen=True, slots=True)
class Key:
    """The facts that must be equal to resume a run. sources: the ``identities`` of the files."""

    plan: str
    sources: Mapping[str, Identity]
    hash: HashName | None

    def line(self) -> str:
        sources = {path: list(facts) for path, facts in sorted(self.sources.items())}
        return json.dumps({"plan": self.plan, "hash": self.hash, "sources": sources})


def begun(work: Work, key: Key) -> bool:
    """Whether an earlier run of this plan left files here."""
    with (
        contextlib.suppress(OSError),
        open(work.journal, encoding="utf-8", errors="replace") as file,
    ):
        return file.readline().rstrip("\n") == key.line()
    return False


def resume(
    work: Work,
    key: Key,
    planned: Collection[str],
    context: Context | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Written]:
    """Find the files that an earlier run finished, by path, and remove all others.

    Reads each file in a separate phase and compares it with its hash. Afterwards, the journal
    contains only these files.

    Args:
        work: The folder with the files.
        key: The facts that must be equal.
        planned: The paths of the plan. Other paths in the journal are ignored.
        context: Receives the reading progress.
        sizes: The file sizes of the plan. The size of a model card differs if the earlier run was
            verified and this one is not.
    """
    context = context or Context()
    finished = {
        path: entry
        for path, entry in _read(work.journal, key)
        if path in planned and (sizes is None or sizes[path] == entry.size)
    }
    hashed = {path: entry for path, entry in finished.items() if entry.hash is not None}
    if hashed:
        context.begin("checking", sum(entry.size for entry in hashed.values()))
    kept = {
        path: entry
        for path, entry in hashed.items()
        if key.hash and _whole(os.path.join(work.files, path), entry, key.hash, context)
    }
    if not kept:
        shutil.rmtree(work.files, ignore_errors=True)
    for folder, _, names in os.walk(work.files):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.relpath(path, work.files) not in kept:
                os.unlink(path)
    os.makedirs(work.files, exist_ok=True)
    fresh = f"{work.journal}.new"
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(key.line() + "\n")
        file.writelines(_line(path, written) for path, written in kept.items())
    os.replace(fresh, work.journal)
    return kept


def finished(work: Work) -> int:
    """The number of finished files that the next run can use."""
    with contextlib.suppress(OSError), open(work.journal, "rb") as file:
        return max(0, sum(1 for _ in file) - 1)
    return 0


def append(work: Work, files: Iterable[tuple[str, Written]]) -> None:
    """Record that files are on disk, in one write, so that lines of threads do not mix."""
    fd = os.open(work.journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(fd, "".join(_line(path, written) for path, written in files).encode())
    finally:
        os.close(fd)


def _line(path: str, written: Written) -> str:
    return json.dumps({"path": path, "size": written.size, "hash": written.hash}) + "\n"


def _read(journal: str, key: Key) -> Iterator[tuple[str, Written]]:
    """The entries, if the journal belongs to this plan."""
    try:
        with open(journal, encoding="utf-8", errors="replace") as file:
            first, *lines = file.read().splitlines() or [""]
    except OSError:
        return
    if first != key.line():
        return
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            yield entry["path"], Written(entry["size"], entry["hash"])


def _whole(path: str, written: Written, name: HashName, context: Context) -> bool:
    """Whether a file matches its line in the journal."""
    left = written.size

    def count() -> None:
        nonlocal left
        step = min(left, STEP_BYTES)
        left -= step
        context.read_again(step)

    try:
        if os.path.getsize(path) != written.size:
            return False
        return hash_file(path, name, count) == written.hash
    except OSError:
        return False
