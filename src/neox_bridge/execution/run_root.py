"""The files in the root of a GPT-NeoX run: start-up ymls, tokenizer/ and huggingface/.

A file that neox-bridge wrote and nobody edited (its hash is in the records of the steps) is
replaced by the file of the new step. An edited file is kept, and contradictions are reported.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.digests import hash_file
from neox_bridge.execution.install import LATEST, RootFiles
from neox_bridge.findings import Finding
from neox_bridge.formats.yml import parse_yml, read_yml
from neox_bridge.layouts.carried_names import FOLDER as CARRIED
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.open import open_checkpoint
from neox_bridge.layouts.record_file import Entry, written_above
from neox_bridge.layouts.text_files import LARGE_BYTES, list_folder, read_bytes, read_text
from neox_bridge.layouts.tokenizer import FOLDER as TOKENIZER
from neox_bridge.planning.model_identity import differences, identity_of
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.paths import isdir, isfile, size
from neox_bridge.tensors.pieces import OutputFile
from neox_bridge.wording import some

_STARTS = ("finetune.yml", "resume.yml", "resume_universal.yml")
_UNIVERSAL = ("resume_universal.yml",)  # started by latest_universal


@dataclass(frozen=True)
class _Run:
    """An existing run that gets a step.

    Attributes:
        written: See ``written_above``.
        others: Its other steps.
        model: One of its checkpoints, or None.
        unlike: The config keys in which that model differs.
    """

    path: str
    names: tuple[str, ...]
    written: Mapping[str, set[Entry]]
    others: tuple[str, ...]
    model: Checkpoint | None
    unlike: tuple[str, ...]


@dataclass
class _Changes:
    """The decisions so far about the files of a root: see ``RootFiles``."""

    findings: list[Finding]
    names: dict[str, str] = field(default_factory=dict)
    retired: list[str] = field(default_factory=list)


def root_files(plan: Plan, root: str, step: str, *, overwrite: bool) -> RootFiles:
    """Decide what a conversion writes into the root of an existing run. Writes nothing.

    Raises Refused if the run is of another model and ``overwrite`` is not set, or if its edited
    tokenizer does not match this model.
    """
    run = _look(plan, root, step, overwrite=overwrite)
    if run.unlike and not overwrite:
        raise Refused(
            f"{root} is a run of another model ({some(list(run.unlike), 3)}), and its "
            f"finetune.yml and {TOKENIZER}/ can belong to only one model. Choose another target, "
            f"or use `overwrite=True` to write {step} there anyway."
        )
    changes = _Changes(findings=_strangers(run, step))
    for file in plan.files:
        if "/" not in file.path and file.path not in LATEST:
            _add_start(plan, file, run, changes)
    _add_tokenizer(plan, run, changes)
    _add_carried(plan, run, changes)
    changes.findings += _left_behind(plan, run, step)
    return RootFiles(step, changes.names, tuple(changes.retired), tuple(changes.findings))


def _look(plan: Plan, root: str, step: str, *, overwrite: bool) -> _Run:
    names = tuple(list_folder(root))
    others = tuple(n for n in names if n.startswith("global_step") and n != step)
    try:
        model = _reference(root, names, others or (step,))
    except BridgeError as error:
        if not overwrite:
            raise Refused(
                f"{root} is an existing run, and its model cannot be compared with this one: "
                f"{error} Choose another target, or use `overwrite=True` to write {step} there."
            ) from None
        model = None
    unlike = tuple(_unlike(plan, model)) if model is not None else ()
    return _Run(root, names, written_above(root), others, model, unlike)


def _reference(root: str, names: Sequence[str], steps: Sequence[str]) -> Checkpoint | None:
    """The checkpoint that represents the run: the one that ``latest`` names, or the last one."""
    there = [step for step in steps if step in names]
    if not there:
        return None
    latest = read_text(os.path.join(root, "latest")).strip() if "latest" in names else ""
    there.sort(key=lambda step: (step == latest, len(step), step))
    return open_checkpoint(os.path.join(root, there[-1]))


def _unlike(plan: Plan, model: Checkpoint) -> list[str]:
    if plan.model is None:
        return []
    rows = model.vocab_rows
    old = identity_of(model.architecture.name, model.config, rows)
    reasons = differences(old, plan.model)
    if not reasons and not _same_vocabulary(plan, model.tokenizer):
        reasons = ["another tokenizer"]
    return reasons


def _same_vocabulary(plan: Plan, existing: Sequence[str]) -> bool:
    """Whether two tokenizers are equal; True if either side has none."""
    new = next((f for f in plan.files if f.path == f"{TOKENIZER}/tokenizer.json"), None)
    old = next((path for path in existing if os.path.basename(path) == "tokenizer.json"), None)
    if new is None or old is None:
        return True
    first, second = _bytes(new), read_bytes(old, LARGE_BYTES)
    return first == second or _vocabulary(first) == _vocabulary(second)


def _vocabulary(data: bytes) -> object:
    try:
        value = json.loads(data)
        return value["model"], value.get("added_tokens")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data


def _strangers(run: _Run, step: str) -> list[Finding]:
    if not run.unlike or not run.others:
        return []
    return [
        Finding(
            "other-model",
            "warning",
            f"{some(list(run.others), 3)} in {run.path} are steps of another model "
            f"({some(list(run.unlike), 3)}); the files beside them now belong to {step}",
            f"delete them, or move {step} to its own folder",
        )
    ]


def _add_start(plan: Plan, file: OutputFile, run: _Run, changes: _Changes) -> None:
    """Add a start-up yml: replace an unedited one, or write it next to an edited one."""
    name = file.path
    if name not in run.names:
        changes.names[name] = name
        return
    old, new = os.path.join(run.path, name), _bytes(file)
    if _is(old, new):
        return
    if _pristine(run, name):
        changes.names[name] = name
        changes.retired.append(name)
        return
    keys = _contradictions(plan, old, new)
    if not keys:
        return
    beside = _free(run, name, new)
    if beside is not None:
        changes.names[name] = beside
        if beside in run.names:
            changes.retired.append(beside)
    other = beside or f"{name[:-4]}.new.yml"
    changes.findings.append(
        Finding(
            "start-yml-edited",
            "warning",
            f"{old} was edited, so it is kept, but it contradicts {plan.target.get('step')}: "
            f"{some(keys, 8)}. {other} beside it has the settings of this step",
            f"copy these keys from {other}",
        )
    )


def _free(run: _Run, name: str, new: bytes) -> str | None:
    """A free name next to an edited yml, or that of an unedited one; None if it already exists."""
    stem, number = name[:-4], 1
    while True:
        beside = f"{stem}.new{'' if number == 1 else f'-{number}'}.yml"
        path = os.path.join(run.path, beside)
        if beside in run.names and _is(path, new):
            return None
        if beside not in run.names or _pristine(run, beside, name):
            return beside
        number += 1


def _contradictions(plan: Plan, old: str, new: bytes, *, whole: bool = True) -> list[str]:
    """Describe the keys of a start-up yml that contradict the checkpoint.

    whole: whether a missing key counts as a contradiction.
    """
    planned = parse_yml(new, old)
    try:
        existing = read_yml(old)
    except BridgeError as error:
        return [str(error)]
    both = dict.fromkeys(key for key in plan.fixed if key in planned)
    return [
        f"{key}: {existing.get(key, 'missing')} there, {planned[key]} here"
        for key in both
        if existing.get(key) != planned[key] and (whole or key in existing)
    ]


def _left_behind(plan: Plan, run: _Run, step: str) -> list[Finding]:
    """Start-up ymls of other commands that no longer match ``latest``."""
    findings = []
    planned = next((f for f in plan.files if f.path in _STARTS), None)
    for name in _STARTS:
        same_latest = planned is not None and (name in _UNIVERSAL) == (planned.path in _UNIVERSAL)
        if planned is None or name == planned.path or name not in run.names or not same_latest:
            continue
        path = os.path.join(run.path, name)
        if keys := _contradictions(plan, path, _bytes(planned), whole=False):
            findings.append(
                Finding(
                    "start-yml-outdated",
                    "warning",
                    f"{path} contradicts {step}, which `latest` names now: {some(keys, 8)}",
                    f"start from {planned.path}, or copy these keys from it",
                )
            )
    return findings


def _add_tokenizer(plan: Plan, run: _Run, changes: _Changes) -> None:
    tokenizer = _Folder(plan, run, TOKENIZER)
    folder, planned = tokenizer.path, tokenizer.planned
    if tokenizer.fits or (not planned and not run.unlike):
        return
    if tokenizer.is_pristine:
        tokenizer.replace(changes)
        return
    main = os.path.join(folder, "tokenizer.json")
    if not planned or not _same_vocabulary(plan, (main,) if isfile(main) else ()):
        raise Refused(
            f"{folder} was edited, so it is not replaced, but this model has another tokenizer. "
            "Move that folder away, or choose another target."
        )
    changes.findings.append(
        Finding(
            "tokenizer-edited",
            "info",
            f"{folder} was edited, so it is kept; its vocabulary matches the model",
        )
    )


def _add_carried(plan: Plan, run: _Run, changes: _Changes) -> None:
    folder = _Folder(plan, run, CARRIED)
    if folder.fits or (not folder.planned and not run.unlike):
        return
    if folder.is_pristine:
        folder.replace(changes)
        return
    if run.unlike:
        raise Refused(
            f"{folder.path} was edited, so it isn't replaced, and it holds the license or the card "
            "of another model. Move that folder away, or name another target."
        )
    changes.findings.append(
        Finding(
            "carried-files-edited",
            "info",
            f"{folder.path} was edited, so it stays, and the source's files of the same names are "
            "not written",
        )
    )


class _Folder:
    """A folder in the root of a run: its current and its planned content.

    Attributes:
        path: Its path.
        planned: The planned files in it, by their paths relative to the run.
        fits: Whether it needs no change.
        is_pristine: Whether no file was edited since conversions wrote it; true if it is missing.
    """

    def __init__(self, plan: Plan, run: _Run, name: str) -> None:
        self.name, self.exists = name, name in run.names
        self.path = os.path.join(run.path, name)
        self.planned = {f.path: f for f in plan.files if f.path.startswith(f"{name}/")}
        there = [f"{name}/{n}" for n in list_folder(self.path)] if isdir(self.path) else []
        self.fits = set(self.planned) == set(there) and all(
            _is(os.path.join(run.path, path), _bytes(file)) for path, file in self.planned.items()
        )
        is_folder = isdir(self.path) or not self.exists
        self.is_pristine = is_folder and all(_pristine(run, path) for path in there)

    def replace(self, changes: _Changes) -> None:
        """Replace it with the planned files."""
        if self.exists:
            changes.retired.append(self.name)
        if self.planned:
            changes.names[self.name] = self.name


def _pristine(run: _Run, path: str, written_as: str = "") -> bool:
    """Whether a file of the root is as a conversion wrote it. written_as: its original name."""
    place = os.path.join(run.path, path)
    if not isfile(place):
        return False
    length = size(place)
    return any(
        length == written and digest is not None and hash_file(place, kind or "xxh3_128") == digest
        for written, digest, kind in run.written.get(written_as or path, ())
    )


def _is(path: str, data: bytes) -> bool:
    return isfile(path) and size(path) == len(data) and read_bytes(path, LARGE_BYTES) == data


def _bytes(file: OutputFile) -> bytes:
    """The content of a small file of the plan."""
    if file.copy_of is not None:
        return read_bytes(file.copy_of, LARGE_BYTES)
    return b"".join(data for _, data in file.literals)
