"""Compares the settings of a Hugging Face repository with its tensors and its other files.

What is wrong here is wrong for every version of transformers. ``judge_repository`` has the rest.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from neox_bridge.doctor.repository import Repository
from neox_bridge.findings import Details, Finding, Severity
from neox_bridge.layouts.quantized import CONFIG_KEYS, settings_of, settings_quantize, way_out
from neox_bridge.layouts.same_values import relation
from neox_bridge.layouts.stored_model import StoredTensor, elements_by_stored_dtype
from neox_bridge.stores.paths import is_local, isdir, lexists
from neox_bridge.tensors.dtypes import FLOAT8, FLOATING
from neox_bridge.tensors.geometry import with_rows
from neox_bridge.tensors.pieces import whole_of
from neox_bridge.wording import plain, some

# names of the input embeddings and of the output head in transformers' families
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings|wte|embed_in|shared|tok_embeddings|embeddings?"
    r"|token_embeddings?)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$|^output\.weight$")
_ANY_HEAD = re.compile(r"head|embed_out|output_layer|output_projection|(?:^|\.)output\.")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel")  # endings of classes that need an output head
_PEEK_BYTES = 64 << 20  # compared of a stored head that is not on this machine
_MOST_CHARACTERS = 80  # shown of a value
# values with which the sampling settings of generation_config.json count as not set
_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "min_p": (None,),
    "top_k": (None, 50),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
_BEAMS: Mapping[str, tuple[Any, ...]] = {
    "early_stopping": (None, False),
    "length_penalty": (None, 1.0),
}


def judge_settings(repository: Repository) -> Iterator[Finding]:
    """The findings about settings that contradict the tensors or each other."""
    yield from _config(repository)
    yield from _embeddings(repository)
    yield from _tied(repository)
    yield from _quantization(repository)
    yield from _dtype(repository)
    yield from _rope(repository)
    yield from _remote_code(repository)
    yield from _adapter(repository)


def own_settings(repository: Repository) -> Iterator[Finding]:
    """The findings that do not depend on the model, so that they also hold for known families."""
    yield from _generation(repository)


def shown(value: object) -> str:
    """A value of a settings file, for a message."""
    text = plain(str(value))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _config(repository: Repository) -> Iterator[Finding]:
    settings, path = repository.settings, repository.model.path
    others = ("adapter_config.json", "model_index.json", "modules.json")
    in_damage = any("config.json" in one.details.wrong for one in repository.damage)
    if "config.json" not in settings:
        if not in_damage and not any(name in settings for name in others):
            yield Finding(
                "no-config",
                "error",
                f"{path} has no config.json",
                "put the config.json of the model into the folder",
                details=Details(
                    missing=("config.json",),
                    why="transformers reads from it which class the model has",
                ),
            )
    elif (
        not isinstance(repository.model.raw.get("model_type"), str)
        and "model_index.json" not in settings
        and "_class_name" not in repository.model.raw
    ):
        yield Finding(
            "no-model-type",
            "warning",
            "config.json has no model_type",
            "take the config.json of the original model",
            details=Details(
                missing=("config.json: model_type",),
                why="AutoConfig of transformers cannot choose a class, and stops",
            ),
        )


def _main_tensors(repository: Repository) -> Mapping[str, StoredTensor]:
    components = repository.model.components
    return components[0].tensors if components else {}


def _embedding(tensors: Mapping[str, StoredTensor]) -> tuple[str, StoredTensor] | None:
    """The input embeddings: of several, those with the most rows."""
    matrices = [
        (name, tensor)
        for name, tensor in tensors.items()
        if _EMBEDDINGS.search(name)
        and len(tensor.shape) == 2
        and tensor.dtype in (*FLOATING, *FLOAT8, "int8")
    ]
    return max(matrices, key=lambda pair: pair[1].shape[0], default=None)


def _embeddings(repository: Repository) -> Iterator[Finding]:
    """Numbers of rows: of the embeddings, of the tokenizer and in config.json."""
    if (matrix := _embedding(_main_tensors(repository))) is None:
        return
    name, tensor = matrix
    rows, raw = tensor.shape[0], repository.model.raw
    entries = repository.tokenizer_entries
    if entries is not None and entries > rows:
        yield Finding(
            "tokenizer-larger",
            "error",
            f"the tokenizer has {entries:,} entries and {name} has {rows:,} rows",
            "take the tokenizer of this model. If tokens were added, call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model again",
            subject="tokenizer",
            details=Details(
                wrong=(f"{name}: {rows:,} rows, {entries:,} expected",),
                why=f"Tokens from {rows:,} on have no embedding: with one of them the model "
                "stops with an index error, or reads other memory on a GPU. Fewer entries than "
                "rows are normal padding",
            ),
        )
    inner = raw.get("text_config")
    setting = (inner if isinstance(inner, Mapping) else raw).get("vocab_size")
    if isinstance(setting, int) and setting != rows and not repository.damage:
        yield Finding(
            "config-vocab",
            "warning",
            f"config.json says vocab_size: {setting:,}, and {name} has {rows:,} rows",
            f"set vocab_size to {rows} in config.json, unless the model's class pads it itself",
            subject="config sizes",
            details=Details(
                wrong=(f"vocab_size: {setting}, {rows} expected",),
                why="Most classes of transformers stop with a size mismatch when they load it",
            ),
        )


def _tied(repository: Repository) -> Iterator[Finding]:
    """Whether the output head is there if the config says so."""
    tensors, raw = _main_tensors(repository), repository.model.raw
    inner = raw.get("text_config")
    ties = raw.get("tie_word_embeddings")
    if ties is None and isinstance(inner, Mapping):
        ties = inner.get("tie_word_embeddings")
    heads = [name for name in tensors if _HEAD.search(name)]
    matrix = _embedding(tensors)
    if ties is True and matrix is not None and len(heads) == 1:
        yield from _two_heads(heads[0], tensors[heads[0]], *matrix)
    classes = raw.get("architectures")
    class_name = str(classes[0]) if isinstance(classes, list) and classes else ""
    needs = class_name.endswith(_WITH_HEAD) and matrix is not None and inner is None
    if ties is not False or not needs or repository.damage:
        return
    if not any(_ANY_HEAD.search(name) for name in tensors):
        yield Finding(
            "no-head",
            "error",
            "config.json says tie_word_embeddings: false, and no tensor is an output head",
            "download the missing tensors, or set tie_word_embeddings to true if the model uses "
            "its embeddings as the head",
            subject="stored head",
            details=Details(
                missing=("lm_head.weight",),
                wrong=("tie_word_embeddings: false in config.json",),
                why=f"{shown(class_name)} initializes the head at random, with a warning at most",
            ),
        )


def _two_heads(
    head: str, tensor: StoredTensor, name: str, embeddings: StoredTensor
) -> Iterator[Finding]:
    """A tied config with another stored head: each version computes one of two models."""
    if not (tensor.decoded and embeddings.decoded and len(tensor.shape) == 2):
        return
    differs = tensor.shape[1:] != embeddings.shape[1:]
    if not differs:
        rows = min(tensor.shape[0], embeddings.shape[0])
        most = None if is_local(tensor.ref.file) else _PEEK_BYTES
        first, second = (with_rows(whole_of(one.ref), rows) for one in (tensor, embeddings))
        differs = relation(first, second, most) == "differs"
    if differs:
        yield Finding(
            "head-differs",
            "warning",
            f"config.json ties the embeddings, and {head} is stored with other values than {name}",
            "set tie_word_embeddings to false in config.json to keep the head, or remove the "
            "tensor",
            subject="stored head",
            details=Details(
                wrong=(head,),
                why="These are two models. transformers 4.x ignores the stored head and computes "
                "with the embeddings. 5.0 and newer keep both, as an untied model",
            ),
        )


def _quantization(repository: Repository) -> Iterator[Finding]:
    """Quantized tensors without settings, and settings without quantized tensors."""
    model = repository.model
    quantization, (settings, where) = model.quantization, settings_of(model.path, model.raw)
    if quantization is not None and not where.startswith("config.json"):
        why = "transformers takes packed numbers for weights, or initializes weights at random"
        if where:
            why = f"{where} has them, which transformers does not read"
        yield Finding(
            "quantization-unsaid",
            "error",
            f"the tensors are quantized ({quantization.method}), and config.json has no "
            "quantization_config",
            "copy quantization_config from the config.json of the program that quantized the "
            f"model, or {way_out(quantization).replace('convert', 'use', 1)}",
            details=Details(
                missing=("config.json: quantization_config",),
                wrong=quantization.evidence[-1:],
                why=why,
            ),
        )
    plain_weights = all(tensor.dtype in FLOATING for tensor in model.stored.values())
    named = next((key for key in CONFIG_KEYS if settings_quantize(model.raw.get(key))), "")
    if quantization is None and named and plain_weights and model.stored and not repository.damage:
        method = (settings or {}).get("quant_method", "a quantization")
        yield Finding(
            "quantization-unused",
            "error",
            f"config.json has {named} ({shown(method)}), and all tensors are plain weights",
            f"remove {named} from config.json if the weights were dequantized. Otherwise "
            "download the quantized files",
            details=Details(
                wrong=(f"config.json: {named}",),
                why="transformers builds layers for quantized weights, does not find their "
                "scales, and stops or computes nonsense",
            ),
        )


def _dtype(repository: Repository) -> Iterator[Finding]:
    """The dtype in config.json, by its old and its new key, and that of the tensors."""
    raw = repository.model.raw
    new, old = raw.get("dtype"), raw.get("torch_dtype")
    if isinstance(new, str) and isinstance(old, str) and new != old:
        yield Finding(
            "dtype-two-spellings",
            "warning",
            f"config.json says dtype: {shown(new)} and torch_dtype: {shown(old)}",
            "write the same value for both keys",
            details=Details(
                wrong=(f"dtype: {shown(new)}", f"torch_dtype: {shown(old)}"),
                why="transformers 4.56 and newer read dtype, and older versions torch_dtype",
            ),
        )
    setting = new if isinstance(new, str) else old
    if repository.model.quantization is not None or not isinstance(setting, str):
        return
    elements = elements_by_stored_dtype(repository.model)
    if elements and (dtype := elements.most_common(1)[0][0]) != setting and dtype in FLOATING:
        yield Finding(
            "config-dtype",
            "warning",
            f"config.json says dtype {shown(setting)}, and most tensors are {dtype}",
            f"set dtype and torch_dtype to {dtype} in config.json",
            details=Details(
                wrong=(f"dtype: {shown(setting)}, {dtype} expected",),
                why='transformers casts the weights with dtype="auto", the default since 5.0',
            ),
        )


def rope_groups(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of rope_parameters: one, or one for each type of layer."""
    value = raw.get("rope_parameters")
    if not isinstance(value, Mapping) or not value:
        return []
    inner = [one for one in value.values() if isinstance(one, Mapping)]
    return inner or [value]


