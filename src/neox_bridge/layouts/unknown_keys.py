"""Refuses or reports settings that no known version of GPT-NeoX or transformers has."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import Refusal
from neox_bridge.architectures.hf_config import rope_kind
from neox_bridge.errors import UsageError
from neox_bridge.findings import Finding
from neox_bridge.frameworks.changes import change_named
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.wording import some

ROPE_SCALING = "rope_scaling"  # a known setting that is refused, and that the user may ignore


def ignoring(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint with keys that the user ignores.

    Raises UsageError for a name that is not an unknown key of its settings.
    """
    allowed = ignorable(checkpoint)
    if wrong := [name for name in names if name not in allowed]:
        where = "config.json" if checkpoint.kind == "hf" else "the yml files"
        known = f"{wrong[0]} is a known setting, and known settings are not ignored"
        absent = f"{wrong[0]} is not in {where} of {checkpoint.path}"
        have = f"Unknown keys there: {some(sorted(allowed))}." if allowed else ""
        raise UsageError(
            ["ignore_keys"],
            known if wrong[0] in checkpoint.raw else absent,
            have or "There are no unknown keys: leave the option out.",
        )
    return replace(checkpoint, ignored_keys=frozenset({*checkpoint.ignored_keys, *names}))


def ignorable(checkpoint: Checkpoint) -> frozenset[str]:
    """The keys of a checkpoint's settings that may be ignored."""
    unknown = {key.name for key in checkpoint.unknown_keys}
    scaled = checkpoint.kind == "hf" and rope_kind(checkpoint.raw) != "default"
    return frozenset({*unknown, *((ROPE_SCALING,) if scaled else ())})


def refusals(
    checkpoint: Checkpoint, ignored: Collection[str], known: Collection[str] = ()
) -> list[Refusal]:
    """The refusals of a conversion for keys that seem to change the model.

    ignored: the keys that the user ignores. known: the keys that the target accepts.
    """
    return [
        Refusal(key.name, reason_of(key), remedy_of(key))
        for key in checkpoint.unknown_keys
        if key.effect == "model" and key.name not in ignored and key.top not in known
    ]


def warned(keys: Sequence[UnknownKey]) -> list[Finding]:
    """Warnings about keys that seem to change the model, where nothing is converted."""
    return [
        Finding("unknown-key", "warning", reason_of(key)) for key in keys if key.effect == "model"
    ]


def reason_of(key: UnknownKey) -> str:
    """Why an unknown key stops a conversion."""
    where = f"{key.file} has {key.shown}" if key.file else key.shown
    if key.proposal:
        change = change_named(key.proposal)
        return (
            f"{where}, which {change.pull} proposes and no merged GPT-NeoX knows: "
            f"{change.title}. The proposal does not say enough to convert such a model"
        )
    if key.side == "hf":
        who = "which neither transformers' class of this family nor neox-bridge reads"
    elif key.removed:
        who = f"which GPT-NeoX had until {key.removed}"
    elif "." in key.name:
        who = "which neither GPT-NeoX nor DeepSpeed knows"
    else:
        who = (
            "which no GPT-NeoX from v1.0 to today knows, so a fork of GPT-NeoX may have written it"
        )
    if key.neighbour:
        return f"{where}, {who}. Did you mean {key.neighbour}?"
    return f"{where}, {who}. Its name suggests that it changes what the model computes"


def remedy_of(key: UnknownKey) -> str:
    """What the user can do."""
    correct = f"correct it if it is meant to be {key.neighbour}; " if key.neighbour else ""
    return f"{correct}to ignore the key, use `ignore_keys={key.name}`"


