"""What the doctor says: cases with what the framework prints, and the verdict that they make."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from neox_bridge.findings import Finding, Severity, Subject
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.targets import Target, name_of
from neox_bridge.layouts.checkpoint import Checkpoint, config_options, new_folder
from neox_bridge.layouts.unknown_keys import refusals

Answer = Literal["loads", "loads with warnings", "fails"]


@dataclass(frozen=True, slots=True)
class Case:
    """A finding, and what the framework prints of it; "" where it says nothing.

    fails: the checkpoint won't load, or loads as another model.
    """

    finding: Finding
    prints: str = ""

    @property
    def fails(self) -> bool:
        return self.finding.severity == "error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a checkpoint loads in a target. message: the first that the framework prints."""

    target: str
    answer: Answer
    message: str
    cases: tuple[Case, ...]


def verdict(target: str, cases: Iterable[Case]) -> Verdict:
    """The verdict of cases that stand in the order in which the framework meets them."""
    cases = tuple(cases)
    failing = [case for case in cases if case.fails]
    if failing:
        silent = f"(nothing) {failing[0].finding.message}"
        message = next((case.prints for case in failing if case.prints), silent)
        return Verdict(target, "fails", message, cases)
    warned = any(case.finding.severity == "warning" for case in cases)
    return Verdict(target, "loads with warnings" if warned else "loads", "", cases)


def case(
    code: str,
    severity: Severity,
    message: str,
    remedy: str = "",
    prints: str = "",
    subject: Subject = "",
) -> Case:
    """A case in one line."""
    return Case(Finding(code, severity, message, remedy, subject=subject), prints)


def failure(
    code: str, message: str, remedy: str = "", prints: str = "", subject: Subject = ""
) -> Case:
    """The case of a checkpoint that won't load, or loads as another model."""
    return case(code, "error", message, remedy, prints, subject)


def opening_options(checkpoint: Checkpoint, target: Target | None = None) -> list[str]:
    """The options without which a command refuses a checkpoint that was opened.

    They name its ymls, and its unknown keys that may change the model and that the target does not
    know either.
    """
    known = target.keys if isinstance(target, TreeFacts) and checkpoint.kind == "neox" else ()
    risky = [refusal.key for refusal in refusals(checkpoint, (), known)]
    return [*config_options(checkpoint), *(w for key in risky for w in ("--ignore-key", key))]


def fix_command(checkpoint: Checkpoint, target: Target | None, *flags: str) -> str:
    """The command that fixes a checkpoint for a target, in a folder beside it."""
    words = ["neox-bridge", "doctor", checkpoint.path]
    if target is not None:
        words += ["--for", name_of(target)]
    words += opening_options(checkpoint, target)
    return shlex.join([*words, "--fix", new_folder(checkpoint.path, "fixed"), *flags])


def convert_command(checkpoint: Checkpoint, target: Target) -> str:
    """The command that converts a checkpoint to the target's kind."""
    other = "hf" if checkpoint.kind == "neox" else "neox"
    return convert_into(checkpoint, new_folder(checkpoint.path, other), "--for", name_of(target))


def convert_into(checkpoint: Checkpoint, folder: str, *flags: str) -> str:
    """The command that converts a checkpoint into a folder."""
    words = ["neox-bridge", "convert", checkpoint.path, folder, *flags]
    return shlex.join([*words, *opening_options(checkpoint)])
