"""Diagnoses a checkpoint: what wrote it, what is wrong with it, and where it loads."""

from collections.abc import Iterator
from dataclasses import replace

from neox_bridge.architectures.transformers_limits import refuse_version
from neox_bridge.doctor.judge_hf import judge_hf
from neox_bridge.doctor.judge_neox import judge_neox
from neox_bridge.doctor.neox_folder import stray_cases
from neox_bridge.doctor.resuming import judge_resuming, resharding
from neox_bridge.doctor.verdict import (
    Case,
    Verdict,
    case,
    convert_command,
    convert_into,
    failure,
    verdict,
    without_others,
)
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.findings import Finding, Subject, unrepeated
from neox_bridge.frameworks.eras import ERAS, fitting
from neox_bridge.frameworks.facts import TransformersFacts, TreeFacts
from neox_bridge.frameworks.targets import (
    KNOWN_TRANSFORMERS,
    Target,
    name_of,
    target_named,
    words_for,
)
from neox_bridge.frameworks.writers import words_of
from neox_bridge.layouts.checkpoint import Checkpoint, new_folder, way_out_of
from neox_bridge.layouts.copies import copy_findings
from neox_bridge.layouts.head import head_findings
from neox_bridge.layouts.open import detect
from neox_bridge.layouts.rank_biases import drifted_biases
from neox_bridge.layouts.tokenizer import piece_count
from neox_bridge.layouts.unknown_keys import listed, reason_of, remedy_of
from neox_bridge.planning.make import make_plan, relayout_command
from neox_bridge.planning.options import Options
from neox_bridge.planning.weight_dtypes import odd_dtypes

# The targets that are checked if none is named. transformers: one on each side of a change.
KNOWN_NEOX = tuple(f"neox@{era.name}" for era in ERAS)
KNOWN_HF = tuple(f"transformers@{version}" for version in KNOWN_TRANSFORMERS)
# What the judges decide for a target that reads the checkpoint. They omit what is harmless.
_SETTLED: tuple[Subject, ...] = ("config sizes", "duplicate keys", "rotary settings")


def diagnose(checkpoint: Checkpoint, target: Target | None = None) -> list[Finding]:
    """Collect the findings about a checkpoint for a target.

    Args:
        checkpoint: The checkpoint.
        target: What should load it. By default, the version that it seems to be made for.

    Returns:
        The findings. Those of severity "error" mean that it does not load, or loads as another
        model.
    """
    return [case.finding for case in judge(checkpoint, target or own_target(checkpoint)).cases]


def judge(checkpoint: Checkpoint, target: Target) -> Verdict:
    """Whether the target loads the checkpoint: the verdict and every case behind it."""
    meeting = list(_meeting(checkpoint, target))
    noticed = unrepeated(
        [*checkpoint.findings, *_about(checkpoint)],
        [case.finding for case in meeting],
        _SETTLED if isinstance(target, TreeFacts) == (checkpoint.kind == "neox") else (),
    )
    written = case("written-by", "info", f"written by {written_by(checkpoint)}")
    resuming = judge_resuming(checkpoint, target)  # GPT-NeoX loads the states after the weights
    cases = [written, *map(Case, noticed), *meeting, *resuming]
    if sum(case.fails for case in cases) > 1:  # the fix of one would end in the next error
        cases = [without_others(case) if case in meeting else case for case in cases]
    return verdict(name_of(target), cases, words_for(target))


def judge_all(checkpoint: Checkpoint) -> list[Verdict]:
    """The verdicts for the known targets of the same kind as the checkpoint."""
    names = KNOWN_NEOX if checkpoint.kind == "neox" else KNOWN_HF
    return [judge(checkpoint, target_named(name)) for name in names]


def own_target(checkpoint: Checkpoint) -> Target:
    """The version that a checkpoint seems made for: GPT-NeoX of its era, or transformers today."""
    state = checkpoint.neox
    if state is None:
        return target_named(KNOWN_HF[-1])
    return target_named(f"neox@{fitting(state.mlp_names, state.inv_freq, checkpoint.raw).name}")


def cannot_open(path: str) -> Case | None:
    """The cause of a failure to open, if it is that one folder has files of two layouts."""
    try:
        if detect(path) != "neox":
            return None
        from neox_bridge.layouts.step_folder import step_folder

        return next(stray_cases(step_folder(path, None).folder), None)
    except BridgeError:
        return None


def _meeting(checkpoint: Checkpoint, target: Target) -> Iterator[Case]:
    if isinstance(target, TreeFacts) and checkpoint.kind == "neox":
        yield from judge_neox(checkpoint, target, resharding(checkpoint, target))
    elif isinstance(target, TransformersFacts) and checkpoint.kind == "hf":
        yield from judge_hf(checkpoint, target)
    else:
        yield from _other_kind(checkpoint, target)


