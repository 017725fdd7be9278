"""Fixes a checkpoint for a target: recomputable values, names of an era, spellings of a config.

The plans are those of a conversion to the same kind and layout. Files that need not change are
copied unchanged. Learned values are never changed. Stored values that do not follow from the config
are neither dropped nor replaced unless the user says so.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from neox_bridge.architectures.transformers_limits import refuse_version
from neox_bridge.doctor.fix_changes import new_args
from neox_bridge.doctor.judge_hf import stored_names
from neox_bridge.doctor.judge_neox import stores_inv_freq
from neox_bridge.doctor.neox_folder import stray_ranks
from neox_bridge.doctor.resuming import cannot_resume, resharding
from neox_bridge.doctor.verdict import convert_command, fix_command
from neox_bridge.errors import BridgeError, Refused, Unverified
from neox_bridge.findings import Dropped
from neox_bridge.formats.yml import dump_yml
from neox_bridge.frameworks.eras import FLAG, Era, InvFreq, fitting, known_keys
from neox_bridge.frameworks.facts import TransformersFacts, TreeFacts
from neox_bridge.frameworks.targets import Target
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint, NeoxState, refuse_all
from neox_bridge.layouts.derived_values import mismatch_finding
from neox_bridge.layouts.file_names import STEP
from neox_bridge.layouts.linked_files import check_own
from neox_bridge.layouts.missing_files import refuse_missing_ranks
from neox_bridge.layouts.open import open_checkpoint
from neox_bridge.layouts.seal import unsealed
from neox_bridge.layouts.text_files import LARGE_BYTES, read_bytes, read_json
from neox_bridge.planning.common import text_file
from neox_bridge.planning.era_checks import reason_dropped
from neox_bridge.planning.make import make_plan
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.vocabulary import FIRST_MULTIPLE, padded_size, padding_multiple
from neox_bridge.stores.paths import listdir, real, walk
from neox_bridge.tensors.fused import GqaOrder
from neox_bridge.tensors.pieces import OutputFile
from neox_bridge.verification.sealed import check_seal, find_record
from neox_bridge.verification.verify import Verification, summary, verify
from neox_bridge.wording import some

# Trees with other names also have other settings for a gated MLP (neox-gated-mlp).
_Copy = TypeVar("_Copy")
_GATED_KEYS = ("activation", "mlp_type", "intermediate_size", "use_bias_in_mlp", "mlp_multiple_of")
_WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")


def fix_plan(
    checkpoint: Checkpoint,
    target: Target | None,
    folder: str,
    *,
    recompute: bool = False,
    drop_optimizer: bool = False,
    ignore_keys: tuple[str, ...] = (),
    given_yml: bool = False,
    in_place: bool = False,
) -> Plan | None:
    """Plan a fixed copy of a checkpoint in ``folder``. Returns None if nothing has to change.

    The plan of a GPT-NeoX checkpoint contains the files of the run's root and of one global_stepN.

    Args:
        checkpoint: The checkpoint.
        target: What should load the copy. None: fix only what the checkpoint itself shows.
        folder: The folder of the copy.
        recompute: Drop or replace stored values that deviate from those computed from the config.
        drop_optimizer: Leave out optimizer states that cannot be kept.
        ignore_keys: See ``Options``. The fixed yml does not contain these keys.
        given_yml: Whether the user named the yml files; the copy then gets their settings.
        in_place: Whether the copy replaces the checkpoint, so that its step keeps its name.

    Raises:
        Refused: The target cannot run the model, or the checkpoint cannot be replaced.
        BridgeError: The target is of the other framework.
    """
    other = TransformersFacts if checkpoint.kind == "neox" else TreeFacts
    if isinstance(target, other):
        raise BridgeError(
            f"{checkpoint.path} is of the other framework, so that fixing it is not enough: "
            f"{convert_command(checkpoint, target)}"
        )
    if checkpoint.kind == "hf":
        if isinstance(target, TransformersFacts):
            refuse_version(checkpoint.architecture.name, checkpoint.config, target)
        plan = _fix_hf(checkpoint, folder, recompute, ignore_keys)
    else:
        facts = target if isinstance(target, TreeFacts) else None
        plan = _fix_neox(
            checkpoint, facts, folder, recompute, drop_optimizer, ignore_keys, given_yml
        )
    if plan is None or not in_place:
        return plan
    flags = ["--recompute"] * recompute + ["--drop-optimizer"] * drop_optimizer
    if checkpoint.revision:
        raise Refused(
            f"{checkpoint.revision} is on the Hub, where `in_place=True` cannot replace it. Write "
            f"a copy here: {fix_command(checkpoint, target, *flags)}"
        )
    state = checkpoint.neox
    if state is None:
        return plan
    if state.flat or not STEP.fullmatch(state.step):
        raise Refused(
            f"{state.folder} contains the files of one step, and `in_place=True` replaces only the "
            f"folder of a step that is named global_stepN, as GPT-NeoX names it. Write a run with "
            f"such a folder beside it: {fix_command(checkpoint, target, *flags)}"
        )
    return _with_name_kept(plan, state)


def _fix_hf(
    checkpoint: Checkpoint, folder: str, recompute: bool, ignore_keys: tuple[str, ...]
) -> Plan | None:
    plan = make_plan(checkpoint, Options(to="hf", ignore_keys=ignore_keys), folder)
    new = {file.path: file for file in plan.files}
    config = new["config.json"]
    old = read_json(os.path.join(checkpoint.path, "config.json"))
    planned = {tensor.name for file in plan.files for tensor in file.tensors}
    stored = stored_names(checkpoint)
    rewrite = set(stored) != planned or checkpoint.unindexed
    if not rewrite and _json(config) == old:
        return None
    if any(name.endswith("inv_freq") for name in stored):
        _refuse_deviating(checkpoint, recompute)
    kept = [config] if _json(config) != old else []
    skipped = {"config.json"} if kept else set()
    if rewrite:
        kept += [file for file in plan.files if file.path.endswith(_WEIGHTS)]
        held = {os.path.basename(path) for path in checkpoint.files}
        skipped |= held | {
            f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")
        }
    if ignore_keys or not checkpoint.record:
        kept.append(new[RECORD])
        skipped.add(RECORD)
    files = [*kept, *other_files(checkpoint.path, lambda path: path in skipped)]
    return replace(plan, files=tuple(files), notes=())


def _json(file: OutputFile) -> Any:
    return json.loads(b"".join(data for _, data in file.literals))


def _refuse_deviating(checkpoint: Checkpoint, recompute: bool) -> None:
    if checkpoint.inv_freq_mismatch is not None and not recompute:
        what = mismatch_finding(checkpoint.inv_freq_mismatch).message
        raise Refused(
            f"{what}. It would be lost, and transformers before 4.35 computed with it. If the "
            "config is right, add `recompute=True`."
        )


def _fix_neox(
    checkpoint: Checkpoint,
    facts: TreeFacts | None,
    folder: str,
    recompute: bool,
    drop_optimizer: bool,
    ignore_keys: tuple[str, ...],
    given_yml: bool,
) -> Plan | None:
    state = checkpoint.neox_state
    refuse_missing_ranks(state)
    if facts is not None:
        reasons = checkpoint.architecture.refuse_shape(state.tp, facts.name.removeprefix("neox@"))
        refuse_all(reasons, checkpoint.path)
    era = facts or fitting(state.mlp_names, state.inv_freq, checkpoint.raw)
    inv_freq = _inv_freq(checkpoint, state, facts)
    names = facts.mlp_names if facts else state.mlp_names
    strays = stray_ranks(state.folder)
    options = Options(
        to="neox",
        era=era,
        inv_freq=inv_freq,
        mlp_names=names,
        vocab_multiple=_multiple(checkpoint, state),
        # the number of pipeline stages according to the files that are used
        pp=0 if state.layout == "ranks" else max(1, state.pp - len(strays) // state.tp),
        ignore_keys=ignore_keys,
    )
    plan = make_plan(checkpoint, options, folder)
    deviates = checkpoint.inv_freq_mismatch is not None
    rows = plan.target["vocab_rows"] != checkpoint.config.dims["vocab"]
    rewrite = names != state.mlp_names or inv_freq != state.inv_freq or rows
    if state.inv_freq == "store" and deviates:
        if rewrite:
            _refuse_deviating(checkpoint, recompute)
        rewrite = rewrite or recompute
    args = new_args(checkpoint, plan)
    remeta = any(state.args.get(key, value) != value for key, value in args.items())
    remeta = remeta or (rewrite and state.layout == "ranks")
    parted = remeta or names != state.mlp_names
    if lost := _optimizer(checkpoint, facts, parted, drop_optimizer):
        remeta = True
    yml = _yml(checkpoint, era, plan, inv_freq)
    if not (rewrite or remeta or strays or state.flat or yml is not None):
        return None
    if yml is None and (given_yml or not os.path.isdir(os.path.join(state.folder, "configs"))):
        yml = {key: value for key, value in checkpoint.raw.items() if key in known_keys(era)}
    gone = {*strays, *(state.optimizer if lost else ()), *_moved(checkpoint, state, yml)}
    reorders = _tells_another_order(checkpoint, plan, rewrite)
    if rows or reorders or ignore_keys or not checkpoint.record:
        gone.add(RECORD)
    files = _neox_files(state, plan, rewrite, remeta, yml, gone)
    dropped = [d for d in plan.dropped if d.kind != "optimizer" or lost]
    below = "" if state.flat else f"{state.step}/"
    dropped += [
        Dropped(f"{below}{name}", "left over from another layout", "stray") for name in strays
    ]
    refused = sorted(set(checkpoint.raw) - known_keys(era))
    dropped += [Dropped(f"yml: {k}", reason_dropped(k, era.name), "setting") for k in refused]
    notes = []
    if cannot_resume(checkpoint, era.states):
        notes.append("finetune: true is set in the yml: GPT-NeoX cannot resume from the states")
    return replace(
        plan,
        files=tuple(files),
        dropped=tuple(dict.fromkeys(dropped)),
        notes=tuple(notes),
    )


def _tells_another_order(checkpoint: Checkpoint, plan: Plan, rewrite: bool) -> bool:
    """Whether the record would imply another order of grouped-query rows than the new files."""
    recorded, order = checkpoint.record.get("gqa_order"), plan.target.get("gqa_order")
    return rewrite and recorded is not None and recorded != order


def _inv_freq(checkpoint: Checkpoint, state: NeoxState, facts: TreeFacts | None) -> InvFreq:
    """Whether to store inv_freq, as the target expects; the checkpoint's yml may decide it."""
    wanted = None if facts is None else stores_inv_freq(checkpoint, facts)
    if wanted is None:
        return state.inv_freq
    if facts is not None and facts.buffer == "flag" and wanted != (state.inv_freq == "store"):
        return "omit"
    return "store" if wanted else "omit"


