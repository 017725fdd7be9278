"""Opens a Hugging Face folder: safetensors or ``pytorch_model*.bin``, one file or sharded."""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from neox_bridge.architectures import complete, for_hf, form_of
from neox_bridge.architectures.base import Architecture, Form, ModelConfig, Presence
from neox_bridge.architectures.heads import SCORE, refuse_labels
from neox_bridge.architectures.setting_types import MOST_LAYERS, check_hf
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.formats.safetensors import read_safetensors
from neox_bridge.formats.tensor_ref import TensorRef
from neox_bridge.layouts.checkpoint import Checkpoint, some
from neox_bridge.layouts.derived_check import check_inv_freq
from neox_bridge.layouts.own_files import brought_along, check_own
from neox_bridge.layouts.record_file import read_record
from neox_bridge.layouts.sizes import check_heads, dtype_of_most, solve_dims
from neox_bridge.layouts.tensor_names import check_names, tensors_of
from neox_bridge.layouts.text_files import LARGE, read_json
from neox_bridge.layouts.tokenizer import tokenizer_files, tokenizer_size
from neox_bridge.layouts.weights import NEOX_ONLY, expand, lacking, model_weights
from neox_bridge.planning.pieces import Dropped, Whole, whole_of
from neox_bridge.stores.paths import ahead, exists

_SINGLE = ("model.safetensors", "pytorch_model.bin")


def open_hf(path: str, revision: str = "") -> Checkpoint:
    """Open a folder with a config.json. Raises BridgeError or Refused, naming file or key.

    What another library has no words for comes from this tool's record beside it.
    """
    config = os.path.join(path, "config.json")
    check_own(config, path)
    told = read_json(config)
    check_hf(told)
    raw, form = dict(complete(told)), form_of(told)
    if form is not None:
        kept = read_record(path).get("config")
        if isinstance(kept, dict) and kept.get("model_type") == raw["model_type"]:
            raw = {**kept, **raw}
    check_hf(raw)  # what mamba_ssm says in its own words too
    architecture = for_hf(raw)
    refs, files = _read_tensors(path)
    named, dropped = _normalise(architecture, refs, path)
    if raw.get("tie_word_embeddings") and architecture.head in named:
        del named[architecture.head]
        dropped.append(Dropped(architecture.head, "the embeddings are tied"))
    inv_freqs = {k: v for k, v in refs.items() if k.endswith("rotary_emb.inv_freq")}
    wholes = {name: whole_of(ref) for name, ref in named.items()}
    return checkpoint_of(path, raw, wholes, files, dropped, inv_freqs, revision, form)


def checkpoint_of(
    path: str,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Whole],
    files: tuple[str, ...],
    dropped: Sequence[Dropped] = (),
    inv_freqs: Mapping[str, TensorRef] = MappingProxyType({}),
    revision: str = "",
    form: Form | None = None,
) -> Checkpoint:
    """A checkpoint of these tensors, under the table's Hugging Face names, checked against it.

    raw: config.json, or what stands for it. Raises BridgeError for what is missing or contradicts.
    """
    architecture = for_hf(raw)
    layers = _count_layers(tensors, path, raw)
    found = {
        name: (weight, tensors[name].shape)
        for weight, block in expand(architecture, layers)
        if (name := weight.hf.format(i=block)) in tensors and weight.split not in NEOX_ONLY
    }
    presence = Presence(frozenset(tensors), dtype_of_most(tensors.values()), layers)
    _require(architecture, presence, tensors, path, raw)
    dims = solve_dims(found, path)
    config = architecture.read_hf(raw, dims, presence)
    _check_names(architecture, config, tensors, path)
    check_heads(config, dims, "config.json: num_attention_heads")
    findings = [
        Finding(c, "warning", m, r) for c, m, r in architecture.findings_hf_source(raw, config)
    ]
    findings += _check_sizes(raw, dims)
    findings += check_inv_freq(config, inv_freqs)
    tokenizer = tokenizer_files(path)
    record = read_record(path)
    generation = os.path.join(path, "generation_config.json")
    return Checkpoint(
        kind="hf",
        path=path,
        architecture=architecture,
        config=config,
        raw=raw,
        tensors=tensors,
        files=files,
        refusals=(*architecture.refuse_hf_source(raw), *refuse_labels(dims)),
        dropped=tuple(dropped),
        findings=tuple(findings),
        record=record,
        tokenizer=tokenizer,
        tokenizer_size=tokenizer_size(tokenizer),
        generation=read_json(generation)
        if brought_along(generation, path)
        else record.get("generation_config") or {},
        revision=revision,
        form=form,
    )


def _read_tensors(path: str) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    for single in _SINGLE:
        file = os.path.join(path, single)
        if exists(file):
            return _read_file(file), (file,)
        if exists(index := f"{file}.index.json"):
            return _read_sharded(path, index)
    raise BridgeError(
        f"{path} has a config.json, but none of {', '.join(_SINGLE)} or their index files. "
        "Download the weights too."
    )


