"""Opens a Hugging Face folder: safetensors or ``pytorch_model*.bin``, one file or sharded."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from neox_bridge.architectures import complete, for_hf, form_of
from neox_bridge.architectures.base import Architecture, Form, ModelConfig, Presence
from neox_bridge.architectures.heads import SCORE, refuse_labels
from neox_bridge.architectures.hf_config import hf_sizes
from neox_bridge.architectures.rows import model_rows, table_rows
from neox_bridge.architectures.setting_types import MOST_LAYERS, check_hf
from neox_bridge.errors import BridgeError, NotOfFamily
from neox_bridge.findings import Dropped, Finding
from neox_bridge.formats.safetensors import read_safetensors
from neox_bridge.frameworks.check_keys import unknown_in_config, unknown_in_mamba_ssm
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.layouts.carried_files import carried_beside
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint, Copy, refuse_all
from neox_bridge.layouts.derived_values import check_inv_freq, mismatch_finding
from neox_bridge.layouts.folder_kinds import (
    ADAPTER_NAME,
    adapter_beside,
    merge_command,
    refuse_foreign,
    shards_without_index,
    unfinished_download,
)
from neox_bridge.layouts.index_findings import index_findings, index_ignored
from neox_bridge.layouts.joined_tensors import halves_of_pairs, split_joined, stored_name
from neox_bridge.layouts.linked_files import brought_along, check_own
from neox_bridge.layouts.quantized import original_of, quantized_class, refuse_quantized
from neox_bridge.layouts.record_file import read_record
from neox_bridge.layouts.same_values import same_place
from neox_bridge.layouts.sizes import check_heads, dtype_of_most, solve_dims
from neox_bridge.layouts.tensor_names import check_names, state_dict_of, tensors_of
from neox_bridge.layouts.text_files import list_folder, read_json
from neox_bridge.layouts.tokenizer import NAMES, tokenizer_files, tokenizer_size
from neox_bridge.layouts.weight_sets import WeightSet, read_index
from neox_bridge.layouts.wrapped_names import Unwrapped, unwrap
from neox_bridge.stores.paths import ahead, lexists
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SETTINGS = ("config.json", "params.json", "checklist.chk")  # the latter two are Meta's
# heads of transformers classes for other tasks, and TRL's value head
_OTHER_HEAD = re.compile(r"(^|\.)(classifier|qa_outputs|v_head|value_head|reward_head)\.")


def open_hf(path: str, revision: str = "") -> Checkpoint:
    """Open a folder with a config.json. Raises BridgeError or Refused, naming the file or key.

    Settings that another library's format cannot express come from the record in the folder.
    """
    config = os.path.join(path, "config.json")
    check_own(config, path)
    original = read_json(config)
    if form_of(original) is None and isinstance(original.get("model_type"), str):
        for_hf(original)  # an unknown family has settings of other kinds
    check_hf(original, config)
    raw, form = dict(complete(original)), form_of(original)
    if form is not None:
        kept = read_record(path).get("config")
        if isinstance(kept, dict) and kept.get("model_type") == raw["model_type"]:
            raw = {**kept, **raw}
    check_hf(raw, config)  # with the settings of mamba_ssm by their names in transformers
    architecture = for_hf(raw)
    stored = _read_tensors(path)
    table = _Table(architecture)
    unwrapped = unwrap(stored.tensors, table.has, path)
    _refuse_other_kinds(table, raw, stored, unwrapped, path)
    named, dropped, aliased = _normalise(table, raw, stored.tensors, unwrapped, path)
    head, more = _tied_head(architecture, raw, named)
    dropped += more
    copies = [*aliased, *_renamed(table, stored.copies, unwrapped)]
    inv_freqs = {k: v for k, v in stored.tensors.items() if k.endswith("rotary_emb.inv_freq")}
    wholes = {name: whole_of(ref) for name, ref in named.items()}
    wholes = split_joined(architecture, wholes, *architecture.hf_heads(raw), path)
    forms = frozenset(form.name for form in architecture.forms)
    unknown = (
        unknown_in_mamba_ssm(original)
        if form is not None
        else unknown_in_config(raw, architecture.name, forms)
    )
    checkpoint = checkpoint_of(
        path, raw, wholes, stored.files, dropped, inv_freqs, revision, form, head, unknown
    )
    return replace(
        checkpoint,
        tensors=halves_of_pairs(architecture, checkpoint.config, checkpoint.tensors),
        copies=tuple(copies),
        wrappers=unwrapped.wrappers,
        unindexed=stored.unindexed,
        index_findings=tuple(stored.findings),
        findings=(
            *checkpoint.findings,
            *stored.findings,
            *_folder_findings(path, stored, unwrapped),
        ),
    )


def _tied_head(
    architecture: Architecture, raw: Mapping[str, Any], named: dict[str, TensorRef]
) -> tuple[Whole | None, list[Dropped]]:
    """Remove the head of a tied model from the tensors.

    Returns the head, if it may differ from the embeddings, and what is dropped. If there is a head
    but no embeddings, it is used for both, as in every transformers (safetensors saves shared
    tensors under one name).
    """
    name, embeddings = architecture.head, architecture.embeddings
    if not raw.get("tie_word_embeddings") or name not in named:
        return None, []
    head = named.pop(name)
    if embeddings not in named:
        named[embeddings] = head
        return None, []
    if same_place(head, named[embeddings]):
        return None, [Dropped(name, "identical to the tied embeddings")]
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
    """Build a checkpoint from tensors with the table's Hugging Face names, and check them.

    raw: config.json, or its equivalent. Raises BridgeError for missing or contradictory tensors.
    """
    architecture = for_hf(raw)
    layers = _count_layers(tensors, path, raw, architecture)
    shapes = {
        row.hf: (row.weight, tensors[row.hf].shape)
        for row in table_rows(architecture, layers)
        if row.hf in tensors and not row.weight.neox_only
    }
    presence = Presence(frozenset(tensors), dtype_of_most(tensors.values()), layers)
    _require(architecture, presence, tensors, path, raw)
    dims = solve_dims(shapes, path)
    try:
        config = architecture.read_hf(raw, dims, presence)
    except BridgeError as error:  # the error names the key, but not the folder
        raise type(error)(f"{path}: {error}") from None
    _check_names(architecture, config, tensors, path, raw)
    heads_key = architecture.hf_keys.get("num_attention_heads", "num_attention_heads")
    check_heads(config, dims, f"config.json: {heads_key}")
    rows_of_q = dims.get("q", config.hidden)
    if not raw.get("head_dim") and rows_of_q != config.hidden:
        raise BridgeError(
            f"{path}: the heads of q are {rows_of_q // config.heads} wide, but config.json has no "
            f"head_dim, and its hidden size makes them {config.hidden // config.heads} wide. The "
            "config belongs to another model, or head_dim is missing from it."
        )
    findings = architecture.findings_hf_source(raw, config)
    findings += _check_sizes(raw, config, architecture)
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
        carried=carried_beside(path, model_files(files)),
    )


def model_files(paths: Iterable[str]) -> set[str]:
    """The names of the files that a model consists of. paths: those of its weights."""
    weights = {os.path.basename(path) for path in paths}
    indexes = {f"{name}.index.json" for name in _SINGLE}
    return {*weights, *indexes, *NAMES, *_SETTINGS, RECORD}


def _remote_code(raw: Mapping[str, Any], architecture: Architecture) -> Iterator[Finding]:
    """The finding about code in the repository, which needs trust_remote_code."""
    if code := raw.get("auto_map"):
        named = [str(value)[:80] for value in code.values()] if isinstance(code, dict) else []
        yield Finding(
            "remote-code",
            "warning",
            f"config.json has auto_map ({some(named, 3)}), which refers to custom code. "
            "neox-bridge does not run custom code. It reads the model as "
            f"{architecture.hf_class} of transformers",
            "compare the logits with those of the custom code: neox-bridge verify --logits "
            "--tokens FILE.npz",
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    """The contents of the weight files, by the names in them.

    Attributes:
        copies: Tensors that are in two files.
        findings: What the index says and the files do not confirm.
        classes: See ``quantized_class``.
        unindexed: Whether these are shards without an index.
    """

    tensors: dict[str, TensorRef]
    files: tuple[str, ...]
    copies: list[Copy] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    classes: Mapping[str, str] = field(default_factory=dict)
    unindexed: bool = False


def _read_tensors(path: str) -> _Stored:
    for single in _SINGLE:
        file = os.path.join(path, single)
        index = f"{file}.index.json"
        if lexists(file):
            beside = [index_ignored(single)] if lexists(index) else []
            tensors, classes = _read_file(file)
            return _Stored(tensors, (file,), findings=beside, classes=classes)
        if lexists(index):
            return _read_shards(path, read_index(path, f"{single}.index.json", list_folder(path)))
    if (names := shards_without_index(path)) is not None:
        return replace(_read_shards(path, WeightSet("", tuple(names))), unindexed=True)
    refuse_foreign(path)
    raise BridgeError(
        f"{path} has a config.json but no weights: {', '.join(_SINGLE)} and their index files "
        "are missing. Download the weights too."
    )


def _read_shards(path: str, weights: WeightSet) -> _Stored:
    """Read the tensors of shards. Of a tensor in two shards, the copy that the index names is read.

    If the index does not name it, the last copy is read, as in transformers; without an index, the
    first.
    """
    weight_map = weights.weight_map
    places: dict[str, dict[str, TensorRef]] = {}
    classes: dict[str, str] = {}
    files = [os.path.join(path, name) for name in weights.files]
    for name, file in zip(weights.files, ahead(files), strict=True):
        if not lexists(file):
            raise BridgeError(
                f"{file} is missing, although the index file names it. "
                f"{unfinished_download(path) or 'Download it.'}"
            )
        held, quantized = _read_file(file)
        classes |= quantized
        for key, ref in held.items():
            places.setdefault(key, {})[name] = ref
    tensors: dict[str, TensorRef] = {}
    homes: dict[str, str] = {}
    twice: dict[str, str] = {}
    copies: list[Copy] = []
    for key, by_name in places.items():
        unlisted = list(by_name)[-1 if weight_map else 0]
        home = weight_map.get(key, unlisted)
        wanted = by_name.pop(home, None)
        if wanted is not None:
            tensors[key], homes[key] = wanted, home
            if by_name:
                twice[key] = ", ".join(by_name)
            copies += [Copy(key, wanted, ref, key, key) for ref in by_name.values()]
    if missing := sorted(set(weight_map) - set(tensors) - set(classes)):
        raise BridgeError(
            f"{path}: the index file names tensors that its files do not contain: {some(missing)}. "
            f"{unfinished_download(path) or 'Download the files again.'}"
        )
    findings: list[Finding] = []
    if weights.index:
        findings += index_findings(weights, tensors, homes, twice, complete=not classes)
    return _Stored(tensors, tuple(files), copies, findings, classes)


def _read_file(file: str) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The tensors of a file, and the classes of quantized ones."""
    if file.endswith(".safetensors"):
        tensors = read_safetensors(file)
        check_names(tensors, file)
        return tensors, {}
    from neox_bridge.formats.torch_file import read_torch

    value = state_dict_of(read_torch(file), file)
    tensors = tensors_of(value, file)
    classes = {k: name for k, v in value.items() if (name := quantized_class(v))}
    return tensors, classes


