"""What the executor asks of a place that a plan is written to: a disk or an object store."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import hash_file
from neox_bridge.execution.files import Identity
from neox_bridge.execution.journal import Key, Written
from neox_bridge.findings import Finding
from neox_bridge.layouts.seal import entries, sealed
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.pieces import OutputFile

Check = Callable[[str], None]  # compares the finished folder with its source


@dataclass(frozen=True, slots=True)
class Job:
    """One execution of a plan. Arguments of ``execute`` have their names.

    Attributes:
        key: What must be the same for a run that was stopped to be resumed.
        done: The finished files by path: those of an earlier run at first, all in the end.
    """

    plan: Plan
    target: str
    key: Key
    context: Context
    overwrite: bool = False
    in_place: bool = False
    hash_shared: bool = False
    done: dict[str, Written] = field(default_factory=dict)

    @property
    def step(self) -> str | None:
        """The folder of a GPT-NeoX plan that is added to a run."""
        step = self.plan.target.get("step")
        return step if isinstance(step, str) else None

    def missing(self, files: Sequence[OutputFile]) -> list[OutputFile]:
        """Those of these files that are still to be written, largest first; others are counted."""
        missing = []
        for file in sorted(files, key=lambda file: -file.size):
            if file.path in self.done:
                self.context.wrote(file.size, "kept")
            else:
                missing.append(file)
        return missing

    def records(
        self, done: Mapping[str, Written], place: Callable[[str], str]
    ) -> Iterator[tuple[OutputFile, bytes]]:
        """The files that say what the others are (``neox_bridge.json``), with their bytes.

        Args:
            done: The others.
            place: Gives the path or URL where a finished file of the plan lies now.
        """
        hash_name = self.key.hash
        for file in self.plan.files:
            if not file.seals:
                continue
            folder = os.path.dirname(file.path)
            files = dict(done)
            for path, written in done.items():
                # what is beside a step can be replaced later only where it is proved to be ours
                if folder and not path.startswith(f"{folder}/") and written.hash is None:
                    digest = hash_file(place(path), hash_name or "xxh3_128")
                    files[path] = Written(written.size, digest)
            yield (
                file,
                sealed(
                    file.literals[0][1],
                    hash_name or "none",
                    entries(folder, files),
                    plan=self.key.plan,
                    asked=self.plan.asked,
                    sources=recorded_sources(self.key.sources),
                ),
            )


class Writer(Protocol):
    """Writes whole files in any process of a pool, into which it is pickled."""

    @property
    def every_crc(self) -> bool: ...

    @property
    def folders(self) -> tuple[str, ...]:
        """Local folders that it writes into."""

    def write(self, files: Sequence[OutputFile], context: Context) -> list[tuple[str, Written]]:
        """Write these files, finished when this returns, or started anew by another attempt."""


class Sink(Protocol):
    """A place that a job's files are written to. The executor calls its methods in this order.

    Attributes:
        findings: What there is to say of the target beside the plan's own files.
    """

    job: Job
    findings: tuple[Finding, ...]

    def opened(self) -> AbstractContextManager[bool]:
        """Make the target this run's alone, and tell the job what an earlier run finished.

        Yields whether an earlier run had finished everything, so that only ``clear`` is left. An
        error in the block is raised again with words for what is kept.
        """

    def files(self) -> list[OutputFile]:
        """The files that are written by threads or a pool: the plan's, but for its records."""

    def write(self, files: Sequence[OutputFile], workers: int) -> None:
        """Write files by threads of this process, and enter each as finished."""

    def writer(self) -> Writer:
        """What processes of a pool write files with."""

    def enter(self, files: Sequence[tuple[str, Written]]) -> None:
        """Remember, for a run that resumes this one too, that a pool finished files."""

    def lost(self) -> list[OutputFile]:
        """The files that seemed to be finished and are not there: they are written again."""

    def seal(self) -> None:
        """Make the records of all files."""

    def verify(self, check: Check | None) -> None:
        """Have the target checked as it will be."""

    def publish(self) -> None:
        """Give the target its name, or the records that say that it is whole."""

    def clear(self) -> None:
        """Remove what was needed to resume only. Where that fails, ``findings`` say so."""


def recorded_sources(sources: Mapping[str, Identity]) -> list[list[object]]:
    """Name, size and time of each source, as a record keeps them: whatever folder they lie in."""
    return [
        list(facts)
        for facts in sorted((os.path.basename(path), *facts) for path, facts in sources.items())
    ]
