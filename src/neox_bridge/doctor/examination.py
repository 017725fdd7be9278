"""Collects every verdict on a checkpoint in one document, for ``diagnose`` and ``doctor``."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from neox_bridge.doctor.compare import Row, compare
from neox_bridge.doctor.diagnose import KNOWN_HF, cannot_open, judge, judge_all, own_target
from neox_bridge.doctor.judge_repository import judge_repository
from neox_bridge.doctor.repository import Repository, read_repository
from neox_bridge.doctor.repository_settings import judge_settings, own_settings
from neox_bridge.doctor.verdict import Case, Verdict, verdict
from neox_bridge.documents import document, plain_data
from neox_bridge.errors import BridgeError, ChoiceNeeded, NotOfFamily, Refused, UsageError
from neox_bridge.findings import Command, Finding, finding_json, unrepeated
from neox_bridge.frameworks.targets import Target, name_of, target_named, words_for
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.folder_kinds import ForeignFolder
from neox_bridge.layouts.head import drop_equal_head
from neox_bridge.layouts.open import Place, find_place
from neox_bridge.layouts.open_stored import is_repository
from neox_bridge.stores.paths import is_local

ReadBy = Literal["names", "family"]
# errors of files that can be read, but not as a checkpoint of a family
_READABLE = (Refused, ForeignFolder, NotOfFamily)
_ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True, slots=True)
class Examination:
    """What is known about a checkpoint, and where it loads.

    Attributes:
        source: The checkpoint as the caller named it.
        path: The absolute path, or the URL.
        kind: "hf" or "neox".
        main: The verdict whose findings are shown: for the named target, or for the version that
            the checkpoint seems to be made for.
        verdicts: One for the named target, or one for each known version.
        named: Whether the caller named a target.
        comparison: How both frameworks compute this model, if that was asked for.
        read_by: Whether the knowledge of a family was used, or only names, shapes and settings.
        family: The name of the family; "" if none was used.
        error: Why no command can read the checkpoint, if its files are damaged or missing.
    """

    source: str
    path: str
    kind: str
    main: Verdict
    verdicts: tuple[Verdict, ...]
    named: bool = False
    comparison: tuple[Row, ...] | None = None
    read_by: ReadBy = "family"
    family: str = ""
    error: BridgeError | None = None

    @property
    def loads(self) -> bool:
        """Whether the named target, or any known version, loads it."""
        return any(verdict.answer != "fails" for verdict in self.verdicts)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings, most severe first."""
        return tuple(case.finding for case in by_severity(self.main))

    def to_json(self) -> dict[str, Any]:
        """The document that ``doctor --json`` prints."""
        return document(paths=[self.source], checkpoints=[self.facts()])

    def facts(self) -> dict[str, Any]:
        """The facts about the checkpoint in the document."""
        verdicts = [_verdict_facts(verdict) for verdict in self.verdicts]
        if self.named:
            for entry in verdicts:
                entry.pop("findings")
        facts = {
            "path": self.path,
            "kind": self.kind,
            "read_by": self.read_by,
            "loads": self.loads,
            "findings": _verdict_facts(self.main)["findings"],
            "verdicts": verdicts,
        }
        if self.comparison is not None:
            facts["comparison"] = plain_data(self.comparison)
        return facts


def examine_path(
    source: str,
    open_it: Callable[[str], Checkpoint],
    target: Target | None = None,
    *,
    with_comparison: bool = False,
) -> Examination:
    """Examine a checkpoint by its path, or a Hugging Face repository of any family.

    Args:
        source: A folder, a model of the Hub or its URL.
        open_it: Opens the checkpoint.
        target: As of ``examine``.
        with_comparison: As of ``examine``.

    Raises:
        BridgeError: It cannot be opened, and its files do not show more than the error says.
    """
    try:
        checkpoint = open_it(source)
    except (UsageError, ChoiceNeeded):
        raise
    except BridgeError as error:
        examination = _examine_unopened(source, target)
        if examination is None and not with_comparison:
            examination = _examine_files(source, error, target)
        if examination is None:
            raise
        return examination
    return examine(checkpoint, target, with_comparison=with_comparison)


