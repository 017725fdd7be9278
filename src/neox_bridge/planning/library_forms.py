"""Hugging Face folders in the format of a library other than transformers; see ``Form``."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from neox_bridge.architectures.base import Architecture, Form, ModelConfig
from neox_bridge.errors import Refused, UsageError
from neox_bridge.findings import Dropped
from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint, refuse_all
from neox_bridge.planning.options import SHARD_SIZE, Options
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

WEIGHTS = "pytorch_model.bin"
_TRANSFORMERS = "transformers"


def chosen_form(architecture: Architecture, options: Options) -> Form | None:
    """The format of ``options.format``; None for transformers. Raises Refused for other formats."""
    if options.format in (None, _TRANSFORMERS):
        return None
    names = ", ".join([_TRANSFORMERS, *(form.name for form in architecture.forms)])
    form = next((form for form in architecture.forms if form.name == options.format), None)
    if form is None:
        raise Refused(
            f"`format={options.format}`: {architecture.name} cannot be written in this format. "
            f"Valid values: {names}."
        )
    if options.shard_size != SHARD_SIZE or options.shards != "size":
        raise UsageError(
            ["shard_size", "shards"], f"{form.name} reads only one file", "Leave them out."
        )
    return form


def form_weights(
    form: Form, architecture: Architecture, config: ModelConfig, tensors: Sequence[OutputTensor]
) -> OutputFile:
    """Lay out the state dict. A tied head is the embeddings tensor under a second name."""
    named = OrderedDict((form.names.get(t.name, t.name), TensorSlot(t.name)) for t in tensors)
    if config.tied_embeddings:
        head = form.names.get(architecture.head, architecture.head)
        named[head] = TensorSlot(architecture.embeddings)
    return layout_pt(WEIGHTS, named, tensors)


def form_settings(
    form: Form,
    checkpoint: Checkpoint,
    config: ModelConfig,
    hf_config: Mapping[str, Any],
    original: Mapping[str, Any],
    entries: int | None,
) -> tuple[dict[str, Any], list[Dropped]]:
    """The config.json, and the settings of the source that it cannot contain.

    Args:
        form: The format of the target.
        checkpoint: The source.
        config: The settings of the model.
        hf_config: The config.json of transformers.
        original: The config.json that this model had in the format; {} if there was none.
        entries: The entries of the tokenizer; None if unknown.

    Raises:
        Refused: The format cannot express the model.
    """
    refuse_all(form.refuse(config, hf_config), checkpoint.path)
    why = f"{form.name} has no such setting. It is kept in {RECORD}"
    had = checkpoint.raw if checkpoint.kind == "hf" else checkpoint.record.get("config") or {}
    lost = [Dropped(f"config.json: {key}", why) for key in form.lost if had.get(key) is not None]
    rows = config.dims["vocab"]
    return form.write(config, hf_config, original, min(rows, entries or rows)), lost
