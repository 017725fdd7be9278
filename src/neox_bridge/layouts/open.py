"""Detects the kind of a path, and opens it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint, Kind
from neox_bridge.layouts.file_names import HF_WEIGHTS, STEP, is_step_file
from neox_bridge.layouts.interrupted import interrupted
from neox_bridge.layouts.near_names import check_not_local, not_local_either, suggestions
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.layouts.universal_folder import LATEST, ZERO, is_universal
from neox_bridge.stores.folder import is_hub
from neox_bridge.stores.local_folder import missing_message
from neox_bridge.stores.paths import absolute, afresh, exists, is_local, isdir, lexists
from neox_bridge.tensors.fused import GqaOrder

_TOY = "To try neox-bridge without a network: neox-bridge toy pythia-70m pythia-70m --as hf"


def detect(path: str) -> Kind:
    """The kind of a folder: Hugging Face or GPT-NeoX. Raises BridgeError if it is neither."""
    if not isdir(path):
        from neox_bridge.layouts.folder_kinds import refuse_file

        refuse_file(path)
    names = [name for name in list_folder(path) if not name.startswith("._")]
    if "config.json" in names and any(map(HF_WEIGHTS.fullmatch, names)):
        return "hf"  # transformers' Trainer puts DeepSpeed's global_stepN beside them
    if STEP.fullmatch(os.path.basename(absolute(path))):
        return "neox"
    steps = any(map(STEP.fullmatch, names))
    raw = any(map(is_step_file, names))
    if raw or steps or {"latest", LATEST} & set(names) or (ZERO in names and is_universal(path)):
        if "config.json" in names:
            from neox_bridge.layouts.folder_kinds import refuse_foreign

            refuse_foreign(path)
        return "neox"
    if "config.json" in names:
        return "hf"
    from neox_bridge.layouts.raw_llama import is_raw_llama
    from neox_bridge.layouts.step_folder import renamed_steps

    if is_raw_llama(names):
        return "hf"
    if renamed_steps(path, names):
        return "neox"
    from neox_bridge.layouts.folder_kinds import refuse_foreign

    refuse_foreign(path)
    raise BridgeError(
        f"{path} is neither a Hugging Face model (no config.json) nor a GPT-NeoX checkpoint "
        "(no `latest`, no global_stepN, no layer_*-model_*-model_states.pt). "
        + ("Check the path." if list_folder(path) else "The folder is empty.")
    )


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    step: int | None = None,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
) -> Checkpoint:
    """Open a folder of either kind, by its path or URL, or a model of the Hugging Face Hub by its
    id, which downloads it; ``hf://`` before the id reads what is needed from there.

    gqa_order: how a GPT-NeoX source has the rows of grouped-query attention, where its files don't
    tell. Raises BridgeError or Refused; nothing
    in the checkpoint is executed.
    """
    place = find_place(source, revision, step)
    return open_place(source, place, step=step, configs=configs, gqa_order=gqa_order)


def open_place(
    source: str,
    place: "Place",
    *,
    step: int | None = None,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
) -> Checkpoint:
    """``open_checkpoint`` of a source whose place is known."""
    checkpoint = _open_folder(place.path, place.revision, step, configs, gqa_order)
    findings = (*checkpoint.findings, *place.findings)
    checkpoint = replace(checkpoint, source=source, hub_repo=place.repo, findings=findings)
    if place.files and checkpoint.kind == "hf":
        from neox_bridge.layouts.carried_files import left_of
        from neox_bridge.layouts.hf_reader import model_files

        carried = left_of(place.files, checkpoint.carried, model_files(checkpoint.files))
        checkpoint = replace(checkpoint, carried=carried)
    if checkpoint.missing_tokenizer:
        from neox_bridge.layouts.run_tokenizer import missing_finding

        if finding := missing_finding(checkpoint):
            checkpoint = replace(checkpoint, findings=(*checkpoint.findings, finding))
    home = checkpoint.neox.root if checkpoint.neox is not None else checkpoint.path
    return replace(checkpoint, findings=(*checkpoint.findings, *interrupted(home)))


def check_configs_used(configs: Sequence[str], *checkpoints: Checkpoint | StoredModel) -> None:
    """Raise UsageError if the user names yml files but every checkpoint has a yml."""
    states = [one.neox for one in checkpoints if one.neox is not None]
    if configs and not any(state.configs_given for state in states):
        raise UsageError(
            ["configs"], "only for a GPT-NeoX folder without a yml of its own", "Leave it out."
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where to read a source.

    Attributes:
        path: The folder, or its URL.
        revision: ``org/name@revision`` of a Hub model, or "".
        repo: ``org/name`` of a Hub model, or "".
        findings: What is worth telling about it.
        files: The files of that revision, if the folder may contain only some of them.
    """

    path: str
    revision: str = ""
    repo: str = ""
    findings: tuple[Finding, ...] = ()
    files: tuple[str, ...] = ()


