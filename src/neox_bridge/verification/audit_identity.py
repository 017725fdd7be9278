"""Steps, and shards of steps, that have the bits of another step.

Public suites have had both: whole steps with the weights of another step, and single weight files
of another step (https://github.com/EleutherAI/pythia/issues/205 and /206).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from neox_bridge.verification.runs import Fault
from neox_bridge.verification.steps import Step
from neox_bridge.wording import plural, some

Steps = Sequence[Step]
ShardKey = tuple[str, int]  # a tensor's name, and the rank that holds the shard
_WARMUP = 32  # steps in which a dynamic loss scale may still skip every update
_CLEARLY = 0.01  # minimum deviation of the norms of wrong steps, to identify the right step
_BETTER = 0.25  # maximum deviation of the right step, relative to the wrong ones


@dataclass(frozen=True, slots=True)
class _Bits:
    hash: str
    matrix: bool
    file: str


def identity_faults(steps: Steps) -> Iterator[Fault]:
    """Faults of one run's steps, in order: identical steps, and tensors of another step."""
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        groups[step.hash].append(step)
    for group in groups.values():
        if len(group) > 1:
            yield _same_steps(group, steps)
    # one of several identical steps represents all
    yield from _shared_shards([group[0] for group in groups.values()])


def _same_steps(group: Steps, steps: Steps) -> Fault:
    run, labels = group[0].run, tuple(step.label for step in group)
    what = f"{run}: steps {_and(labels)} are identical in every tensor"
    numbers = [step.number for step in group if step.number is not None]
    begins = group[0] is steps[0] and list(group) == list(steps[: len(group)])
    half = group[0].dtype == "float16" and len(numbers) == len(group)
    why = ""
    if sorted(numbers) == [0, 1] and len(group) == 2:
        why = "until 2026, GPT-NeoX started its warmup with a learning rate of 0 (gpt-neox#1373)"
    elif begins and half and 0 in numbers and max(numbers) <= _WARMUP:
        why = "this early in an fp16 run, the loss scaler may have skipped every update"
    if why:
        return Fault("unchanged-at-first", "info", f"{what}: {why}", "", run, labels)
    names = [name for name, fingerprint in group[0].tensors.items() if not fingerprint.constant]
    remedy = _whose(group, steps, names) + "; copy or convert the wrong ones again"
    return Fault("identical-steps", "error", what, remedy, run, labels)


