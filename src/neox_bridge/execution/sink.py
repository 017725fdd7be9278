"""The interface of targets: a local disk or an object store."""

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
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.seal import entries, sealed
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.paths import states
from neox_bridge.tensors.pieces import OutputFile

Check = Callable[[str], None]  # raises Unverified if a finished folder differs from its source


@dataclass(frozen=True, slots=True)
class Job:
    """One execution of a plan. Arguments of ``execute`` have their names.

    Attributes:
        key: What must be equal to resume a stopped run.
        done: The finished files by path: initially those of an earlier run, finally all.
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
        """The files that must still be written, largest first. Finished ones are counted."""
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
        """The record files (``neox_bridge.json``), with their bytes.

        Args:
            done: The others.
            place: Returns the current path or URL of a finished file of the plan.
        """
        hash_name = self.key.hash
        for file in self.plan.files:
            if not file.seals:
                continue
            folder = os.path.dirname(file.path)
            files = dict(done)
            for path, written in done.items():
                # files in the root of a run may be replaced later only if the record proves that
                # they are unedited
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
                    options=self.plan.options,
                    sources=recorded_sources(self.key.sources),
                    texts=recorded_texts(self.plan.checkpoint),
                ),
            )


class Writer(Protocol):
    """Writes complete files in a process of a pool. It is pickled into the process."""

    @property
    def every_crc(self) -> bool: ...

    @property
    def folders(self) -> tuple[str, ...]:
        """Local folders that it writes into."""

    def write(self, files: Sequence[OutputFile], context: Context) -> list[tuple[str, Written]]:
        """Write these files. They are finished on return; otherwise another attempt starts over."""


class Sink(Protocol):
    """A target of a job. The executor calls the methods in this order.

    Attributes:
        findings: Findings about the target, besides those of the plan.
    """

    job: Job
    findings: tuple[Finding, ...]

    def opened(self) -> AbstractContextManager[bool]:
        """Lock the target for this run, and add the files that an earlier run finished to the job.

        Yields whether an earlier run finished everything, so that only ``clear`` is left. An error
        in the block is raised again with a note about what is kept.
        """

    def files(self) -> list[OutputFile]:
        """The files of the plan, except its records."""

    def write(self, files: Sequence[OutputFile], workers: int) -> None:
        """Write files in threads of this process, and enter each as finished."""

    def writer(self) -> Writer:
        """The writer for the processes of a pool."""

    def enter(self, files: Sequence[tuple[str, Written]]) -> None:
        """Record, also for a later run, that a pool finished files."""

    def lost(self) -> list[OutputFile]:
        """Finished files that are missing in the target. They are written again."""

    def seal(self) -> None:
        """Write the records of all files."""

    def verify(self, check: Check | None) -> None:
        """Check the target in its final form."""

    def publish(self) -> None:
        """Make the target visible: rename it, or write the records that mark it as complete."""

    def clear(self) -> None:
        """Delete the files for resuming. A failure becomes a finding."""


def recorded_sources(sources: Mapping[str, Identity]) -> list[list[object]]:
    """Name, size and time of each source as in a record, independent of the folder."""
    return [
        list(facts)
        for facts in sorted((os.path.basename(path), *facts) for path, facts in sources.items())
    ]


def recorded_texts(checkpoint: Checkpoint | None) -> list[list[str]]:
    """Name and hash of each small file of a source as in a record: settings, license, model card.

    Their content is in the plan, so they are not among the sources. Of an object, the tag.
    """
    if checkpoint is None:
        return []
    configs = [os.path.join(checkpoint.path, "config.json")]
    if checkpoint.neox is not None:
        configs = list(checkpoint.neox.configs)
    there = states([*checkpoint.carried.paths, *configs], missing_ok=True)
    return sorted(
        [os.path.basename(path), state.tag or hash_file(path, "xxh3_128")]
        for path, state in there.items()
    )