def _rope(repository: Repository) -> Iterator[Finding]:
    """Rotary settings with two spellings that contradict each other."""
    raw = repository.model.raw
    scaling, groups = raw.get("rope_scaling"), rope_groups(raw)
    if isinstance(scaling, Mapping):
        old, new = scaling.get("type"), scaling.get("rope_type")
        if old is not None and new is not None and old != new:
            yield _spelling(
                f"rope_scaling says type: {shown(old)} and rope_type: {shown(new)}",
                "write the same value for both keys",
                (f"type: {shown(old)}", f"rope_type: {shown(new)}"),
                "transformers before 5.0 takes type, and newer versions take rope_type",
            )
        if scaling and len(groups) == 1:
            different = [
                key
                for key in sorted(scaling.keys() & groups[0].keys())
                if scaling[key] != groups[0][key]
            ]
            if different:
                yield _spelling(
                    f"rope_scaling and rope_parameters have different values of {some(different)}",
                    "write the same values into both, or remove one of them",
                    tuple(f"{k}: {shown(scaling[k])}, {shown(groups[0][k])}" for k in different),
                    "transformers reads rope_scaling if there is one, and tools that know only "
                    "rope_parameters compute another model",
                )
    theta = raw.get("rope_theta")
    bases = [one["rope_theta"] for one in groups if one.get("rope_theta") is not None]
    if theta is not None and bases and theta not in bases:
        yield _spelling(
            f"rope_theta is {shown(theta)}, and rope_parameters.rope_theta is {shown(bases[0])}",
            "write the base with which the model was trained into both",
            (f"rope_theta: {shown(theta)}", f"rope_parameters.rope_theta: {shown(bases[0])}"),
            "transformers before 5.0 reads rope_theta, and newer versions read rope_parameters: "
            "they compute different models and print nothing",
        )