def listed(keys: Sequence[UnknownKey]) -> list[Finding]:
    """The unknown keys that do not stop a conversion, as one warning."""
    findings = [_unmerged(key) for key in keys if key.effect != "model" and key.proposal]
    named = [key for key in keys if key.effect != "model" and not key.proposal]
    if not named:
        return findings
    shown = some([_listed(key) for key in named], 12)
    who = "transformers" if named[0].side == "hf" else "GPT-NeoX"
    files = some(sorted({key.file for key in named if key.file}))
    return [
        *findings,
        Finding(
            "unknown-keys",
            "warning",
            f"{files + ' has ' if files else ''}keys that {who} does not know: {shown}",
            "their names do not suggest that they change the model. Check them if a fork "
            "trained it",
        ),
    ]


def _unmerged(key: UnknownKey) -> Finding:
    """A key of a proposed change, with a value that changes nothing."""
    change = change_named(key.proposal)
    where = f"{key.file} has {key.shown}" if key.file else key.shown
    return Finding(
        "unmerged-format",
        "warning",
        f"{where}, which {change.pull} proposes and no merged GPT-NeoX knows. With this value the "
        "model is the same without the key",
        f"remove the key from a yml for another tree; {change.link}",
    )


def _listed(key: UnknownKey) -> str:
    guess = f" (did you mean {key.neighbour}?)" if key.neighbour else ""
    return f"{key.shown}{guess}"


def ignored_findings(names: Collection[str], carried: bool) -> list[Finding]:
    """The keys that are ignored, as one warning."""
    if not names:
        return []
    what = (
        "written unchanged, for code that knows it"
        if carried
        else "left out. If the model was trained with this setting, the result is another model"
    )
    return [
        Finding(
            "ignored-keys",
            "warning",
            f"{some(sorted(names))}: ignored (`ignore_keys=`), and {what}",
        )
    ]


def lost_on_the_way(checkpoint: Checkpoint) -> list[Finding]:
    """A warning about keys of a run's yml that were ignored on the way to Hugging Face."""
    neox = checkpoint.record.get("neox") or {}
    names = sorted(checkpoint.ignored_keys & set(neox.get("yml") or ()))
    if checkpoint.kind != "hf" or not names:
        return []
    return [
        Finding(
            "ignored-keys",
            "warning",
            f"the run's yml had {some(names)}, which was ignored (`ignore_keys=`) on the way to "
            "Hugging Face. It is missing from the new yml",
            "add it again if the code that trained the model needs it",
        )
    ]


def without_ignored(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json of a Hugging Face checkpoint without the ignored keys."""
    ignored = checkpoint.ignored_keys
    raw = {key: value for key, value in checkpoint.raw.items() if key not in ignored}
    for name in ignored:
        top, _, last = name.rpartition(".")
        if isinstance(raw.get(top), dict):
            raw[top] = {key: value for key, value in raw[top].items() if key != last}
    rope = raw.get("rope_parameters")
    if ROPE_SCALING in ignored and isinstance(rope, dict):
        kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        raw["rope_parameters"] = {"rope_type": "default", **kept}
    return raw


def undecided(first: Checkpoint, second: Checkpoint) -> Iterator[Finding]:
    """Unknown keys for which it is not known whether two checkpoints are the same model."""
    ignored = first.ignored_keys | second.ignored_keys
    there = {key.name for side in (first, second) for key in side.unknown_keys}
    if names := sorted(ignored & {*there, ROPE_SCALING}):
        yield Finding(
            "ignored-keys",
            "warning",
            f"{some(names)}: ignored (`ignore_keys=`) when this was converted, and left out of the "
            "comparison",
        )
    for one, other in ((first, second), (second, first)):
        same = [(key.name, key.value) for key in other.unknown_keys if other.kind == one.kind]
        for key in one.unknown_keys:
            carried = (key.name, key.value) in same
            if key.effect == "model" and key.name not in ignored and not carried:
                reason = reason_of(key)
                end = "" if reason.endswith("?") else "."
                yield Finding(
                    "unknown-key",
                    "error",
                    f"{one.path}: {reason}{end} It is unknown whether both are the same model.",
                    "if the key does not matter, convert again with `ignore_keys=`",
                )