def find_place(
    source: str, revision: str | None, step: int | None, *, by_ranges: bool = False
) -> Place:
    """Where to read a source that the user named.

    by_ranges: read a Hub model for transformers there, unless it is in the cache, instead of
        downloading it.
    """
    source = afresh(source)
    if is_hub(source):
        from neox_bridge.layouts.hub_source import find_url_source

        place = find_url_source(source, revision)
    elif exists(source):
        path, revision, named = _in_cache(source, revision)
        if revision is not None:
            raise UsageError(["revision"], f"only for models on the Hub, but {path} is a folder")
        return Place(path, named)
    else:
        from neox_bridge.layouts.hub_source import find_source

        model = _model_on_hub(source, revision)
        if step is not None:
            raise UsageError(
                ["step"],
                f"{source} is a model on the Hub, where each step is a branch",
                f"Name one with `revision=`: `revision=step{step}`. For a step's folder in a "
                f"branch, name the folder: hf://{model[0]}/global_step{step}",
            )
        try:
            place = find_source(*model, by_ranges=by_ranges)
        except BridgeError as error:
            raise not_local_either(error, source, _TOY) from None
        if isdir(os.path.dirname(source)):  # so the name may be a misspelled path
            message = f"there is no local folder {source}, so the model on the Hub is read"
            finding = Finding("read-from-hub", "info", message, suggestions(source))
            place = replace(place, findings=(finding, *place.findings))
    return Place(place.path, place.revision, place.repo, place.findings, place.files)


def _open_folder(
    path: str, named: str, step: int | None, configs: Sequence[str], gqa_order: GqaOrder | None
) -> Checkpoint:
    """Open a folder or its URL. named: its Hub revision, or ""."""
    if detect(path) == "neox":
        from neox_bridge.layouts.neox_reader import open_neox

        return open_neox(path, step, configs, gqa_order, revision=named)
    if wrong := ["step"] * (step is not None) + ["configs"] * bool(configs):
        raise UsageError(
            wrong,
            f"only for GPT-NeoX sources, but {named or path} is a Hugging Face model",
            "Name a step of a Hub model with `revision=`." if step is not None else "",
        )
    path = absolute(path)
    if not lexists(os.path.join(path, "config.json")):
        from neox_bridge.layouts.raw_llama import open_raw_llama

        return open_raw_llama(path)
    from neox_bridge.layouts.hf_reader import open_hf

    return open_hf(path, revision=named)


def _model_on_hub(source: str, revision: str | None) -> tuple[str, str | None]:
    """``org/name`` and the revision of a source that is not a folder.

    Raises BridgeError for what cannot be the name of a model.
    """
    from neox_bridge.stores.hub_names import model_id

    if os.path.islink(source):
        raise BridgeError(missing_message(source))
    model = model_id(source)
    if model is None or source.startswith((".", "/", "~")):
        raise BridgeError(f"{source}: no such folder. {suggestions(source)}".rstrip())
    repo, branch_in_name = model
    if branch_in_name and revision is not None:
        raise UsageError(["revision"], f"{source} already names a revision", "Leave it out.")
    if revision is None:
        check_not_local(source)
    return repo, branch_in_name or revision


def _in_cache(source: str, revision: str | None) -> tuple[str, str | None, str]:
    """The snapshot of a model folder in a cache, with its name; other sources unchanged."""
    from neox_bridge.layouts.hub_cache import is_cache_root, repo_of, snapshot_of

    if not isdir(source):
        return source, revision, ""
    root = absolute(source)
    if os.path.basename(root) == "snapshots":
        root = os.path.dirname(root)
    if not is_local(root) and not os.path.basename(root).startswith("models--"):
        return source, revision, ""  # a listing is a request
    if not is_cache_root(root, list_folder(root)):
        return source, revision, ""
    return snapshot_of(root, revision), None, f"{repo_of(root)}@{revision or 'main'}"
