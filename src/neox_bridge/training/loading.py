"""Starts a run of GPT-NeoX from a Hugging Face model: each rank reads its own part of the weights.

The plan is that of ``convert``, for the tree in which it runs. The tensors of this rank are read
from the source's files into the parameters. No checkpoint is written.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import yaml

from neox_bridge.conversion import open_checkpoint, plan
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.context import Context
from neox_bridge.execution.transform import blocks
from neox_bridge.frameworks.source_tree import read_tree
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.file_names import STEP, layer_file, rank_file
from neox_bridge.layouts.open import detect
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.folder import is_hub
from neox_bridge.stores.hub_names import model_id
from neox_bridge.tensors.pieces import OutputTensor
from neox_bridge.wording import some

if TYPE_CHECKING:
    import torch

_LATEST = "latest"
_WHOLE = "sequential."  # before the names in the state dict of a model without stages
# settings whose values differ without changing the model
_FREE = frozenset(
    {
        *("seq_length", "max_position_embeddings", "make_vocab_size_divisible_by"),
        *("hidden_dropout", "attention_dropout", "init_method", "output_layer_init_method"),
        *("pipe_parallel_size", "model_parallel_size", "precision", "rotary_save_freqs_buffer"),
    }
)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts from.

    Attributes:
        source: The Hugging Face model; "" if GPT-NeoX loads a checkpoint of its own.
        resumed: The folder of the run's own checkpoints, if it goes on from there.
    """

    source: str = ""
    resumed: str = ""


def start_of(load: str | None, save: str | None) -> Start:
    """What ``load`` and ``save`` of a yml mean.

    Raises BridgeError if a run would start at step 0 in a folder that has steps.
    """
    if not load or not is_hf_source(load):
        return Start()
    if save and os.path.isdir(save):
        if os.path.exists(os.path.join(save, _LATEST)):
            return Start(resumed=save)
        if steps := sorted(name for name in os.listdir(save) if STEP.fullmatch(name)):
            raise BridgeError(
                f"save: {save} contains {some(steps, 3)} but no file `{_LATEST}`, so the run "
                f"would start again from {load} and write over them. Name another folder with "
                f"`save`, or write the name of the step to go on from into "
                f"{os.path.join(save, _LATEST)}."
            )
    return Start(source=load)


def is_hf_source(load: str) -> bool:
    """Whether ``load`` names a Hugging Face model. An existing local folder wins over a Hub name.

    A folder that does not exist and could be no name on the Hub is left to GPT-NeoX.
    """
    if is_hub(load):
        return True
    if os.path.isdir(load):
        if os.path.exists(os.path.join(load, _LATEST)):
            return False
        return os.path.exists(os.path.join(load, "config.json")) and detect(load) == "hf"
    return model_id(load) is not None and not load.startswith((".", "/", "~"))


def plan_for(checkpoint: Checkpoint, settings: Mapping[str, Any], tree: str) -> Plan:
    """The conversion of a model for a run with these settings.

    Args:
        checkpoint: The Hugging Face model.
        settings: The attributes of the run's ``NeoXArgs``.
        tree: The source tree of GPT-NeoX.

    Raises:
        Refused: GPT-NeoX cannot run the model, or a setting of the yml makes another model of it.
            The message names each key with both values.
    """
    stages = int(settings.get("pipe_parallel_size") or 0)
    ranks = int(settings.get("model_parallel_size") or 1)
    rows = int(settings["padded_vocab_size"])
    needed = checkpoint.vocab_rows
    if needed > rows:
        raise Refused(
            f"{checkpoint.path}: the model has {needed:,} rows of the vocabulary, but the yml and "
            f"its tokenizer make {rows:,} (padded_vocab_size). Use the tokenizer of the model: "
            f"vocab_file, and tokenizer_type: HFTokenizer. Or raise make_vocab_size_divisible_by."
        )
    options = Options(
        to="neox",
        era=read_tree(tree),
        tp=ranks,
        pp=stages,
        layout="layers" if stages else "ranks",
        vocab_multiple=rows // ranks,
    )
    conversion = plan(checkpoint, options, "/")
    _check_settings(conversion, settings, checkpoint)
    return conversion


