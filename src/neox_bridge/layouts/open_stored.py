"""Opens a repository of weights for commands that need no family."""

import shlex
from collections.abc import Sequence
from dataclasses import replace

from neox_bridge.errors import BridgeError, ChoiceNeeded, NotOfFamily, Refused, SettingsMissing
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.file_names import STEP, is_step_file
from neox_bridge.layouts.folder_kinds import ForeignFolder
from neox_bridge.layouts.open import Place, find_place, open_place
from neox_bridge.layouts.quantized import QuantizedModel
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.layouts.stored_reader import of_quantized, open_stored
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.stores.paths import isdir
from neox_bridge.tensors.fused import GqaOrder

# files of the root of a repository whose models are in folders, of diffusers and of
# sentence-transformers
_COMPONENTS = frozenset({"model_index.json", "modules.json"})


def open_any(
    source: str,
    *,
    revision: str | None = None,
    step: int | None = None,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
    by_ranges: bool = False,
    always_configs: bool = False,
) -> Checkpoint | StoredModel:
    """``open_checkpoint``, or the weights as they are stored if they are of no known family.

    Args:
        source: A folder, a URL, or a model of the Hub.
        revision: As of ``open_checkpoint``, like the next three.
        step: See there.
        configs: See there.
        gqa_order: See there.
        by_ranges: Read a Hub model there, instead of downloading it.
        always_configs: Read configs in any case, not only if the checkpoint has no yml.

    Raises:
        BridgeError: A file is damaged or missing.
        Refused: It cannot be opened as a model, and contains no weights in files of their own.
    """
    place = find_place(source, revision, step, by_ranges=by_ranges)
    try:
        try:
            named = configs if always_configs else ()
            return open_place(source, place, step=step, configs=named, gqa_order=gqa_order)
        except SettingsMissing:
            if not configs or always_configs:
                raise
            return open_place(source, place, step=step, configs=configs, gqa_order=gqa_order)
    except ChoiceNeeded:
        raise
    except (Refused, ForeignFolder, NotOfFamily) as error:
        if isinstance(error, QuantizedModel) and error.model and error.model.kind == "neox":
            return _with_place(of_quantized(error.model, str(error)), source, place)
        if not is_repository(place.path, error):
            raise
        model = open_stored(place.path, str(error), place.revision)
        if model is None:
            raise
        return _with_place(model, source, place)


def read_alike(
    first: Checkpoint | StoredModel, second: Checkpoint | StoredModel
) -> tuple[Checkpoint | StoredModel, Checkpoint | StoredModel]:
    """Both as they are stored, unless both are of known families.

    Raises Refused for a GPT-NeoX checkpoint and a Hugging Face model of no known family.
    """
    for one, other in ((first, second), (second, first)):
        if isinstance(one, StoredModel) and other.kind != one.kind:
            hf, neox = (one, other) if one.kind == "hf" else (other, one)
            way_out = "Compare each of them with a checkpoint of its own kind."
            if isinstance(neox, Checkpoint) and not neox.architecture.neox_only:
                copy = shlex.quote(f"{neox.path}-hf")
                way_out = (
                    "To compare names, shapes and bits, convert the GPT-NeoX checkpoint first: "
                    f"neox-bridge convert {shlex.quote(neox.path)} {copy}, then neox-bridge diff "
                    f"{shlex.quote(hf.path)} {copy}"
                )
            raise Refused(
                f"{neox.path} is a GPT-NeoX checkpoint, and {hf.path} a Hugging Face repository. "
                "Only the rules of a family tell which of their tensors belong together, and they "
                f"cannot be used here. {one.reason} {way_out}"
            )
    if isinstance(first, Checkpoint) and isinstance(second, Checkpoint):
        return first, second
    return stored_model_of(first), stored_model_of(second)


def stored_model_of(model: Checkpoint | StoredModel) -> StoredModel:
    """The weights of an open Hugging Face model as they are stored."""
    if isinstance(model, StoredModel):
        return model
    stored = open_stored(model.path, "", model.revision)
    assert stored is not None  # its weights are known
    return replace(stored, source=model.source, hub_repo=model.hub_repo)


def _with_place(model: StoredModel, source: str, place: Place) -> StoredModel:
    findings = (*model.findings, *place.findings)
    return replace(model, source=source, hub_repo=place.repo, findings=findings)


def is_repository(path: str, error: BridgeError | None) -> bool:
    """Whether a folder may be a repository of weights. error: why it is no model of a family."""
    if not isdir(path):
        return False
    names = list_folder(path)
    if any(is_step_file(name) or STEP.fullmatch(name) for name in names):
        return False
    if not isinstance(error, ForeignFolder) or error.kind == "adapter":
        return True
    if error.kind == "weights-only":
        return any(name.endswith(".safetensors") for name in names)
    return bool(_COMPONENTS & set(names))
