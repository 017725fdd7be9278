"""A target folder on a local disk: written next to its final path, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from neox_bridge.execution.flushing import flush_folders
from neox_bridge.execution.install import LATEST, RootFiles, clear, install, settle
from neox_bridge.execution.journal import Written, append, begun, resume
from neox_bridge.execution.movers import can_share, write
from neox_bridge.execution.output import DiskWriter, new_file
from neox_bridge.execution.sink import Check, Job
from neox_bridge.execution.staging import (
    check_free,
    check_replaceable,
    check_room,
    check_target,
    left_over,
    replaced_by,
    staged,
)
from neox_bridge.execution.work import Work
from neox_bridge.findings import Finding
from neox_bridge.planning.report import copied
from neox_bridge.stores.fetched import keeping, range_folder
from neox_bridge.stores.paths import is_local
from neox_bridge.tensors.pieces import OutputFile

_ATTEMPTS = "attempts-"  # one per run, so that leftovers of an earlier run cannot write into it


class DiskSink:
    """A ``Sink``. Errors of the file system become BridgeErrors."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.findings: tuple[Finding, ...] = ()
        self.work: Work
        self._real = os.path.realpath(job.target)
        self._root_files: RootFiles | None = None

    @contextmanager
    def opened(self) -> Iterator[bool]:
        job = self.job
        sizes = {path: identity[0] for path, identity in job.key.sources.items()}
        check_target(job.target, sizes, job.step, in_place=job.in_place)
        self._check_replaceable()
        with staged(job.target, job.plan.size) as self.work:
            resumes = begun(self.work, job.key)
            if settle(self.work, self._real) and resumes:
                yield True
                return
            if not (job.overwrite or job.in_place):
                check_free(job.target, job.step)
            self._look_at_root(overwrite=job.overwrite)
            planned = {file.path: file.size for file in self.files()}
            job.done.update(resume(self.work, job.key, planned, job.context, planned))
            missing = job.plan.size - sum(written.size for written in job.done.values())
            check_room(job.target, missing, self._shared)
            for folder in sorted({os.path.dirname(file.path) for file in job.plan.files}):
                os.makedirs(os.path.join(self.work.files, folder), exist_ok=True)
            with keeping(range_folder(self.work.folder, sizes, job.plan.size), sizes):
                yield False

    def files(self) -> list[OutputFile]:
        return [file for file in self.job.plan.files if not file.seals]

    def write(self, files: Sequence[OutputFile], workers: int) -> None:
        self._writer("").write_in_threads(files, self.job.context, workers, self.enter)

    def writer(self) -> DiskWriter:
        for name in os.listdir(self.work.folder):
            if name.startswith(_ATTEMPTS):  # left by a run that was killed
                shutil.rmtree(os.path.join(self.work.folder, name), ignore_errors=True)
        attempts = os.path.join(self.work.folder, f"{_ATTEMPTS}{uuid.uuid4().hex}")
        os.mkdir(attempts)
        return self._writer(attempts)

    def enter(self, files: Sequence[tuple[str, Written]]) -> None:
        append(self.work, files)
        self.job.done.update(files)

    def lost(self) -> list[OutputFile]:
        return []

    def seal(self) -> None:
        for file, data in self.job.records(self.job.done, self._place):
            with new_file(self._place(file.path)) as fd:
                write(fd, data, 0)
                os.fsync(fd)
            self.job.context.wrote(file.size, "copied")
        flush_folders(self.work.files)

    def verify(self, check: Check | None) -> None:
        if check is not None:
            check(self.work.files)

    def publish(self) -> None:
        if self._root_files is not None:
            self._look_at_root(overwrite=True)
        self._check_replaceable()  # files that were added in the meantime
        if self._root_files is not None:
            _arrange(self.work, self._root_files)
            self.findings += self._root_files.findings
        replace = self.job.overwrite or self.job.in_place
        install(self.work, self._real, self._root_files, replace=replace)

    def clear(self) -> None:
        if reason := clear(self.work):
            self.findings += (left_over(self.work.folder, reason),)

    def _place(self, path: str) -> str:
        return os.path.join(self.work.files, path)

    def _shared(self) -> int:
        """Estimate how many bytes will share blocks with the source files."""
        sources = self.job.key.sources
        largest = max(sources, key=lambda path: sources[path][0], default=None)
        if largest is None or not is_local(largest):
            return 0
        if not can_share(largest, self.work.folder, self.job.context):
            return 0
        return sum(copied(tensor) for file in self.job.plan.files for tensor in file.tensors)

    def _writer(self, attempts: str) -> DiskWriter:
        job = self.job
        hashing = job.key.hash, job.hash_shared
        return DiskWriter(self.work.files, attempts, job.context.every_crc, *hashing)

    def _check_replaceable(self) -> None:
        if self.job.overwrite and not self.job.in_place:
            planned = {file.path for file in self.job.plan.files}
            check_replaceable(self.job.target, self.job.step, planned)

    def _look_at_root(self, *, overwrite: bool) -> None:
        """Decide which files are written to the root if the target is an existing run."""
        step = self.job.step
        if step is None or replaced_by(self._real, step) == self._real:
            self._root_files = None
        elif self.job.in_place:
            self._root_files = RootFiles(step)
        else:
            from neox_bridge.execution.run_root import root_files

            self._root_files = root_files(self.job.plan, self._real, step, overwrite=overwrite)


def _arrange(work: Work, root_files: RootFiles) -> None:
    """Rename finished files in the root of a run to their final names; delete the others."""
    for name in os.listdir(work.files):
        if name in (root_files.step, *LATEST):
            continue
        path = os.path.join(work.files, name)
        if name not in root_files.names:
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        elif root_files.names[name] != name:
            os.rename(path, os.path.join(work.files, root_files.names[name]))