def examine(
    checkpoint: Checkpoint, target: Target | None = None, *, with_comparison: bool = False
) -> Examination:
    """Judge a checkpoint for a target, or for every known version.

    with_comparison: also show how both frameworks compute this model.
    """
    checkpoint = drop_equal_head(checkpoint)  # compared once, not for every target
    checkpoint = _with_file_findings(checkpoint)
    main = judge(checkpoint, target or own_target(checkpoint))
    return Examination(
        checkpoint.source or checkpoint.path,
        checkpoint.path,
        checkpoint.kind,
        main,
        (main,) if target is not None else tuple(judge_all(checkpoint)),
        target is not None,
        tuple(compare(checkpoint)) if with_comparison else None,
        family=checkpoint.architecture.name,
    )


def _with_file_findings(checkpoint: Checkpoint) -> Checkpoint:
    """Add what the files show beside the model of a family. None of it prevents loading."""
    if checkpoint.kind != "hf" or not is_local(checkpoint.path):
        return checkpoint
    if not os.path.isfile(os.path.join(checkpoint.path, "config.json")):
        return checkpoint  # the files of Meta
    repository = read_repository(checkpoint.path, "", checkpoint.revision)
    kept = [one for one in checkpoint.findings if one not in checkpoint.index_findings]
    findings = [*repository.damage, *repository.findings, *own_settings(repository)]
    more = [
        replace(finding, severity="warning") if finding.severity == "error" else finding
        for finding in unrepeated(findings, kept)
    ]
    return replace(checkpoint, findings=(*kept, *more))


def _examine_unopened(path: str, target: Target | None) -> Examination | None:
    """Examine a GPT-NeoX folder that cannot be opened; None if nothing is known about it."""
    case = cannot_open(path)
    if case is None:
        return None
    name = name_of(target) if target is not None else "any GPT-NeoX"
    main = verdict(name, [case], words_for(target) if target is not None else name)
    return Examination(path, os.path.abspath(path), "neox", main, (main,), target is not None)


def repository_at(source: str, error: BridgeError | None = None) -> Repository | None:
    """Read the files of a Hugging Face repository; None if they do not show more than an error.

    error: why it cannot be opened as a checkpoint of a family; None if it can.
    """
    place = _place(source)
    if place is None or not is_repository(place.path, error):
        return None
    is_readable = error is None or isinstance(error, _READABLE)
    reason = str(error) if error is not None and is_readable else ""
    repository = read_repository(place.path, reason, place.revision)
    if not repository.damage and not (is_readable and repository.model.components):
        return None
    return repository


def _examine_files(source: str, error: BridgeError, target: Target | None) -> Examination | None:
    """Examine a repository by its files; None if they do not show more than the error."""
    repository = repository_at(source, error)
    if repository is None:
        return None
    findings = [*repository.findings, *judge_settings(repository), *own_settings(repository)]
    targets = [target] if target is not None else [target_named(name) for name in KNOWN_HF]
    verdicts = tuple(judge_repository(repository, findings, one) for one in targets)
    if repository.damage and isinstance(error, _READABLE):
        error = _unreadable(repository)
    return Examination(
        source,
        repository.model.path,
        "hf",
        verdicts[-1],
        verdicts,
        target is not None,
        read_by="names",
        error=error if repository.damage else None,
    )


def _place(source: str) -> Place | None:
    try:
        return find_place(source, None, None, by_ranges=True)
    except BridgeError:
        return None


def _unreadable(repository: Repository) -> BridgeError:
    """The error of a repository of no known family whose files are damaged or missing."""
    first, *others = repository.damage
    more = f", and {len(others)} more" if others else ""
    return BridgeError(f"{repository.model.path} cannot be read: {first.message}{more}.")


def by_severity(verdict: Verdict) -> list[Case]:
    """The cases of a verdict, most severe first."""
    return sorted(verdict.cases, key=lambda case: _ORDER[case.finding.severity])


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "target": verdict.target,
        "framework": verdict.framework,
        "verdict": verdict.answer,
        "message": verdict.message or None,
        "findings": [
            {
                **finding_json(case.finding),
                "command": case.finding.remedy if isinstance(case.finding.remedy, Command) else "",
                **plain_data(case.finding.details),
                "prints": case.prints or None,
                "silent": case.silent,
            }
            for case in by_severity(verdict)
        ],
    }
