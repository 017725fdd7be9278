"""Collects every verdict on a checkpoint in one document, for ``diagnose`` and ``doctor``."""

import os
from dataclasses import dataclass
from typing import Any

from neox_bridge.doctor.compare import Row, compare
from neox_bridge.doctor.diagnose import cannot_open, judge, judge_all, own_target
from neox_bridge.doctor.verdict import Case, Verdict, verdict
from neox_bridge.documents import document, plain_data
from neox_bridge.findings import Command, Finding, finding_json
from neox_bridge.frameworks.targets import Target, name_of, words_for
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.head import drop_equal_head

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
    """

    source: str
    path: str
    kind: str
    main: Verdict
    verdicts: tuple[Verdict, ...]
    named: bool = False
    comparison: tuple[Row, ...] | None = None

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
            "loads": self.loads,
            "findings": _verdict_facts(self.main)["findings"],
            "verdicts": verdicts,
        }
        if self.comparison is not None:
            facts["comparison"] = plain_data(self.comparison)
        return facts


def examine(
    checkpoint: Checkpoint, target: Target | None = None, *, with_comparison: bool = False
) -> Examination:
    """Judge a checkpoint for a target, or for every known version.

    with_comparison: also show how both frameworks compute this model.
    """
    checkpoint = drop_equal_head(checkpoint)  # compared once, not for every target
    main = judge(checkpoint, target or own_target(checkpoint))
    return Examination(
        checkpoint.source or checkpoint.path,
        checkpoint.path,
        checkpoint.kind,
        main,
        (main,) if target is not None else tuple(judge_all(checkpoint)),
        target is not None,
        tuple(compare(checkpoint)) if with_comparison else None,
    )


def examine_unopened(path: str, target: Target | None) -> Examination | None:
    """Examine a folder that cannot be opened; None if nothing is known about it."""
    case = cannot_open(path)
    if case is None:
        return None
    name = name_of(target) if target is not None else "any GPT-NeoX"
    main = verdict(name, [case], words_for(target) if target is not None else name)
    return Examination(path, os.path.abspath(path), "neox", main, (main,), target is not None)


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
