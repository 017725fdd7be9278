"""Starts a run of GPT-NeoX from a Hugging Face model: each rank reads its own part of the weights.

The plan is that of ``convert``, for the tree in which it runs. The tensors of this rank are read
from the source's files into the parameters. No checkpoint is written.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import yaml

from neox_bridge.architectures.neox_only import MODEL_KEYS
from neox_bridge.conversion import open_checkpoint, plan
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.context import Context
from neox_bridge.execution.transform import blocks
from neox_bridge.frameworks.source_tree import read_tree
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.file_names import layer_file, rank_file
from neox_bridge.layouts.open import detect
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.folder import HUB, is_hub
from neox_bridge.stores.hub_names import hub_target, model_id
from neox_bridge.tensors.pieces import OutputTensor
from neox_bridge.training.saved_steps import LATEST, step_names
from neox_bridge.wording import plural, some

if TYPE_CHECKING:
    import torch

_WHOLE = "sequential."  # before the names in the state dict of a model without stages
# settings that may differ: they change no weight and nothing that the model computes
_FREE = frozenset(
    {
        *("seq_length", "max_position_embeddings", "make_vocab_size_divisible_by"),
        *("hidden_dropout", "attention_dropout", "init_method", "output_layer_init_method"),
        *("pipe_parallel_size", "model_parallel_size", "precision", "rotary_save_freqs_buffer"),
        "rmsnorm_fusion",
    }
)
# GPT-NeoX computes the width of the MLP if they are missing; the shapes are compared in any case
_WIDTH_KEYS = frozenset({"intermediate_size", "mlp_multiple_of", "expansion_factor"})
_EPSILON_KEYS = {
    "layernorm": "layernorm_epsilon",
    "non_parametric_layernorm": "layernorm_epsilon",
    "rmsnorm": "rms_norm_epsilon",
    "scalenorm": "scalenorm_epsilon",
}
_SAME_ATTENTION = frozenset({"flash", "ring"})  # other implementations of "global"


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts from.

    Attributes:
        source: The Hugging Face model: a folder, or ``hf://ORG/NAME@REVISION``; "" if GPT-NeoX
            loads a checkpoint of its own.
        resumed: The folder of the run's own checkpoints if the run resumes; then ``source`` is
            only the reference model of a preference training.
        note: What the user should know about the choice, or "".
    """

    source: str = ""
    resumed: str = ""
    note: str = ""


def start_of(load: str | None, save: str | None, iteration: int | None = None) -> Start:
    """What ``load``, ``save`` and ``iteration`` of a yml mean.

    Raises BridgeError if a run would start at step 0 in a folder that has steps, or from random
    weights although ``load`` is set.
    """
    source, note = _hf_source(load or "", save or "")
    if not source:
        if load and iteration is None:
            _check_native(load, save or "")
        return Start(note=note)
    if save and os.path.exists(latest := os.path.join(save, LATEST)):
        step = _latest_step(latest) if iteration is None else f"global_step{iteration}"
        return Start(source, save, f"resuming from {step} in {save}, not starting from {load}")
    if iteration is not None:
        raise BridgeError(
            f"iteration: {iteration} names a step of GPT-NeoX, but load: {load} is a Hugging Face "
            f"model and save: {save} contains no file `{LATEST}`. Remove `iteration` to start "
            "from the model."
        )
    if not save or not os.path.isdir(save):
        return Start(source, note=note)
    if steps := step_names(save):
        raise BridgeError(
            f"save: {save} contains {some(steps, 3)} but no file `{LATEST}`, so the run would "
            f"start again from {load} and replace these steps. Set `save` to another folder. To "
            f"resume, write the name of a step into {latest}."
        )
    return Start(source, note=note)


def _latest_step(latest: str) -> str:
    """The step that a file ``latest`` names. Raises BridgeError if there is no such step."""
    with open(latest, encoding="utf-8", errors="replace") as file:
        step = file.read().strip()
    if not step or not os.path.isdir(os.path.join(os.path.dirname(latest), step)):
        content = f"names {step}, which is missing" if step else "is empty"
        raise BridgeError(
            f"{latest} {content}, so the run cannot resume. Write the "
            f"name of an existing step into {latest}, or set `save` to another folder."
        )
    return step


def _check_native(load: str, save: str) -> None:
    """Raise BridgeError if GPT-NeoX would find no checkpoint and start from random weights.

    It does so without an error (megatron/checkpointing.py, ``load_checkpoint``), which is right for
    the first start of a run that resumes from its own folder only.
    """
    if _is_same(load, save) or os.path.exists(os.path.join(load, LATEST)):
        return
    expanded = os.path.expanduser(load)
    if not os.path.isdir(load):
        problem, advice = "is no folder", "Correct the path"
        if expanded != load and os.path.isdir(expanded):
            problem, advice = "is not expanded by GPT-NeoX", f"Write {expanded}"
    elif steps := step_names(load):
        problem = f"contains {some(steps, 3)} but no file `{LATEST}`"
        advice = f"Write the name of a step into {os.path.join(load, LATEST)}"
    else:
        problem = f"contains neither a Hugging Face model nor a file `{LATEST}`"
        advice = "Correct the path"
    raise BridgeError(
        f"load: {load} {problem}, so GPT-NeoX would start from random weights. {advice}, or remove "
        "`load` to start from random weights."
    )


