"""Parses ``--steps`` and selects the steps of a run."""

import re
from collections.abc import Iterable, Sequence

from neox_bridge.errors import UsageError
from neox_bridge.verification.runs import TrainingRun
from neox_bridge.wording import some

_RANGE = re.compile(r"(\d+)-(\d+)(?::(\d+))?")


def chosen(steps: str, there: Sequence[int]) -> set[int] | None:
    """The step numbers of ``0,1000,5000-9000,10000-143000:1000,last``; None for ``all``.

    there: the existing steps of a run. ``last`` is the largest; a range selects the existing steps
    in it. Raises UsageError for other words and for missing steps.
    """
    check_steps(steps)
    if steps.strip() == "all":
        return None
    numbers: set[int] = set()
    for part in (part.strip() for part in steps.split(",")):
        if part == "last" and there:
            numbers.add(max(there))
        elif match := _RANGE.fullmatch(part):
            low, high, every = int(match[1]), int(match[2]), int(match[3] or 1)
            numbers |= {n for n in there if low <= n <= high and (n - low) % max(1, every) == 0}
        elif part.isdigit():
            if int(part) not in there:
                have = some([str(n) for n in sorted(there)])
                raise UsageError(["steps"], f"no step {part}. Available steps: {have}")
            numbers.add(int(part))
    return numbers


def check_steps(steps: str) -> None:
    """Raise UsageError if a part of ``--steps`` is not a number, a range or `last`."""
    if steps.strip() == "all":
        return
    for part in map(str.strip, steps.split(",")):
        if part != "last" and not part.isdigit() and not _RANGE.fullmatch(part):
            raise UsageError(
                ["steps"],
                f"{part!r} is not a step",
                "Use numbers, ranges such as 1000-5000 or 0-143000:1000, `last` or `all`.",
            )


def check_ranges(steps: str, runs: Iterable[TrainingRun]) -> None:
    """Raise UsageError for a range without a step of any run."""
    if steps.strip() == "all":
        return
    there = sorted({n for run in runs for place in run.places if (n := place.number) is not None})
    for part in map(str.strip, steps.split(",")):
        if _RANGE.fullmatch(part) and not chosen(part, there):
            have = some([str(number) for number in there])
            raise UsageError(["steps"], f"{part} matches no step. Available steps: {have}")


def within(run: TrainingRun, steps: str) -> TrainingRun:
    """``with_steps`` for a counterpart, which may not have all of the given steps."""
    numbers = [place.number for place in run.places if place.number is not None]
    parts = [part.strip() for part in steps.split(",")]
    kept = [part for part in parts if not part.isdigit() or int(part) in numbers]
    return with_steps(run, ",".join(kept)) if kept else TrainingRun(run.name, ())


def with_steps(run: TrainingRun, steps: str) -> TrainingRun:
    """The run with the chosen steps only. Raises UsageError, see ``chosen``."""
    numbers = [place.number for place in run.places if place.number is not None]
    wanted = chosen(steps, numbers)
    if wanted is None:
        return run
    return TrainingRun(run.name, tuple(place for place in run.places if place.number in wanted))