def _folder_findings(path: str, stored: _Stored, unwrapped: Unwrapped) -> Iterator[Finding]:
    """The findings about problems of the folder that do not prevent reading the model."""
    if unwrapped.wrappers:
        wrappers = ", ".join(f"`{wrapper}`" for wrapper in unwrapped.wrappers)
        by = f" (of {unwrapped.by})" if unwrapped.by else ""
        yield Finding(
            "wrapped-names",
            "warning",
            f"the tensor names contain {wrappers}{by}, which is not part of the model. It is "
            "removed. transformers would load random weights from this folder",
            subject="wrapped names",
        )
    if stored.unindexed:
        yield Finding(
            "no-index",
            "warning",
            f"the index file of {len(stored.files)} shards is missing. All their tensors are "
            "read. transformers would not load this folder",
            subject="missing index",
        )
    if adapter := adapter_beside(path):
        yield Finding(
            "adapter-beside",
            "warning",
            f"{adapter} lies beside the weights. transformers with peft loads the adapter on top "
            "of them. neox-bridge reads only the weights",
            f"merge the adapter first if it belongs to the model: {merge_command(path)}",
        )


class _Table:
    """The tensor names of a family, as patterns with ``#`` for the number of the block.

    known: the patterns of weights. reasons: why known buffers are dropped, by pattern.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        names = (architecture.joined_name(w.hf) for w in architecture.weights if w.split != "zero")
        self.known = {name.format(i="#") for name in names}
        self.reasons = {name.format(i="#"): why for name, why in architecture.dropped.items()}

    def find(self, key: str) -> tuple[str, str]:
        """The name of a tensor in the whole model, and the pattern of that name."""
        name = self.architecture.aliases.get(key, key)
        pattern = re.sub(r"\.\d+\.", ".#.", name, count=1)
        if pattern not in self.known and pattern not in self.reasons:
            prefix = self.architecture.prefix
            name, pattern = prefix + name, prefix + pattern
        return name, pattern

    def has(self, key: str) -> bool:
        """Whether the family has a weight or a buffer of this name."""
        _, pattern = self.find(key)
        return pattern in self.known or pattern in self.reasons


def _refuse_other_kinds(
    table: _Table,
    raw: Mapping[str, Any],
    stored: _Stored,
    unwrapped: Unwrapped,
    path: str,
) -> None:
    """Raise if the tensors are those of a quantized model or of an unmerged adapter."""
    known = [k for k, n in unwrapped.names.items() if table.has(n)]
    refuse_quantized("hf", path, raw, stored.tensors, stored.files, known, stored.classes)
    adapted = [key for key in stored.tensors if ADAPTER_NAME.search(key)]
    if adapted:
        raise NotOfFamily(
            f"{path} contains the weights of an adapter and those of its base model "
            f"({some(adapted, 2)}). Neither alone is the model. Merge the adapter into the "
            "weights (merge_and_unload of peft), save the model, and convert the result."
        )


def _normalise(
    table: _Table,
    raw: Mapping[str, Any],
    refs: Mapping[str, TensorRef],
    unwrapped: Unwrapped,
    path: str,
) -> tuple[dict[str, TensorRef], list[Dropped], list[Copy]]:
    """The tensors by their names in the table, the dropped buffers, and second copies."""
    architecture = table.architecture
    named: dict[str, TensorRef] = {}
    keys: dict[str, str] = {}
    dropped, unknown, copies = [], [], []
    for key, ref in refs.items():
        name, pattern = table.find(unwrapped.names[key])
        if pattern in table.reasons:
            dropped.append(Dropped(key, table.reasons[pattern]))
        elif pattern in table.known:
            if name in named:
                copies.append(Copy(name, named[name], ref, keys[name], key))
                continue
            named[name], keys[name] = ref, key
        else:
            unknown.append(key)
    if unknown:
        heads = [key for key in unknown if _OTHER_HEAD.search(key)]
        what = "A conversion would lose them, so it is refused."
        if heads and len(heads) == len(unknown):
            what = (
                "They are the head for another task, which GPT-NeoX does not support. Convert "
                f"the {architecture.hf_class} that it was made from."
            )
        elif refusals := architecture.refuse_hf_source(raw):
            reasons = ". ".join(f"{refusal.key}: {refusal.reason}" for refusal in refusals)
            what = f"It cannot be converted. {reasons}."
        raise NotOfFamily(
            f"{path} contains tensors that no {architecture.name} model has: "
            f"{some(sorted(unknown))}. {what}"
        )
    return named, dropped, copies


def _renamed(table: _Table, copies: Iterable[Copy], unwrapped: Unwrapped) -> list[Copy]:
    """Rename copies of tensors in other files as in the table. Dropped buffers are left out."""
    renamed = []
    for copy in copies:
        name, pattern = table.find(unwrapped.names.get(copy.name, copy.name))
        if pattern in table.known and pattern not in table.reasons:
            renamed.append(replace(copy, name=name))
    return renamed


def _count_layers(
    named: Iterable[str], path: str, raw: Mapping[str, Any], architecture: Architecture
) -> int:
    matches = (re.search(r"\.(?:layers|h)\.(\d{1,9})\.", key) for key in named)
    layers = max((int(match[1]) for match in matches if match), default=-1) + 1
    if layers > MOST_LAYERS:
        raise BridgeError(
            f"{path} contains tensors of layer {layers - 1}, more layers than any model has."
        )
    count = architecture.hf_keys.get("num_hidden_layers", "num_hidden_layers")
    stated = raw.get(count)
    if stated is not None and stated != layers:
        raise BridgeError(
            f"{path}: config.json sets {count}: {stated}, but the files contain "
            f"{layers} layers. A file is missing, or config.json belongs to another model."
        )
    return layers


def _require(
    architecture: Architecture,
    presence: Presence,
    named: Collection[str],
    path: str,
    raw: Mapping[str, Any],
) -> None:
    """Check that the weights that every model has exist. Optional ones are checked later."""
    rows = table_rows(architecture, presence.layers)
    missing = [row.hf for row in rows if row.weight.required and row.hf not in named]
    if missing:
        refuse_all(architecture.refuse_hf_source(raw), path)
        raise _missing(architecture, path, missing)
    headless = architecture.head not in named and SCORE not in named
    if headless and not raw.get("tie_word_embeddings"):
        raise NotOfFamily(_no_head(architecture, path, raw))


def _missing(architecture: Architecture, path: str, names: list[str]) -> BridgeError:
    names = list(dict.fromkeys(stored_name(architecture, name) for name in names))
    way_out = unfinished_download(path) or "Download the files again."
    return BridgeError(f"{path}: tensors are missing: {some(names)}. {way_out}")


def _no_head(architecture: Architecture, path: str, raw: Mapping[str, Any]) -> str:
    """The message for a model without its output head, with what to do about it."""
    base = architecture.hf_class.replace("ForCausalLM", "Model")
    names = [str(name) for name in raw.get("architectures") or ()]
    original = original_of(path, raw)
    full = f"the full {architecture.hf_class}" + (f", {original}" if original else "")
    tie = f'set "tie_word_embeddings": true in {os.path.join(path, "config.json")}'
    if base in names:
        return (
            f"{path} is a {base}, the base model without an output head: {architecture.head} is "
            f"missing, and it is learned. Convert {full}, saved with its head. Or, if the model "
            f"uses its embeddings as the head, {tie}."
        )
    tie_words = "does not say tie_word_embeddings: true"
    if raw.get("tie_word_embeddings") is False:
        tie_words = "says tie_word_embeddings: false"
    return (
        f"{path} has no output head: {architecture.head} is missing, although config.json "
        f"{tie_words}. If the model uses its embeddings as the head, {tie}. Otherwise convert "
        f"{full}, saved with its head."
    )


def _check_names(
    architecture: Architecture,
    config: ModelConfig,
    named: Collection[str],
    path: str,
    raw: Mapping[str, Any],
) -> None:
    want = {row.hf for row in model_rows(architecture, config)}
    if missing := sorted(want - set(named)):
        refuse_all(architecture.refuse_hf_source(raw), path)
        raise _missing(architecture, path, missing)
    if extra := sorted(set(named) - want):
        raise BridgeError(
            f"{path}: these tensors do not belong to the model that the others describe: "
            f"{some(extra)}. The files may be of different models. Download them again."
        )


def _check_sizes(
    raw: Mapping[str, Any], config: ModelConfig, architecture: Architecture
) -> Iterator[Finding]:
    for key, (_, size) in hf_sizes(architecture, config).items():
        if raw.get(key) is not None and raw[key] != size:
            yield Finding(
                "config-size",
                "warning",
                f"config.json says {key}: {raw[key]}, but the tensors say {size}, which is taken",
                subject="config sizes",
            )
