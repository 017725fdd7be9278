"""Which checkpoints a batch converts: the steps of runs in folders, or the revisions of a model."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint, some
from neox_bridge.layouts.eras import GqaOrder
from neox_bridge.layouts.open import open_checkpoint
from neox_bridge.verification.runs import Place, Run, find_runs

_RANGE = re.compile(r"(\d+)-(\d+)(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class Source:
    """How to open a checkpoint, in any process. path: a folder, or its URL."""

    path: str
    configs: tuple[str, ...] = ()
    gqa_order: GqaOrder | None = None
    masters: bool = False

    def open(self) -> Checkpoint:
        """Raises BridgeError or Refused."""
        return open_checkpoint(
            self.path, configs=self.configs, gqa_order=self.gqa_order, masters=self.masters
        )


@dataclass(frozen=True, slots=True)
class Item:
    """One checkpoint to convert. name: its folder below the batch's target, ``step1000``."""

    name: str
    run: str
    number: int | None
    source: Source


def find_items(
    sources: Iterable[str],
    steps: str = "all",
    *,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
    masters: bool = False,
) -> tuple[list[Item], list[Finding]]:
    """The chosen checkpoints by run and step, and what is strange about the folders.

    steps: see ``chosen``. Names are ``stepN``, below their run's name where there are several runs.
    Raises BridgeError where there are none, or two would have one name.
    """
    check_steps(steps)
    given = list(sources)
    on_hub = {path: repo for path in given if (repo := _repo(path)) is not None}
    runs, faults = find_runs(path for path in given if path not in on_hub)
    runs += [_revisions(repo) for repo in on_hub.values()]
    if not runs:
        raise BridgeError("; ".join(f"{f.message} ({f.remedy})" for f in faults) or "No sources.")
    found: list[Item] = []
    for run in runs:
        numbers = [place.number for place in run.places if place.number is not None]
        wanted = chosen(steps, numbers)
        for place in run.places:
            if wanted is None or place.number in wanted:
                source = Source(place.path, tuple(configs), gqa_order, masters)
                name = _name(run, place, len(runs) > 1)
                found.append(Item(name, run.name, place.number, source))
    _check_ranges(steps, runs)
    if not found:
        raise UsageError(["steps"], f"{steps} matches none of the steps")
    if twice := [name for name, count in Counter(i.name for i in found).items() if count > 1]:
        raise BridgeError(
            f"{some(twice)}: several checkpoints would have this name in the target. Convert their "
            "runs into folders of their own."
        )
    return found, list(faults)


def check_steps(steps: str) -> None:
    """Raise UsageError where a part of ``--steps`` is neither a number, a range nor `last`."""
    if steps.strip() == "all":
        return
    for part in map(str.strip, steps.split(",")):
        if part != "last" and not part.isdigit() and not _RANGE.fullmatch(part):
            raise UsageError(
                ["steps"],
                f"{part!r} is not a step",
                "Write numbers, ranges such as 1000-5000 or 0-143000:1000, `last` or `all`.",
            )


def _check_ranges(steps: str, runs: Iterable[Run]) -> None:
    """Raise UsageError for a range that holds no step of any run."""
    there = sorted({n for run in runs for place in run.places if (n := place.number) is not None})
    for part in map(str.strip, steps.split(",")):
        if _RANGE.fullmatch(part) and not chosen(part, there):
            have = some([str(number) for number in there])
            raise UsageError(["steps"], f"{part} matches none of the steps, which are {have}")


def _repo(source: str) -> str | None:
    """``org/name`` of a model of the Hub, named without a revision; None for other sources."""
    from neox_bridge.hub.names import model_id

    found = model_id(source.removeprefix("hf://"))
    return found[0] if found and not found[1] and not os.path.exists(source) else None


def _revisions(repo: str) -> Run:
    """The steps of a model of the Hub, read there by ranges; all of it where it has no steps."""
    from urllib.parse import quote

    from neox_bridge.hub.names import MAIN
    from neox_bridge.hub.revisions import revisions

    found = revisions(repo)
    steps = {one.step: one for one in reversed(found) if one.step is not None}  # a branch, or a tag
    named = sorted(steps.values(), key=lambda one: one.step or 0) or [
        one for one in found if one.name == MAIN
    ]
    places = [Place(f"hf://{repo}@{quote(r.name, safe='')}", r.name, r.step) for r in named]
    return Run(repo, tuple(places))


def chosen(steps: str, there: Sequence[int]) -> set[int] | None:
    """The step numbers of ``0,1000,5000-9000,10000-143000:1000,last``; None for ``all``.

    there: the numbers that a run has, of which ``last`` is the largest; a range means those of
    them that it holds. Raises UsageError for other words, and for a number that isn't there.
    """
    check_steps(steps)
    if steps.strip() == "all":
        return None
    found: set[int] = set()
    for part in (part.strip() for part in steps.split(",")):
        if part == "last" and there:
            found.add(max(there))
        elif match := _RANGE.fullmatch(part):
            low, high, every = int(match[1]), int(match[2]), int(match[3] or 1)
            found |= {n for n in there if low <= n <= high and (n - low) % max(1, every) == 0}
        elif part.isdigit():
            if int(part) not in there:
                have = some([str(n) for n in sorted(there)])
                raise UsageError(["steps"], f"there is no step {part}. The steps are {have}")
            found.add(int(part))
    return found


def _name(run: Run, place: Place, several: bool) -> str:
    own = f"step{place.number}" if place.number is not None else place.label
    return os.path.join(os.path.basename(os.path.abspath(run.name)), own) if several else own