def _is_same(load: str, save: str) -> bool:
    return bool(save) and os.path.realpath(load) == os.path.realpath(save)


def _hf_source(load: str, save: str) -> tuple[str, str]:
    """The Hugging Face model that ``load`` names, with a note; "" for what GPT-NeoX loads itself.

    An existing folder wins over a model of that name on the Hub. A name that is also ``save`` is
    the folder of a run that has not saved yet.
    """
    if is_hub(load):
        return load, ""
    name = load.rstrip("/")
    is_name = model_id(name) is not None and not load.startswith((".", "/", "~"))
    folder = os.path.abspath(os.path.expanduser(load))
    if load and os.path.isdir(folder):
        if not os.path.exists(os.path.join(folder, "config.json")) or detect(folder) != "hf":
            return "", ""
        if os.path.exists(os.path.join(folder, LATEST)):
            note = f"load: {folder} contains a Hugging Face model too, which is not used"
            return "", f"{note}, because `{LATEST}` names a checkpoint of GPT-NeoX"
        note = f"load: the local folder {folder} is used, not {HUB}{name} on the Hub"
        return folder, note if is_name else ""
    if not is_name or _is_same(load, save):
        return "", ""
    return f"{HUB}{name}", ""


@dataclass(frozen=True, slots=True)
class Run:
    """What is known about a run of GPT-NeoX.

    Attributes:
        settings: The attributes of its ``NeoXArgs``.
        defaults: The defaults of ``NeoXArgs``.
        tree: The source tree of GPT-NeoX.
    """

    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]
    tree: str


def plan_for(checkpoint: Checkpoint, run: Run) -> Plan:
    """The conversion of a Hugging Face model for a run.

    Raises:
        Refused: GPT-NeoX cannot run the model, or a setting of the yml makes another model of it.
            The message names each key with both values.
    """
    settings = run.settings
    _check_training(checkpoint, settings)
    stages = int(settings.get("pipe_parallel_size") or 0)
    ranks = int(settings.get("model_parallel_size") or 1)
    rows = int(settings["padded_vocab_size"])
    needed = checkpoint.vocab_rows
    if needed > rows:
        raise Refused(
            f"The embedding of {checkpoint.path} has {needed:,} rows, but the tokenizer and "
            f"make_vocab_size_divisible_by of the yml make {rows:,}. Use the tokenizer of the "
            "model (vocab_file, with tokenizer_type: HFTokenizer), and "
            f"{_vocabulary_key(needed, ranks)}."
        )
    options = Options(
        to="neox",
        era=read_tree(run.tree),
        tp=ranks,
        pp=stages,
        layout="layers" if stages else "ranks",
        vocab_multiple=rows // ranks,
    )
    conversion = plan(checkpoint, options, "/")
    _check_settings(conversion, run, checkpoint)
    return conversion


def _vocabulary_key(rows: int, ranks: int) -> str:
    """The setting with which GPT-NeoX makes these rows, of which the tokenizer uses no more."""
    return f"make_vocab_size_divisible_by: {ceil(rows / ranks)}"