def _other_kind(checkpoint: Checkpoint, target: Target) -> Iterator[Case]:
    """A target of the other kind reads none of the files. Advises a conversion, unless refused."""
    path = checkpoint.path
    prints = (
        f"Unable to find latest file at {path}/latest, if trying to load latest checkpoint please "
        "ensure this file exists or pass an explicit checkpoint tag when loading a checkpoint."
    )
    if isinstance(target, TransformersFacts):
        prints = f"OSError: {path} does not appear to have a file named config.json."
    refused = _refused(checkpoint, target)
    yield failure(
        "other-kind",
        "this is a checkpoint of the other framework: it must be converted first",
        "" if refused else convert_command(checkpoint, target),
        prints,
    )
    yield from refused


def _refused(checkpoint: Checkpoint, target: Target) -> list[Case]:
    """Why the checkpoint cannot be converted for a target of the other kind."""
    if checkpoint.refusals:
        relayout = relayout_command(checkpoint, new_folder(checkpoint.path, "neox"))
        return [
            failure(f"refused-{refusal.key}", refusal.reason, way_out_of(refusal, relayout))
            for refusal in checkpoint.refusals
        ]
    try:
        if isinstance(target, TransformersFacts):
            refuse_version(checkpoint.architecture.name, checkpoint.config, target)
            make_plan(checkpoint, Options(to="hf"), "converted")
        else:
            make_plan(checkpoint, Options(to="neox", era=target), "converted")
    except Refused as error:
        return [failure("refused", str(error))]
    return []


def _cast_command(checkpoint: Checkpoint) -> str:
    """The command that writes the same kind of checkpoint in a dtype that models train in."""
    home = checkpoint.neox.root if checkpoint.neox is not None else checkpoint.path
    flags = ("--to", checkpoint.kind, "--dtype", "bfloat16")
    return convert_into(checkpoint, "bfloat16", *flags, home=home)


def _dtypes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weights of dtypes that the frameworks cast silently as they load."""
    for odd in odd_dtypes(checkpoint):
        if odd.castable:
            text = "; both frameworks cast them silently to the dtype of the run"
            way_out = _cast_command(checkpoint)
            yield Finding("weight-dtype", "warning", f"{odd.reason}{text}", way_out)
        else:
            text = ". Both frameworks load the integers as if they were the weights"
            yield Finding("weight-dtype", "error", f"{odd.reason}{text}", odd.way_out)


def _about(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The findings that do not depend on the target."""
    yield from _dtypes(checkpoint)
    yield from head_findings(checkpoint)
    yield from copy_findings(checkpoint)
    if drifted := drifted_biases(checkpoint):
        yield drifted.finding("convert writes the mean of the ranks, which is close to it")
    if checkpoint.kind == "hf":
        for finding in listed(checkpoint.unknown_keys):  # they prevent nothing from loading
            yield replace(finding, severity="info")
        for key in checkpoint.unknown_keys:
            if key.effect == "model":
                yield Finding("unknown-key", "warning", reason_of(key), remedy_of(key))
    if checkpoint.missing_tokenizer:
        return  # the finding of the checkpoint covers it
    entries, rows = checkpoint.tokenizer_size, checkpoint.config.dims["vocab"]
    entries = piece_count(checkpoint.tokenizer) if entries is None else entries
    if entries is None:
        message = "the folder has no tokenizer, so AutoTokenizer fails there"
        if checkpoint.kind == "neox":
            message = "the tokenizer is not known, so the number of vocabulary rows is not checked"
        way = "name the tokenizer when you convert: `tokenizer=PATH`"
        yield Finding("no-tokenizer", "info", message, way)
    elif entries > rows:
        yield Finding(
            "tokenizer-larger",
            "warning",
            f"the tokenizer has {entries} entries and the model {rows} rows: the last entries have "
            "no embedding",
            "check that it is this model's tokenizer",
        )


def written_by(checkpoint: Checkpoint) -> str:
    """The tools and versions that wrote a checkpoint, as far as its content shows."""
    words = []
    if tool := checkpoint.record.get("written_by"):
        source = checkpoint.record.get("source")
        name = source.get("name") if isinstance(source, dict) else None
        words.append(f"{tool} from {name}" if name else f"{tool}")
    state = checkpoint.neox
    if state is None:
        version = checkpoint.raw.get("transformers_version")
        words += [f"transformers {version} (config.json)"] if version else []
        if any(file.endswith(".bin") for file in checkpoint.files):
            words.append("torch (pytorch_model*.bin)")
        return ", ".join(words) or "a tool that left no name"
    era = fitting(state.mlp_names, state.inv_freq, checkpoint.raw)
    words = words or [words_of(state.writer)]
    stored = "stored" if state.inv_freq == "store" else "not stored"
    words.append(
        f"in the form of GPT-NeoX {era.until} ({state.mlp_names} names, inv_freq {stored})"
    )
    return ", ".join(words)
