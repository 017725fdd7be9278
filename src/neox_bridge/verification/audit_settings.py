"""Finds steps of another model, missing steps, and wrong initial weights."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from neox_bridge.findings import Severity
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.layouts.unknown_keys import reason_of, remedy_of
from neox_bridge.verification.config_differences import shortened
from neox_bridge.verification.runs import Fault
from neox_bridge.verification.steps import Step
from neox_bridge.wording import plural, some, verb

Steps = Sequence[Step]
_OTHER_RUN = "these steps may be from another run, or were converted with other settings"
_OTHER_TOKENIZER = "copy the tokenizer of the run's other steps, unless it was meant to change"
_REGULAR = 2  # number of equal distances on both sides of a gap that make a step count as missing


def setting_faults(steps: Steps) -> Iterator[Fault]:
    """Steps of one run whose config, shapes, dtype or number differ from the other steps."""
    known = _of_known_family(steps)
    for key in dict.fromkeys(key for step in known for key in step.meaning):
        yield from _odd("config-differs", key, [repr(s.meaning.get(key)) for s in known], known)
    yield from _odd_configs(steps)
    yield from _odd_tokenizers(steps)
    yield from _odd("dtype-differs", "dtype", [step.dtype for step in steps], steps)
    yield from _unknown_keys(steps)
    yield from _odd_tensors(steps)
    yield from _numbers(steps)


def _of_known_family(steps: Steps) -> list[Step]:
    return [step for step in steps if step.meaning or step.read_by == "family"]


def _odd_configs(steps: Steps) -> Iterator[Fault]:
    """Steps with other values in config.json, unless another finding already names their config.

    A version of transformers leaves out keys that it does not know, and a known family has defaults
    for them. So a missing key counts only if one version wrote the configs of an unknown family.
    """
    family = _of_known_family(steps)
    explained = {
        step.label
        for key in {key for step in family for key in step.meaning}
        for step in _unusual(family, [repr(s.meaning.get(key)) for s in family])
    }
    steps = [step for step in steps if step.config and step.label not in explained]
    defaults = bool(family) or len({step.transformers for step in steps}) > 1
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in dict.fromkeys(key for step in steps for key in step.config):
        known = [step for step in steps if key in step.config or not defaults]
        values = [step.config.get(key, "missing") for step in known]
        usual = _most_common(values)
        for value in dict.fromkeys(values):
            if value != usual:
                labels = tuple(s.label for s, v in zip(known, values, strict=True) if v == value)
                groups[labels].append(
                    f"{key} is {shortened(value)}, and {shortened(usual)} at most steps"
                )
    for labels, differences in groups.items():
        run = steps[0].run
        message = f"{run}: config.json at step {some(list(labels))}: {some(differences)}"
        yield Fault("config-differs", "warning", message, _OTHER_RUN, run, labels)


def _odd_tokenizers(steps: Steps) -> Iterator[Fault]:
    """Steps with other tokenizer files than most. Steps without any are no fault."""
    steps = [step for step in steps if step.tokenizer]
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for file in dict.fromkeys(file for step in steps for file in step.tokenizer):
        values = [step.tokenizer.get(file, "") for step in steps]
        usual = _most_common([value for value in values if value])
        for value in dict.fromkeys(values):
            if value not in (usual, ""):
                labels = tuple(s.label for s, v in zip(steps, values, strict=True) if v == value)
                groups[labels].append(file)
    for labels, files in groups.items():
        run = steps[0].run
        message = (
            f"{run}: {some(files)} at step {some(list(labels))} differ from those of most steps"
        )
        yield Fault("tokenizer-differs", "warning", message, _OTHER_TOKENIZER, run, labels)


def _unknown_keys(steps: Steps) -> Iterator[Fault]:
    """Unknown settings, and whether they are equal in all steps."""
    where: dict[str, dict[str, UnknownKey]] = defaultdict(dict)
    for step in steps:
        for key in step.unknown_keys:
            where[key.name][step.label] = key
    for name, keys in where.items():
        first, labels, run = next(iter(keys.values())), tuple(keys), steps[0].run
        severity: Severity = "info"
        reason, remedy = (
            f"unknown setting: {first.shown}",
            "check it if a fork of GPT-NeoX trained the run",
        )
        if first.effect == "model":
            severity, reason, remedy = "warning", reason_of(first), remedy_of(first)
        message = f"{run}: {some(list(labels))}: {reason}"
        yield Fault("unknown-key", severity, message, remedy, run, labels)
        known = _of_known_family(steps)
        values = [repr(keys[s.label].value) if s.label in keys else "missing" for s in known]
        yield from _odd("config-differs", name, values, known)


def _odd(code: str, what: str, values: Sequence[str], steps: Steps) -> Iterator[Fault]:
    """One finding per value that differs from that of most steps (on a tie, of the first)."""
    usual = _most_common(values)
    for value in dict.fromkeys(values):
        if value != usual:
            labels = tuple(s.label for s, v in zip(steps, values, strict=True) if v == value)
            run = steps[0].run
            message = f"{run}: {what} is {value} at step {some(list(labels))}, and {usual} at most"
            yield Fault(code, "warning", message, _OTHER_RUN, run, labels)


def _most_common(values: Sequence[str]) -> str:
    """The value of most steps; on a tie, the first."""
    return Counter(values).most_common(1)[0][0] if values else ""


def _unusual(steps: Steps, values: Sequence[str]) -> list[Step]:
    usual = _most_common(values)
    return [step for step, value in zip(steps, values, strict=True) if value != usual]


def _odd_tensors(steps: Steps) -> Iterator[Fault]:
    """Tensors with different shapes in some steps, ignoring padding of the vocabulary."""
    forms = [
        {
            name: tensor.shape[1:] if "embed" in name or "lm_head" in name else tensor.shape
            for name, tensor in step.tensors.items()
        }
        for step in steps
    ]
    usual: dict[str, tuple[int, ...] | None] = {}
    for name in dict.fromkeys(name for form in forms for name in form):
        usual[name] = Counter(form.get(name) for form in forms).most_common(1)[0][0]
    for step, form in zip(steps, forms, strict=True):
        names = [name for name, shape in usual.items() if form.get(name) != shape]
        if names:
            text = (
                f"{step.run}: step {step.label} has {plural(len(names), 'tensor')} of other "
                "shapes than "
            )
            message = f"{text}the run's other steps: {some(names, 3)}"
            yield step.fault(
                "shapes-differ", "warning", message, "it may be from another model", names
            )


def _numbers(steps: Steps) -> Iterator[Fault]:
    for step in steps:
        if step.iteration is not None:
            text = (
                f"{step.run}: the files of step {step.label} say that they are step "
                f"{step.iteration}"
            )
            remedy = "its mp_rank files, or all of its files, are from another step"
            yield step.fault("other-iteration", "warning", text, remedy)
    numbers = [step.number for step in steps if step.number is not None]
    for number, count in Counter(numbers).items():
        if count > 1:
            run, paths = steps[0].run, [step.path for step in steps if step.number == number]
            message = f"{run}: step {number} exists {count} times: {some(paths)}"
            yield Fault("step-twice", "warning", message, "keep one of them", run, (str(number),))


def missing_faults(run: str, numbers: Sequence[int]) -> Iterator[Fault]:
    """Missing steps among equally spaced ones. numbers: all steps, in order."""
    gaps = [high - low for low, high in pairwise(numbers)]
    for at, gap in enumerate(gaps):
        beside = gaps[max(0, at - _REGULAR) : at] + gaps[at + 1 : at + 1 + _REGULAR]
        if len(beside) == 2 * _REGULAR and len(set(beside)) == 1 and beside[0] > 0:
            every = beside[0]
            if gap > every and gap % every == 0:
                lost = [str(n) for n in range(numbers[at] + every, numbers[at + 1], every)]
                count = plural(len(lost), "step")
                message = f"{run}: {count} missing: {some(lost)}; the others are {every} apart"
                yield Fault(
                    "missing-steps",
                    "warning",
                    message,
                    "copy the missing steps too",
                    run,
                    tuple(lost),
                )


def init_faults(runs: Mapping[str, Steps], same_init: bool = False) -> Iterator[Fault]:
    """Check the initial weights of runs of the same shape.

    They must be equal if the yml files have equal seeds, ranks and init methods, or if
    ``same_init`` is set. They must differ if the seeds differ.
    """
    starts: dict[object, list[Step]] = defaultdict(list)
    for steps in runs.values():
        if steps and steps[0].number == 0:
            shapes = tuple(sorted((n, p.dtype, p.shape) for n, p in steps[0].tensors.items()))
            starts[shapes].append(steps[0])
    for group in starts.values():
        if same_init:
            yield from _should_be_same(group, "requested with `same_init=`")
            continue
        alike: dict[object, list[Step]] = defaultdict(list)
        for step in group:
            if step.kind == "neox" and step.seed is not None:
                alike[step.seed, step.making].append(step)
        for members in alike.values():
            yield from _should_be_same(members, "the same seed")
        yield from _should_differ(group)
    if same_init and not any(len(group) > 1 for group in starts.values()):
        message = "`same_init=True`: this needs two runs of the same shape with a step 0"
        yield Fault("no-step-0", "warning", message, "give runs that contain step 0")


def _should_be_same(members: Steps, why: str) -> Iterator[Fault]:
    usual = Counter(step.hash for step in members).most_common(1)[0][0]
    reference = next(step for step in members if step.hash == usual)
    for step in members:
        if step.hash == usual:
            continue
        names = [n for n, p in step.tensors.items() if p.hash != reference.tensors[n].hash]
        message = (
            f"{step.run}: step 0 differs from that of {reference.run} ({why}): {len(names)} of "
            f"{plural(len(step.tensors), 'tensor')} {verb(len(names), 'differ')}: {some(names, 3)}"
        )
        remedy = "one of them is not the initial state, or was initialized differently"
        yield step.fault("init-differs", "error", message, remedy, names)


def _should_differ(group: Steps) -> Iterator[Fault]:
    same: dict[str, list[Step]] = defaultdict(list)
    for step in group:
        if step.seed is not None:
            same[step.hash].append(step)
    for members in same.values():
        first = members[0]
        others = [step for step in members[1:] if step.seed != first.seed]
        for step in others[:1]:
            names = [f"{s.run} (seed {s.seed})" for s in members]
            message = f"step 0 is identical in {some(names)}"
            remedy = (
                "different seeds must give different weights, so one of the runs contains step 0 "
                "of the other"
            )
            yield step.fault("init-same", "error", message, remedy)
