"""Opens a Hugging Face folder: safetensors or ``pytorch_model*.bin``, one file or sharded."""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from neox_bridge.frameworks.check_keys import unknown_in_config, unknown_in_mamba_ssm
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.layouts.checkpoint import Checkpoint, Copy, some
from neox_bridge.layouts.derived_check import check_inv_freq, mismatch_finding
from neox_bridge.layouts.head import embeddings_of
from neox_bridge.layouts.own_files import brought_along, check_own
from neox_bridge.layouts.record_file import read_record
from neox_bridge.layouts.same_values import same_place
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
    stored = _read_tensors(path)
    named, dropped, aliased = _normalise(architecture, stored.tensors, path)
    head, more = _tied_head(architecture, raw, named)
    dropped += more
    copies = [*aliased, *_renamed(architecture, stored.copies)]
    inv_freqs = {k: v for k, v in stored.tensors.items() if k.endswith("rotary_emb.inv_freq")}
    wholes = {name: whole_of(ref) for name, ref in named.items()}
    forms = frozenset(form.name for form in architecture.forms)
    unknown = (
        unknown_in_mamba_ssm(told)
        if form is not None
        else unknown_in_config(raw, architecture.model_type, forms)
    )
    checkpoint = checkpoint_of(
        path, raw, wholes, stored.files, dropped, inv_freqs, revision, form, head, unknown
    )
    return replace(
        checkpoint,
        copies=tuple(copies),
        findings=(*checkpoint.findings, *stored.findings),
    )


def _tied_head(
    architecture: Architecture, raw: Mapping[str, Any], named: dict[str, TensorRef]
) -> tuple[Whole | None, list[Dropped]]:
    """Take the head of a tied model out of the tensors.

    Returns it, where it may differ from the embeddings, and what is dropped. A head alone stands
    for both, as in every transformers (shared tensors that safetensors saved under one name).
    """
    name, embeddings = architecture.head, embeddings_of(architecture)
    if not raw.get("tie_word_embeddings") or name not in named:
        return None, []
    head = named.pop(name)
    if embeddings not in named:
        named[embeddings] = head
        return None, []
    if same_place(head, named[embeddings]):
        return None, [Dropped(name, "it is the same tensor as the embeddings, which are tied")]
    return whole_of(head), []


def checkpoint_of(
    path: str,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Whole],
    files: tuple[str, ...],
    dropped: Sequence[Dropped] = (),
    inv_freqs: Mapping[str, TensorRef] = MappingProxyType({}),
    revision: str = "",
    form: Form | None = None,
    tied_head: Whole | None = None,
    unknown: tuple[UnknownKey, ...] = (),
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
    mismatch = check_inv_freq(config, inv_freqs)
    findings += [mismatch_finding(mismatch)] if mismatch else []
    findings += _remote_code(raw, architecture)
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
        tied_head=tied_head,
        inv_freq_mismatch=mismatch,
        unknown_keys=unknown,
        ignored_keys=frozenset(record.get("ignored_keys") or ()),
    )


def _remote_code(raw: Mapping[str, Any], architecture: Architecture) -> list[Finding]:
    """Code of the repository's own, which transformers runs with trust_remote_code only."""
    code = raw.get("auto_map")
    if not code:
        return []
    named = [str(value)[:80] for value in code.values()] if isinstance(code, dict) else []
    return [
        Finding(
            "remote-code",
            "warning",
            f"config.json has auto_map ({some(named, 3)}), code of its own, which neox-bridge "
            f"neither reads nor runs: the model is read as transformers' {architecture.hf_class}",
            "compare the logits with those that its own code computes: verify --logits --tokens "
            "FILE.npz",
        )
    ]


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the files of weights hold, by the names there. copies: tensors that are in two files."""

    tensors: dict[str, TensorRef]
    files: tuple[str, ...]
    copies: list[Copy] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def _read_tensors(path: str) -> _Stored:
    for single in _SINGLE:
        file = os.path.join(path, single)
        index = f"{file}.index.json"
        if exists(file):
            beside = [_index_ignored(single)] if exists(index) else []
            return _Stored(_read_file(file), (file,), findings=beside)
        if exists(index):
            return _read_sharded(path, index)
    raise BridgeError(
        f"{path} has a config.json, but none of {', '.join(_SINGLE)} or their index files. "
        "Download the weights too."
    )


def _index_ignored(single: str) -> Finding:
    """transformers looks for the single file first (modeling_utils.py)."""
    return Finding(
        "index-ignored",
        "warning",
        f"{single}.index.json and {single} are both in the folder. {single} is read, as "
        "transformers does, and the shards that the index names are not",
        f"remove the one that is out of date: {single}, or the index with its shards",
    )


def _read_sharded(path: str, index: str) -> _Stored:
    check_own(index, path)
    weight_map = read_json(index, LARGE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BridgeError(f"{index} has no weight_map of names to files. Download it again.")
    places: dict[str, list[tuple[str, TensorRef]]] = {}
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
            places.setdefault(key, []).append((name, ref))
    tensors: dict[str, TensorRef] = {}
    copies: list[Copy] = []
    for key, places_of_key in places.items():
        last = places_of_key[-1][0]
        wanted = weight_map.get(key, last)  # an unlisted tensor: transformers takes the last one
        for name, ref in places_of_key:
            if name == wanted:
                tensors[key] = ref
        others = (ref for name, ref in places_of_key if name != wanted)
        copies += [Copy(key, tensors[key], ref, key, key) for ref in others if key in tensors]
    if missing := sorted(set(weight_map) - set(tensors)):
        raise BridgeError(f"{index} names tensors that its files don't hold: {some(missing)}.")
    return _Stored(tensors, tuple(files), copies)


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
) -> tuple[dict[str, TensorRef], list[Dropped], list[Copy]]:
    """Tensors under the names of the table, the known buffers that go, and second copies."""
    known = {w.hf.format(i="#") for w in architecture.weights if w.split != "zero"}
    reasons = {name.format(i="#"): reason for name, reason in architecture.dropped.items()}
    named: dict[str, TensorRef] = {}
    keys: dict[str, str] = {}
    dropped, unknown, copies = [], [], []
    for key, ref in refs.items():
        name, pattern = _table_name(architecture, key, {*known, *reasons})
        if pattern in reasons:
            dropped.append(Dropped(key, reasons[pattern]))
        elif pattern in known:
            if name in named:
                copies.append(Copy(name, named[name], ref, keys[name], key))
                continue
            named[name], keys[name] = ref, key
        else:
            unknown.append(key)
    if unknown:
        raise BridgeError(
            f"{path} holds tensors that no {architecture.model_type} model has: "
            f"{some(sorted(unknown))}. They would be lost; remove them first if that is right."
        )
    return named, dropped, copies


def _table_name(architecture: Architecture, key: str, patterns: Collection[str]) -> tuple[str, str]:
    """What the table calls a tensor of a file, and that with # for the number of its block."""
    name = architecture.aliases.get(key, key)
    pattern = re.sub(r"\.\d+\.", ".#.", name, count=1)
    if pattern not in patterns:
        name, pattern = architecture.prefix + name, architecture.prefix + pattern
    return name, pattern


def _renamed(architecture: Architecture, copies: Iterable[Copy]) -> list[Copy]:
    """Copies of a tensor in other files under the table's names; buffers that go don't count."""
    known = {w.hf.format(i="#") for w in architecture.weights if w.split not in NEOX_ONLY}
    renamed = []
    for copy in copies:
        name, pattern = _table_name(architecture, copy.name, known)
        if pattern in known:
            renamed.append(replace(copy, name=name))
    return renamed


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