def _shared_shards(steps: Steps) -> Iterator[Fault]:
    if len(steps) < 2:
        return
    by_rank = len({step.tp for step in steps}) == 1
    units = [_units(step, by_rank) for step in steps]
    where: dict[ShardKey, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, step_units in enumerate(units):
        for unit, bits in step_units.items():
            where[unit][bits.hash].append(index)
    shared: dict[tuple[int, ...], list[ShardKey]] = defaultdict(list)
    for unit, hashes in where.items():
        for holders in hashes.values():
            if len(holders) > 1:
                shared[tuple(holders)].append(unit)
    for indices, shared_units in sorted(shared.items()):
        if len(indices) == len(steps):
            yield _frozen(steps, shared_units)
        elif _strong(indices, shared_units, units, where):
            yield _shared(steps, indices, shared_units, units)


def _units(step: Step, by_rank: bool) -> dict[ShardKey, _Bits]:
    """Shards or whole tensors, except constant ones, such as newly initialized norms."""
    units = {}
    for name, whole in step.tensors.items():
        files, matrix = step.files[name], len(whole.shape) > 1
        if by_rank and whole.shards:
            for rank, (shard, file) in enumerate(zip(whole.shards, files, strict=True)):
                if not shard.constant:
                    units[name, rank] = _Bits(shard.hash, matrix, file)
        elif not whole.constant:
            units[name, 0] = _Bits(whole.hash, matrix, files[0] if files else "")
    return units


def _strong(
    indices: tuple[int, ...],
    shared: Sequence[ShardKey],
    units: Sequence[Mapping[ShardKey, _Bits]],
    where: Mapping[ShardKey, Mapping[str, Sequence[int]]],
) -> bool:
    """Whether equal bits cannot be the result of training.

    Training may leave single tensors unchanged for a while: in 16 bits, a small learning rate
    rounds to nothing, and layers may be frozen at first. So bits that reappear after other bits
    must include a matrix, and bits that stay for several steps must be the whole content of a file.
    Vectors alone count only if they change at every other step.
    """
    first, shared_units = units[indices[0]], set(shared)
    matrix = any(first[unit].matrix for unit in shared)
    if matrix and indices[-1] - indices[0] >= len(indices):
        return True
    files = {first[unit].file for unit in shared}
    if not files.isdisjoint(bits.file for unit, bits in first.items() if unit not in shared_units):
        return False
    counts = [[len(at) for at in where[unit].values()] for unit in shared]
    return matrix or all(len(c) >= 3 and sum(c) - len(c) == len(indices) - 1 for c in counts)


def _frozen(steps: Steps, units: Sequence[ShardKey]) -> Fault:
    names = list(dict.fromkeys(name for name, _ in units))
    run, count = steps[0].run, len({name for step in steps for name in step.tensors})
    what = f"{run}: {len(names)} of {count} tensors are equal in every step: {some(names)}"
    labels = tuple(step.label for step in steps)
    return Fault(
        "frozen", "info", what, "this is expected if they were frozen", run, labels, tuple(names)
    )


def _shared(
    steps: Steps,
    indices: tuple[int, ...],
    shared: Sequence[ShardKey],
    units: Sequence[Mapping[ShardKey, _Bits]],
) -> Fault:
    group = [steps[index] for index in indices]
    run, labels = group[0].run, tuple(step.label for step in group)
    names = list(dict.fromkeys(name for name, _ in shared))
    shared_units = set(shared)
    files = {units[i][unit].file for i in indices for unit in shared}
    others = {b.file for i in indices for u, b in units[i].items() if u not in shared_units}
    whole = sorted(files - others)  # files without any difference
    ranks = sorted({rank for _, rank in shared})
    spread = Counter(name for name, _ in units[indices[0]])
    part = any(sum(1 for n, _ in shared if n == name) < spread[name] for name in names)
    of_rank = f" of tensor-parallel rank {_and([str(r) for r in ranks])}" if part else ""
    count = plural(len(names), "tensor")
    what = f"{run}: steps {_and(labels)} differ, but share {count}{of_rank} bit for bit"
    if whole and set(whole) == files:
        what += f" (everything in {some(whole, 3)})" if len(whole) == 1 else f" ({some(whole, 3)})"
    what += f": {some(names, 3)}"
    remedy = _whose(group, steps, names) + "; copy or convert that file again"
    return Fault("shared-shard", "error", what, remedy, run, labels, tuple(names))


def _whose(group: Steps, steps: Steps, names: Sequence[str]) -> str:
    """Which step the bits belong to, if the norms of neighboring steps show it."""
    places = {id(step): index for index, step in enumerate(steps)}
    at = sorted(places[id(step)] for step in group)
    if len(at) == len(steps):
        return "all steps are equal"
    if at[-1] - at[0] < len(at):
        return "neighboring steps do not show which step they belong to"
    scores = []
    for step in group:
        index = places[id(step)]
        before = [steps[i] for i in range(index - 1, -1, -1) if i not in at]
        after = [steps[i] for i in range(index + 1, len(steps)) if i not in at]
        scores.append((_misfit(step, before, after, names), step.label))
    scores.sort()
    if scores[1][0] > _CLEARLY and scores[0][0] < _BETTER * scores[1][0]:
        wrong = [label for _, label in scores[1:]]
        return (
            f"the norms of neighboring steps suggest that they belong to step {scores[0][1]}, so "
            f"{_and(wrong)} {'has' if len(wrong) == 1 else 'have'} wrong weights"
        )
    return "the norms do not show which step they belong to"


def _misfit(step: Step, before: Steps, after: Steps, names: Sequence[str]) -> float:
    """The mean logarithmic distance of the norms from the range between their neighbors.

    before, after: The other steps on each side, the nearest first. At the start and the end of the
    run, where one side has no steps, the norms may continue the trend of the two nearest.
    """
    total, count = 0.0, 0
    for name in names:
        sides = [side for side in (_log_norms(before, name), _log_norms(after, name)) if side]
        norm_here = step.tensors[name].norm
        if sides and norm_here:
            ends = [side[0] for side in sides]
            if len(sides) == 1:
                (side,) = sides
                ends.append(2 * side[0] - side[-1])
            y = math.log(norm_here)
            total, count = total + max(min(ends) - y, y - max(ends), 0.0), count + 1
    return total / count if count else math.inf


def _log_norms(steps: Steps, name: str) -> list[float]:
    """The logarithms of a tensor's norms in the two nearest steps that have any."""
    norms = (step.tensors[name].norm for step in steps if name in step.tensors)
    return [math.log(norm) for norm in islice((norm for norm in norms if norm), 2)]


def across_runs(runs: Mapping[str, Steps]) -> Iterator[Fault]:
    """Whole steps of one run that equal steps of another run, except a shared beginning."""
    groups: dict[str, list[Step]] = defaultdict(list)
    for steps in runs.values():
        for step in steps:
            if step.hash not in {s.hash for s in groups[step.hash] if s.run == step.run}:
                groups[step.hash].append(step)
    pairs: dict[tuple[str, str], list[tuple[Step, Step]]] = defaultdict(list)
    for group in groups.values():
        for i, first in enumerate(group):
            for second in group[i + 1 :]:
                if not (_initial(first) and _initial(second)):
                    pairs[first.run, second.run].append((first, second))
    for (one, two), shared in pairs.items():
        same = {b.hash for _, b in shared}
        prefix = _begins(runs[two], same) or _begins(runs[one], same)
        labels = tuple(a.label for a, _ in shared)
        if prefix and all(a.number == b.number or b is runs[two][0] for a, b in shared):
            continue
        text = some([f"{a.label} is {b.label}" for a, b in shared])
        what = f"{one} and {two} have identical steps: {text}"
        remedy = "one of the runs contains a step of the other; copy it again"
        yield Fault("shared-step", "error", what, remedy, one, labels)


def _initial(step: Step) -> bool:
    """Whether runs may share a step: initial weights, or a first step that did not change them."""
    return step.number is not None and step.number <= 1


def _begins(steps: Steps, same: set[str]) -> bool:
    """Whether the shared steps are the first of a run, but not all of it."""
    hashes = [step.hash for step in steps if not _initial(step)]
    count = sum(1 for value in hashes if value in same)
    return count < len(hashes) and all(value in same for value in hashes[:count])


def _and(words: Sequence[str]) -> str:
    if len(words) > 12:
        return f"{', '.join(words[:10])} and {len(words) - 10} more"
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