def _check_settings(conversion: Plan, settings: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise Refused if a key of the yml differs from what the model needs."""
    (literal,) = (
        file.literals[0][1]
        for file in conversion.files
        if file.path.endswith("configs/neox_bridge.yml")
    )
    wanted = yaml.safe_load(literal)
    differing = []
    for key in conversion.fixed:
        name = key.replace("-", "_")
        if key not in wanted or name in _FREE or name not in settings:
            continue
        if not _same(name, wanted[key], settings[name]):
            differing.append(f"{key}: {settings[name]!r} in the yml, {wanted[key]!r} in the model")
    if differing:
        raise Refused(
            f"The yml describes another model than {os.path.join(checkpoint.path, 'config.json')}. "
            f"{'; '.join(differing)}. Correct these keys in the yml."
        )


def _same(name: str, wanted: object, value: object) -> bool:
    if isinstance(wanted, bool) or isinstance(value, bool):
        return bool(wanted) == bool(value)
    if isinstance(wanted, int | float) and isinstance(value, int | float):
        return float(wanted) == float(value)
    if name == "attention_config":
        return _expanded(wanted) == _expanded(value)
    return wanted == value


def _expanded(config: object) -> object:
    """``[[["global"], 4]]`` as one word for each layer, as GPT-NeoX expands it."""
    if not isinstance(config, list):
        return config
    layers: list[object] = []
    for entry in config:
        if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], int):
            words = list(entry[0])
            layers += words * entry[1]
        else:
            layers.append(entry)
    return layers


def _named(conversion: Plan, name: str) -> dict[str, OutputTensor]:
    (file,) = (file for file in conversion.files if os.path.basename(file.path) == name)
    return {tensor.name: tensor for tensor in file.tensors}


def fill(parameter: "torch.Tensor", tensor: OutputTensor, context: Context) -> None:
    """Read a tensor into a parameter, in blocks, cast to its dtype.

    Raises BridgeError if the shapes differ.
    """
    import torch

    if tuple(parameter.shape) != tensor.shape:
        raise BridgeError(
            f"{tensor.name} has the shape {list(tensor.shape)} in the model and "
            f"{list(parameter.shape)} in GPT-NeoX. This is a bug of neox-bridge: please report it."
        )
    flat = parameter.detach().view(-1)
    at = 0
    with torch.no_grad():
        for block in blocks(tensor, context):
            values = _to_torch(block)
            flat[at : at + values.numel()].copy_(values)
            at += values.numel()
    assert at == prod(tensor.shape)


def _to_torch(block: Any) -> "torch.Tensor":
    """An array as a tensor; torch does not know the bfloat16 of ml_dtypes."""
    import numpy as np
    import torch

    flat = block.reshape(-1)
    if flat.dtype.name == "bfloat16":
        return torch.from_numpy(flat.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(flat.copy() if not flat.flags.writeable else flat)


def open_for_run(source: str, agree: "Callable[[str], list[str]]", *, first: bool) -> Checkpoint:
    """Open a model on every rank. The first rank of each node downloads it.

    Args:
        source: The ``load`` of the yml.
        agree: Tells all ranks an error ("" if there is none), and returns those of all.
        first: Whether this is the first rank of its node.

    Raises:
        BridgeError: A rank of any node cannot open the model.
    """
    checkpoint = None
    for turn in (True, False):
        error = ""
        if first is turn:
            try:
                checkpoint = open_checkpoint(source)
            except (BridgeError, OSError) as problem:
                error = str(problem)
        if errors := [text for text in agree(error) if text]:
            raise BridgeError(errors[0])
    assert checkpoint is not None
    return checkpoint


def load_into(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    tree: str,
    parts: "Iterable[Part]",
    rank: int,
) -> int:
    """Fill the parameters of this rank, and return their bytes in the source's dtype.

    rank: the tensor-parallel rank. The others are as in ``plan_for``.
    """
    conversion = plan_for(checkpoint, settings, tree)
    context = Context()
    filled = 0
    try:
        for part in parts:
            name = rank_file(rank) if part.layer is None else layer_file(part.layer, rank)
            tensors = {
                key: tensor
                for key, tensor in _named(conversion, name).items()
                if part.layer is not None or key.startswith(_WHOLE)  # not random states
            }
            _check_names(part, set(tensors), name)
            for key, parameter in part.parameters.items():
                fill(parameter, tensors[key], context)
                filled += tensors[key].nbytes
    finally:
        context.files.close()
    return filled


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of a module that GPT-NeoX loads from one file.

    layer: the number of the layer, or None for the whole model of a rank.
    """

    layer: int | None
    parameters: "Mapping[str, torch.Tensor]"


def _check_names(part: Part, planned: set[str], name: str) -> None:
    own = set(part.parameters)
    if own == planned:
        return
    missing, extra = sorted(own - planned), sorted(planned - own)
    words = [f"missing: {some(missing, 3)}"] if missing else []
    words += [f"unexpected: {some(extra, 3)}"] if extra else []
    raise BridgeError(
        f"The model has not the tensors that GPT-NeoX expects in {name}: {'; '.join(words)}. Check "
        "the settings of the MLP, the biases and the output layer in the yml."
    )
