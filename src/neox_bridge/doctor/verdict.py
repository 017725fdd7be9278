"""The results of the doctor: cases with the framework's messages, and the verdict on them."""

import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from neox_bridge.findings import NO_DETAILS, Command, Details, Finding, Severity, Subject
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.targets import Target, name_of
from neox_bridge.layouts.checkpoint import Checkpoint, config_options, new_folder
from neox_bridge.layouts.unknown_keys import refusals
from neox_bridge.stores.hub_names import MAIN
from neox_bridge.stores.paths import is_local

Answer = Literal["loads", "loads with warnings", "fails"]


@dataclass(frozen=True, slots=True)
class Case:
    """A finding, and what the framework prints about it.

    Attributes:
        finding: The finding. Severity "error": the checkpoint does not load, or loads as another
            model.
        prints: What the framework prints; "" if nothing.
        silent: Whether the checkpoint loads without a message, as another model.
    """

    finding: Finding
    prints: str = ""
    silent: bool = False

    @property
    def fails(self) -> bool:
        return self.finding.severity == "error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a checkpoint loads in a target.

    Attributes:
        target: The target as ``--for`` spells it.
        answer: Whether it loads.
        message: The first message that the framework prints.
        cases: The reasons for the answer, in the order in which the framework checks them.
        framework: The target, for display.
    """

    target: str
    answer: Answer
    message: str
    cases: tuple[Case, ...]
    framework: str = ""

    @property
    def headline(self) -> str:
        """What goes wrong, as text that follows the name of the checkpoint; "" if it loads."""
        failing = [case for case in self.cases if case.fails]
        if not failing:
            return ""
        silent = all(case.silent for case in failing)
        what = "loads as another model in" if silent else "does not load in"
        return f"{what} {self.framework or self.target}"


def verdict(target: str, cases: Iterable[Case], framework: str = "") -> Verdict:
    """The verdict on cases, which are in the order in which the framework checks them."""
    cases = tuple(cases)
    failing = [case for case in cases if case.fails]
    if failing:
        silent = f"(nothing) {failing[0].finding.message}"
        message = next((case.prints for case in failing if case.prints), silent)
        return Verdict(target, "fails", message, cases, framework)
    warned = any(case.finding.severity == "warning" for case in cases)
    return Verdict(target, "loads with warnings" if warned else "loads", "", cases, framework)


def case(
    code: str,
    severity: Severity,
    message: str,
    remedy: str = "",
    prints: str = "",
    subject: Subject = "",
    details: Details = NO_DETAILS,
) -> Case:
    """Make a case."""
    return Case(Finding(code, severity, message, remedy, subject=subject, details=details), prints)


def failure(code: str, message: str, remedy: str = "", prints: str = "", **more: Any) -> Case:
    """The case of a checkpoint that does not load. more: of ``case``."""
    return case(code, "error", message, remedy, prints, **more)


def another_model(code: str, message: str, remedy: str = "", **more: Any) -> Case:
    """The case of a checkpoint that loads as another model. more: of ``case``."""
    return replace(failure(code, message, remedy, **more), silent=True)


def without_others(case: Case) -> Case:
    """The case without the other ways to fix it."""
    details = replace(case.finding.details, others=())
    return replace(case, finding=replace(case.finding, details=details))


def opening_options(checkpoint: Checkpoint, target: Target | None = None) -> list[str]:
    """The options without which a command refuses to open a checkpoint.

    They name its yml files, and the unknown keys that may change the model and that the target does
    not know either.
    """
    known = target.keys if isinstance(target, TreeFacts) and checkpoint.kind == "neox" else ()
    risky = [refusal.key for refusal in refusals(checkpoint, (), known)]
    return [*config_options(checkpoint), *(w for key in risky for w in ("--ignore-key", key))]


def near(path: str) -> str:
    """A path for a command in the current folder: relative if below it, otherwise absolute."""
    below = os.path.join(os.getcwd(), "")
    short = path.removeprefix(below)
    return path if short == path or not short or short.startswith("-") else short


def free_folder(path: str, ending: str) -> str:
    """A new folder next to a checkpoint. The ending is not repeated in its name."""
    path = path.rstrip("/")
    name = new_folder(re.sub(rf"-{re.escape(ending)}(-\d+)?$", "", path), ending)
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(free for free in names if free != path and not os.path.lexists(free))


def _in_command(checkpoint: Checkpoint) -> tuple[str, str]:
    """The name of a checkpoint in a command, and the path next to which the command writes.

    For a model in the cache of the Hub, that is the current folder, because new folders do not
    belong into the cache.
    """
    path = near(checkpoint.path)
    if not checkpoint.revision or not is_local(checkpoint.path):
        return path, path
    name = checkpoint.revision.removesuffix(f"@{MAIN}")
    beside = name.partition("/")[2].replace("@", "-").replace("/", "-")
    return (name if checkpoint.hub_repo else path), beside


def fix_command(checkpoint: Checkpoint, target: Target | None, *flags: str) -> Command:
    """The command that fixes a checkpoint for a target, in a sibling folder."""
    path, beside = _in_command(checkpoint)
    words = ["neox-bridge", "doctor", path]
    if target is not None:
        words += ["--for", name_of(target)]
    words += opening_options(checkpoint, target)
    return Command(shlex.join([*words, "--fix", free_folder(beside, "fixed"), *flags]))


def convert_command(checkpoint: Checkpoint, target: Target) -> Command:
    """The command that converts a checkpoint to the target's kind."""
    other = "hf" if checkpoint.kind == "neox" else "neox"
    return convert_into(checkpoint, other, "--for", name_of(target))


def convert_into(checkpoint: Checkpoint, ending: str, *flags: str, home: str = "") -> Command:
    """The command that converts a checkpoint into a sibling folder.

    Args:
        checkpoint: The checkpoint.
        ending: How the name of the new folder ends.
        flags: Additional words of the command.
        home: The folder next to which the new one is created. By default, the checkpoint.
    """
    path, beside = _in_command(checkpoint)
    folder = free_folder(near(home) if home else beside, ending)
    words = ["neox-bridge", "convert", path, folder, *flags]
    return Command(shlex.join([*words, *opening_options(checkpoint)]))