def _read_sharded(path: str, index: str) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    check_own(index, path)
    weight_map = read_json(index, LARGE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BridgeError(f"{index} has no weight_map of names to files. Download it again.")
    tensors: dict[str, TensorRef] = {}
    names = sorted(set(weight_map.values()))
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise BridgeError(
                f"{index} names {name!r}, which isn't a file beside it. Don't use it."
            )
    files = [os.path.join(path, name) for name in names]
    for name, file in zip(names, ahead(files), strict=True):
        if not exists(file):
            raise BridgeError(
                f"{file} is missing, and {os.path.basename(index)} names it. Download it."
            )
        for key, ref in _read_file(file).items():
            if weight_map.get(key, name) == name:
                if key in tensors:
                    raise BridgeError(f"{key} stands in two files of {path}. Remove one of them.")
                tensors[key] = ref
    if missing := sorted(set(weight_map) - set(tensors)):
        raise BridgeError(f"{index} names tensors that its files don't hold: {some(missing)}.")
    return tensors, tuple(files)


def _read_file(file: str) -> dict[str, TensorRef]:
    if file.endswith(".safetensors"):
        tensors = read_safetensors(file)
        check_names(tensors, file)
        return tensors
    from neox_bridge.formats.torch_file import read_torch

    value = read_torch(file)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise BridgeError(f"{file} holds no state dict. Is it the weights of a model?")
    return tensors_of(value, file)


def _normalise(
    architecture: Architecture, refs: Mapping[str, TensorRef], path: str
) -> tuple[dict[str, TensorRef], list[Dropped]]:
    """Tensors under the names of the table, and the known buffers that go."""
    known = {w.hf.format(i="#") for w in architecture.weights if w.split != "zero"}
    reasons = {name.format(i="#"): reason for name, reason in architecture.dropped.items()}
    named: dict[str, TensorRef] = {}
    dropped, unknown = [], []
    for key, ref in refs.items():
        name = architecture.aliases.get(key, key)
        pattern = re.sub(r"\.\d+\.", ".#.", name, count=1)
        if pattern not in known and pattern not in reasons:
            name, pattern = architecture.prefix + name, architecture.prefix + pattern
        if pattern in reasons:
            dropped.append(Dropped(key, reasons[pattern]))
        elif pattern in known:
            if name in named:
                raise BridgeError(f"{path}: {key} stands there twice, under two names.")
            named[name] = ref
        else:
            unknown.append(key)
    if unknown:
        raise BridgeError(
            f"{path} holds tensors that no {architecture.model_type} model has: "
            f"{some(sorted(unknown))}. They would be lost; remove them first if that is right."
        )
    return named, dropped


def _count_layers(named: Iterable[str], path: str, raw: Mapping[str, Any]) -> int:
    found = (re.search(r"\.layers\.(\d{1,9})\.", key) for key in named)
    layers = max((int(match[1]) for match in found if match), default=-1) + 1
    if layers > MOST_LAYERS:
        raise BridgeError(f"{path} holds tensors of a layer {layers - 1}, which no model has.")
    told = raw.get("num_hidden_layers")
    if told is not None and told != layers:
        raise BridgeError(
            f"{path}: config.json says num_hidden_layers: {told}, and the files hold {layers}. "
            "A file is missing, or the config is another model's."
        )
    return layers


def _require(
    architecture: Architecture,
    presence: Presence,
    named: Collection[str],
    path: str,
    raw: Mapping[str, Any],
) -> None:
    """The weights that every model has are there; the optional ones are checked later."""
    missing = [name for _, _, name in lacking(architecture, presence.layers, named)]
    headless = architecture.head not in named and SCORE not in named
    if headless and not raw.get("tie_word_embeddings"):
        missing.append(architecture.head)
    if missing:
        raise BridgeError(
            f"{path}: tensors are missing: {some(missing)}. Download the files again."
        )


def _check_names(
    architecture: Architecture, config: ModelConfig, named: Collection[str], path: str
) -> None:
    want = {w.hf.format(i=b) for w, b in model_weights(architecture, config)}
    if missing := sorted(want - set(named)):
        raise BridgeError(
            f"{path}: tensors are missing: {some(missing)}. Download the files again."
        )
    if extra := sorted(set(named) - want):
        raise BridgeError(f"{path}: some blocks have tensors that others lack: {some(extra)}.")


def _check_sizes(raw: Mapping[str, Any], dims: Mapping[str, int]) -> list[Finding]:
    found = []
    told = {"hidden_size": "hidden", "intermediate_size": "ffn", "vocab_size": "vocab"}
    for key, dim in told.items():
        if key in raw and raw[key] != dims[dim]:
            found.append(
                Finding(
                    "config-size",
                    "warning",
                    f"config.json says {key}: {raw[key]}, and the tensors say {dims[dim]}, which "
                    "is taken",
                )
            )
    return found