def _multiple(checkpoint: Checkpoint, state: NeoxState) -> int | None:
    """The checkpoint's multiple, or None if it does not result in the existing rows."""
    multiple = padding_multiple(state.args, checkpoint.raw)
    size = checkpoint.tokenizer_size or checkpoint.config.dims["vocab"]
    fits = padded_size(size, multiple, state.tp) == checkpoint.config.dims["vocab"]
    return multiple if fits else None


def _yml(checkpoint: Checkpoint, era: Era, plan: Plan, inv_freq: InvFreq) -> dict[str, Any] | None:
    """The settings as one file; None if the existing files need no change."""
    state, known = checkpoint.neox_state, known_keys(era)
    fixed = {key: value for key, value in checkpoint.raw.items() if key in known}
    if checkpoint.architecture.gated and plan.target["mlp_names"] != state.mlp_names:
        planned = _planned_yml(plan)
        fixed = {k: v for k, v in fixed.items() if k not in _GATED_KEYS}
        fixed |= {key: planned[key] for key in _GATED_KEYS if key in planned}
    tokenizer = state.args.get("tokenizer_type", "HFTokenizer")
    wanted: dict[str, tuple[Any, Any]] = {  # value, and GPT-NeoX's default
        "pipe_parallel_size": (plan.target["pipeline_stages"], 0),
        "model_parallel_size": (state.tp, 1),
        "make_vocab_size_divisible_by": (plan.target["vocab_multiple"], FIRST_MULTIPLE),
        "tokenizer_type": (tokenizer, "GPT2BPETokenizer"),
    }
    if int(fixed.get("pipe_parallel_size") or 0) > 0 and state.layout == "layers":
        del wanted["pipe_parallel_size"]  # any number of stages loads it
    for key, (value, default) in wanted.items():
        if fixed.get(key, default) != value:
            fixed[key] = value
    if cannot_resume(checkpoint, era.states):
        fixed["finetune"] = True
    if FLAG in known and (inv_freq == "store") != bool(fixed.get(FLAG, False)):
        fixed[FLAG] = inv_freq == "store"
    return fixed if state.duplicate_keys or fixed != dict(checkpoint.raw) else None