def _spelling(message: str, remedy: str, wrong: tuple[str, ...], why: str) -> Finding:
    return Finding(
        "rope-two-spellings",
        "warning",
        f"config.json: {message}",
        remedy,
        subject="rotary settings",
        details=Details(wrong=wrong, why=why),
    )


def _remote_code(repository: Repository) -> Iterator[Finding]:
    """Files of custom code that auto_map names and that the repository does not have."""
    code = repository.model.raw.get("auto_map")
    names = (
        [name for name in code.values() if isinstance(name, str)]
        if isinstance(code, Mapping)
        else []
    )
    files = [f"{name.partition('.')[0]}.py" for name in names if "--" not in name and "." in name]
    absent = sorted(
        {name for name in files if not lexists(os.path.join(repository.model.path, name))}
    )
    if absent:
        yield Finding(
            "code-missing",
            "warning",
            f"auto_map in config.json names code that is not in the folder: {some(absent)}",
            "download these files too, if transformers has no class of its own for the model",
            details=Details(
                missing=tuple(absent),
                why="With trust_remote_code=True, transformers imports the model's class from them",
            ),
        )


def _generation(repository: Repository) -> Iterator[Finding]:
    """Settings in generation_config.json with which transformers refuses to save the model.

    From GenerationConfig.validate and save_pretrained (generation/configuration_utils.py).
    """
    generation = repository.settings.get("generation_config.json", {})
    wrong = []
    if generation.get("do_sample") is not True:
        wrong += [k for k, unset in _SAMPLING.items() if generation.get(k) not in unset]
    why = "Settings of sampling need do_sample: true, and those of beams num_beams greater than 1"
    remedy = 'set "do_sample": true in generation_config.json'
    if generation.get("num_beams") in (None, 1):
        beams = [k for k, unset in _BEAMS.items() if generation.get(k) not in unset]
        remedy = "remove these keys from generation_config.json" if beams else remedy
        wrong += beams
    if wrong:
        yield Finding(
            "generation-config",
            "warning",
            f"transformers refuses to save a model with this generation_config.json: {some(wrong)} "
            f"without {'do_sample' if wrong[0] in _SAMPLING else 'num_beams'}",
            remedy,
            details=Details(
                wrong=tuple(f"{key}: {shown(generation[key])}" for key in wrong),
                why=f"{why}. save_pretrained of transformers 4.42 to 5.10 stops with an error, "
                "after hours of training in the worst case. 5.24 only warns if the settings are "
                "as they were loaded",
            ),
        )


def _adapter(repository: Repository) -> Iterator[Finding]:
    """An adapter whose base model is not named or not there."""
    config = repository.settings.get("adapter_config.json")
    if config is None:
        return
    base = config.get("base_model_name_or_path")
    severity: Severity = "error"
    if not isinstance(base, str) or not base:
        message = "adapter_config.json does not name the base model of the adapter"
        why = "peft needs base_model_name_or_path to load the model that the adapter changes"
        wrong = "adapter_config.json: base_model_name_or_path"
    else:
        is_path = base.startswith((".", "/", "~")) or base.count("/") != 1
        # peft takes a relative path as relative to the current folder
        if not is_path or isdir(os.path.expanduser(base)):
            return
        message = f"the base model of the adapter is not on this machine: {shown(base)}"
        why = (
            "base_model_name_or_path in adapter_config.json is a path, and there is no such folder"
        )
        wrong = f"base_model_name_or_path: {shown(base)}"
    if "config.json" in repository.settings:
        severity = "warning"  # a whole model lies beside it
    yield Finding(
        "adapter-base",
        severity,
        message,
        "write the path or the Hub name of the base model into base_model_name_or_path",
        details=Details(wrong=(wrong,), why=why),
    )