def _check_training(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raise Refused for kinds of training that cannot start from this model."""
    zero = settings.get("zero_optimization") or {}
    if isinstance(zero, Mapping) and int(zero.get("stage") or 0) > 2:
        raise Refused(
            "zero_optimization: stage 3 splits every parameter among the ranks, so a run cannot "
            "start from a Hugging Face model with it. Use stage 0, 1 or 2."
        )
    soft_prompt = settings.get("soft_prompt_tuning") or {}
    if isinstance(soft_prompt, Mapping) and soft_prompt.get("enabled"):
        raise Refused(
            f"soft_prompt_tuning adds a layer that {checkpoint.path} does not have, and GPT-NeoX "
            "loads no model without it. Remove soft_prompt_tuning from the yml."
        )
    if settings.get("no_load_optim") and settings.get("do_train"):
        raise Refused(
            "no_load_optim: true makes GPT-NeoX train without an optimizer for the model, so its "
            "weights would not change. Remove it: a run that starts from a Hugging Face model "
            "loads no optimizer."
        )
    wants_reward = settings.get("train_impl") == "rm"
    if wants_reward != bool(checkpoint.config.reward):
        kind = "a reward model" if checkpoint.config.reward else "a language model"
        other = "train_impl: rm" if wants_reward else f"train_impl: {settings.get('train_impl')}"
        raise Refused(
            f"{checkpoint.path} is {kind}, but the yml says {other}. Load a model with the same "
            "kind of output layer, or change train_impl."
        )


def _check_settings(conversion: Plan, run: Run, checkpoint: Checkpoint) -> None:
    """Raise Refused if a key of the yml differs from what the model needs.

    The planned yml leaves out keys whose default is right.
    """
    (literal,) = (
        file.literals[0][1]
        for file in conversion.files
        if file.path.endswith("configs/neox_bridge.yml")
    )
    planned = {key.replace("-", "_"): value for key, value in yaml.safe_load(literal).items()}
    names = {key.replace("-", "_") for key in conversion.fixed} & set(planned) | MODEL_KEYS
    needed = {**{name: run.defaults.get(name) for name in names}, **planned}
    differing = [
        f"{name}: {run.settings[name]!r} in the yml, {needed[name]!r} in the model"
        for name in sorted(names - _free_keys(needed))
        if name in run.settings and not _same(name, needed, run.settings)
    ]
    if differing:
        raise Refused(
            f"The yml describes another model than {os.path.join(checkpoint.path, 'config.json')}. "
            f"{'; '.join(differing)}. Change these keys in the yml."
        )


def _free_keys(needed: Mapping[str, Any]) -> frozenset[str]:
    """The settings that may differ, because this model does not use them either."""
    free = set(_FREE)
    if needed.get("pos_emb") == "learned":  # each position has a row of weights
        free.discard("max_position_embeddings")
    if needed.get("pos_emb") != "rotary":
        free |= {"rotary_pct", "rotary_emb_base"}
    if needed.get("activation") != "gelu":
        free.add("bias_gelu_fusion")
    epsilon = _EPSILON_KEYS.get(str(needed.get("norm")))
    return frozenset(free | ({*_EPSILON_KEYS.values()} - {epsilon}))


def _same(name: str, needed: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    expected: Any = needed[name]
    value: Any = settings[name]
    if name == "attention_config":
        layers = int(settings["num_layers"])
        return _attention(expected, layers) == _attention(value, layers)
    if name == "num_kv_heads":
        heads = settings["num_attention_heads"]
        return bool((expected or heads) == (value or heads))
    if name in _WIDTH_KEYS and None in (expected, value):
        return True
    if isinstance(expected, bool) or isinstance(value, bool):
        return bool(expected) == bool(value)
    if isinstance(expected, int | float) and isinstance(value, int | float):
        return float(expected) == float(value)
    return bool(expected == value)


def _attention(config: Any, layers: int) -> list[str]:
    """One word for each layer, as GPT-NeoX expands ``[[["global"], 4]]``."""
    words: list[str] = []
    for entry in config or ["global"] * layers:
        if isinstance(entry, str):
            words.append(entry)
            continue
        kinds, count = entry
        count = layers if count == "all" else int(count)
        words += [kinds[n % len(kinds)] for n in range(count)] if count == layers else kinds * count
    return ["global" if word in _SAME_ATTENTION else word for word in words]


def _tensors_of(conversion: Plan, name: str) -> dict[str, OutputTensor]:
    """The tensors of a file of the plan, by their names."""
    (file,) = (file for file in conversion.files if os.path.basename(file.path) == name)
    return {tensor.name: tensor for tensor in file.tensors}


def fill(parameter: "torch.Tensor", tensor: OutputTensor, context: Context) -> None:
    """Read a tensor into a parameter, in blocks, cast to its dtype.

    Raises BridgeError if the shapes differ, or if a value is too large for the dtype.
    """
    import torch

    if tuple(parameter.shape) != tensor.shape:
        raise BridgeError(
            f"{tensor.name} has the shape {list(tensor.shape)} in the model, but "
            f"{list(parameter.shape)} in GPT-NeoX. Check the yml against config.json of the model."
        )
    flat = parameter.detach().view(-1)
    start = 0
    with torch.no_grad():
        for block in blocks(tensor, context):
            values = _to_torch(block)
            part = flat[start : start + values.numel()]
            part.copy_(values)
            start += values.numel()
            if values.dtype == part.dtype or part.isfinite().all():
                continue
            if lost := int((values.isfinite() & ~part.cpu().isfinite()).sum()):
                dtype = str(part.dtype).removeprefix("torch.")
                raise BridgeError(
                    f"{tensor.name} has {plural(lost, 'value')} too large for {dtype}, in which "
                    "the yml trains. Set `precision: bfloat16`, or train in fp32."
                )
    assert start == prod(tensor.shape)


def _to_torch(block: Any) -> "torch.Tensor":
    """An array as a tensor; torch does not know the bfloat16 of ml_dtypes."""
    import numpy as np
    import torch

    flat = block.reshape(-1)
    if flat.dtype.name == "bfloat16":
        return torch.from_numpy(flat.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(flat.copy() if not flat.flags.writeable else flat)


def open_for_run(
    source: str, exchange: Callable[[str], list[str]], *, rank: int, local_rank: int
) -> Checkpoint:
    """Open a model on every rank. The first rank of each node downloads it from the Hub.

    All ranks read the commit that rank 0 saw, even if the branch moves in the meantime.

    Args:
        source: The source of a ``Start``.
        exchange: Gathers a text from every rank, in the order of ranks.

    Raises:
        BridgeError: A rank cannot open the model. Every rank raises it.
    """
    turn = 0 if rank == 0 else 1 if local_rank == 0 else 2
    checkpoint: Checkpoint | None = None
    for now in range(3):
        error = ""
        if turn == now:
            try:
                checkpoint = _open(source)
            except (BridgeError, OSError) as problem:
                error = str(problem)
        if errors := [text for text in exchange(error) if text]:
            raise BridgeError(errors[0])
        if now == 0 and is_hub(source):
            commit = exchange(os.path.basename(checkpoint.path) if checkpoint else "")[0]
            source = f"{source.partition('@')[0]}@{commit}"
    assert checkpoint is not None
    return checkpoint


def _open(source: str) -> Checkpoint:
    if not is_hub(source):
        return open_checkpoint(source)
    from neox_bridge.layouts.hub_source import find_source

    model = hub_target(source)
    try:
        place = find_source(model.repo, model.branch)  # downloads it, unless it is in the cache
    except BridgeError as error:
        raise BridgeError(
            f"load: there is no folder {model.repo}, and the model cannot be read from the Hub: "
            f"{error}"
        ) from None
    if is_hub(place.path):
        raise BridgeError(
            f"load: {source} contains checkpoints of GPT-NeoX, which GPT-NeoX loads from a folder "
            f"only. Download it: hf download {model.repo} --revision {model.branch}"
        )
    return open_checkpoint(place.path)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a rank has read.

    Attributes:
        size: Bytes of its tensors, in the dtype of the model.
        warnings: What GPT-NeoX computes otherwise than transformers, from the plan.
    """

    size: int
    warnings: tuple[str, ...] = ()


def load_into(checkpoint: Checkpoint, run: Run, parts: "Iterable[Part]", rank: int) -> Loaded:
    """Fill the parameters of this rank. rank: the tensor-parallel rank."""
    conversion = plan_for(checkpoint, run)
    # Of a row-parallel weight, a rank needs a part of each row. Mapping these parts takes 0.4 to
    # 1.0 times as long as reading them with the rest of the rows, and reading each by itself up to
    # 3 times (measured with parts of 0.5 to 16 KB at TP 2, 4 and 8, cached and from the disk).
    context = Context(maps_gaps=True)
    filled = 0
    try:
        for part in parts:
            name = rank_file(rank) if part.layer is None else layer_file(part.layer, rank)
            tensors = {
                key: tensor
                for key, tensor in _tensors_of(conversion, name).items()
                if part.layer is not None or key.startswith(_WHOLE)  # not random states
            }
            _check_names(part, set(tensors), name)
            for key, parameter in part.parameters.items():
                fill(parameter, tensors[key], context)
                filled += tensors[key].nbytes
    finally:
        context.files.close()
    warnings = [f.message for f in conversion.findings if f.severity == "warning"]
    needed, rows = checkpoint.vocab_rows, int(run.settings["padded_vocab_size"])
    ranks = int(run.settings.get("model_parallel_size") or 1)
    if ceil(needed / ranks) * ranks < rows:
        warnings.append(
            f"the tokenizer and make_vocab_size_divisible_by of the yml make {rows:,} rows of the "
            f"embedding, but the model has {needed:,}. The others start as zeros. GPT-NeoX counts "
            "them in its loss, and exported models contain them. For the rows of the model, set "
            f"{_vocabulary_key(needed, ranks)}"
        )
    return Loaded(filled, tuple(warnings))


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of a module that GPT-NeoX loads from one file.

    layer: the number of the layer, or None for the whole model of a rank.
    """

    layer: int | None
    parameters: "Mapping[str, torch.Tensor]"


def _check_names(part: Part, planned: set[str], name: str) -> None:
    expected = set(part.parameters)
    if expected == planned:
        return
    missing, unexpected = sorted(expected - planned), sorted(planned - expected)
    words = [f"missing: {some(missing, 3)}"] if missing else []
    words += [f"unexpected: {some(unexpected, 3)}"] if unexpected else []
    raise BridgeError(
        f"The model does not have the tensors that GPT-NeoX expects in {name}. "
        f"{'; '.join(words)}. Check the settings of the MLP, the biases and the output layer in "
        "the yml."
    )