def _planned_yml(plan: Plan) -> dict[str, Any]:
    """The settings that the plan of a conversion writes into the step."""
    import yaml

    (file,) = (f for f in plan.files if f.path.endswith("/configs/neox_bridge.yml"))
    settings: dict[str, Any] = yaml.safe_load(b"".join(data for _, data in file.literals))
    return settings


def _optimizer(checkpoint: Checkpoint, facts: TreeFacts | None, parted: bool, drop: bool) -> bool:
    """Whether optimizer states are dropped. Raises Refused if they must be but may not be."""
    # They can be kept if only buffers and settings change: ZeRO's partitions are the parameters in
    # the order of the modules, without buffers. With renamed parameters, other rows or new metadata
    # (learning-rate schedule, data-parallel size) they no longer belong to the weights.
    if not parted or not checkpoint.has_optimizer:
        return False
    if not drop:
        command = resharding(checkpoint, facts) if facts is not None else ""
        raise Refused(
            f"{checkpoint.path} has optimizer states, which cannot be kept: names of parameters or "
            "the files with the learning-rate schedule must change. Use `drop_optimizer=True` to "
            "continue from the weights alone (finetune: true)"
            + (f", or rewrite the whole run: {command}" if command else ".")
        )
    return True


def _neox_files(
    state: NeoxState,
    plan: Plan,
    rewrite: bool,
    remeta: bool,
    yml: dict[str, Any] | None,
    gone: set[str],
) -> list[OutputFile]:
    """The planned files where something changes, and the checkpoint's files otherwise."""
    name = f"global_step{state.iteration}"
    new = {file.path: file for file in plan.files}
    files = [
        file
        for path, file in new.items()
        if (rewrite and "/layer_" in path) or (remeta and "/mp_rank_" in path)
    ]
    if yml is not None:
        text = dump_yml([("the settings of the run, fixed by neox-bridge doctor", yml)])
        files.append(text_file(f"{name}/configs/neox_bridge.yml", text))

    def replaced(path: str) -> bool:
        changed = {"layer_": rewrite, "mp_rank_": remeta, "configs/": yml is not None}
        return path in gone or any(path.startswith(k) and v for k, v in changed.items())

    old = other_files(state.folder, replaced)
    files += [replace(file, path=f"{name}/{file.path}") for file in old]
    record = [f"{name}/{RECORD}"] if RECORD in gone else []
    above = [path for path in new if not path.startswith(f"{name}/")]
    return [*files, *(new[path] for path in (*record, *above))]


def _moved(checkpoint: Checkpoint, state: NeoxState, yml: dict[str, Any] | None) -> Iterator[str]:
    """Files in the step's folder that move to another place in the copy: its yml, its tokenizer."""
    above = (*checkpoint.tokenizer, *checkpoint.carried.paths) if state.flat else ()
    for path in (*above, *(state.configs if yml is not None else ())):
        if os.path.dirname(path) == state.folder:
            yield os.path.basename(path)
    if state.flat:
        yield from (name for name in listdir(state.folder) if name.startswith(".git"))


def _with_name_kept(plan: Plan, state: NeoxState) -> Plan:
    """The plan with the step's original name instead of the name from its number."""
    planned = re.compile(rf"global_step{state.iteration}(?=/)")
    files = tuple(
        replace(file, path=planned.sub(state.step, file.path, 1))
        if planned.match(file.path)
        else file
        for file in plan.files
    )
    return replace(plan, files=files, target={**plan.target, "step": state.step})


def other_files(folder: str, skip: Callable[[str], bool]) -> Iterator[OutputFile]:
    """Copies of all files below a folder, except those to skip (by relative path)."""
    for path, size in walk(folder):
        inside = path[len(os.path.join(folder, "")) :]
        if size is None or skip(inside) or ".git" in inside.split("/"):
            continue
        check_own(path, folder)
        if os.path.basename(path) == RECORD:
            yield _record(path, inside)
        else:
            yield OutputFile(inside, size, copy_of=real(path))


def _record(path: str, inside: str) -> OutputFile:
    """The record, updated with the hashes of the new files; a plain copy if it is unreadable."""
    data = read_bytes(path, LARGE_BYTES)
    try:
        return text_file(inside, unsealed(data), seals=True)
    except (ValueError, TypeError):
        return OutputFile(inside, len(data), copy_of=real(path))


def in_place(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The part of a plan that replaces the checkpoint: all of a Hugging Face folder, or one step.

    Raises Refused if the folder contains what the plan does not, which would be deleted.
    """
    state = checkpoint.neox
    folder = replaced(checkpoint)
    prefix = f"{state.step}/" if state is not None else ""
    files = tuple(file for file in plan.files if file.path.startswith(prefix))
    refuse_not_copied(folder)
    return replace(plan, files=files)


def replaced(checkpoint: Checkpoint) -> str:
    """The folder that --in-place replaces."""
    return os.path.realpath(checkpoint.neox.folder if checkpoint.neox else checkpoint.path)


def refuse_not_copied(folder: str) -> None:
    """Raise Refused if a folder that a fixed copy replaces contains what the copy does not."""
    if lost := list(_not_copied(folder)):
        raise Refused(
            f"{folder} contains what the fixed copy would not, so it is not replaced: "
            f"{some(lost, 5)}. Move that elsewhere, or write the copy beside it with `fix=DST`."
        )


def _not_copied(folder: str) -> Iterator[str]:
    """What ``other_files`` skips: links to folders, empty folders, .git, special files."""
    for parent, folders, names in os.walk(folder):
        for name in folders:
            path = os.path.join(parent, name)
            if name == ".git" or os.path.islink(path) or not os.listdir(path):
                yield f"{os.path.relpath(path, folder)}/"
        folders[:] = [name for name in folders if name != ".git"]
        for name in names:
            path = os.path.join(parent, name)
            if not os.path.isfile(path):
                yield os.path.relpath(path, folder)


def checker(checkpoint: Checkpoint, plan: Plan) -> Callable[[str], None]:
    """A check for ``execute``: raises Unverified if a fixed folder is not as planned.

    Checks that every file has its recorded hash, and that the copy opens as the same model with the
    same weights.
    """

    def read(folder: str) -> Verification:
        return verify(checkpoint, open_checkpoint(folder, gqa_order=_order(checkpoint, plan)))

    def check(folder: str) -> None:
        comparison = read_back(folder, read)
        if not comparison.holds:
            raise Unverified(
                f"The fixed copy differs from {checkpoint.path}: {summary(comparison)}."
            )

    return check


def read_back(folder: str, read: Callable[[str], _Copy]) -> _Copy:
    """What ``read`` returns for a fixed copy.

    Raises Unverified if it cannot be read, or if a file has another hash than its record says.
    """
    try:
        seal = check_seal(find_record(folder))
        copy = read(folder)
    except BridgeError as error:
        raise Unverified(f"The fixed copy cannot be read: {error}") from None
    if seal.changes:
        names = some([change.path for change in seal.changes])
        raise Unverified(f"The fixed copy differs from what was written: {names}.")
    return copy


def _order(checkpoint: Checkpoint, plan: Plan) -> GqaOrder | None:
    """The order of grouped-query rows in the copy, if its files do not show it."""
    state = checkpoint.neox
    if state is None:
        return None
    rewritten = any(file.tensors for file in plan.files if "_states" in file.path)
    order = plan.target.get("gqa_order") if rewritten else None
    return order or state.gqa_order  # type: ignore[return-value]
