"""Opens a GPT-NeoX folder: a root with ``latest``, or one ``global_stepN``, in either layout."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NoReturn

from neox_bridge.architectures import for_neox
from neox_bridge.architectures.base import INV_FREQ, Architecture, ModelConfig, shared_reason
from neox_bridge.architectures.llama_like import with_one_matrix
from neox_bridge.architectures.neox_config import attention_kinds
from neox_bridge.architectures.neox_only import (
    POSITIONS,
    contradiction,
    neox_only,
    shapes_of,
    unknown_tensors,
)
from neox_bridge.architectures.pipeline_stages import stages_of, with_owners
from neox_bridge.architectures.setting_types import check_neox
from neox_bridge.errors import BridgeError, Refused, SettingsMissing
from neox_bridge.findings import Dropped
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.formats.yml import DuplicateKey, duplicate_finding, merge_ymls, read_yml
from neox_bridge.frameworks.check_keys import unknown_in_yml
from neox_bridge.frameworks.eras import TODAY, MlpNames
from neox_bridge.frameworks.setting_defaults import (
    DROPOUT,
    OUTPUT_LAYER,
    defaults_left_out,
    trained_before_changes,
)
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.frameworks.writers import writer_of
from neox_bridge.layouts.assemble import assemble, naming_proposal
from neox_bridge.layouts.carried_files import carried_in_run
from neox_bridge.layouts.checkpoint import Checkpoint, LayoutName, NeoxState
from neox_bridge.layouts.config_files import (
    ConfigFiles,
    config_files,
    config_nearby,
    skipped_finding,
)
from neox_bridge.layouts.derived_values import is_zero, mismatch_finding
from neox_bridge.layouts.file_names import (
    LAYER,
    RANK,
    ZERO3,
    layer_file,
    optimizer_files,
    rank_file,
)
from neox_bridge.layouts.folder_kinds import refuse_deepspeed
from neox_bridge.layouts.gqa import rms_epsilon, told_order, unknown_order
from neox_bridge.layouts.hub_cache import revision_of
from neox_bridge.layouts.missing_files import missing_ranks, missing_ranks_finding, told_ranks
from neox_bridge.layouts.origin import original_rows
from neox_bridge.layouts.quantized import refuse_quantized
from neox_bridge.layouts.record_file import read_record
from neox_bridge.layouts.run_tokenizer import local_tokenizer, named_tokenizer
from neox_bridge.layouts.step_folder import (
    StepFolder,
    check_step,
    step_finding,
    step_folder,
    step_in_name,
    weights_above_finding,
)
from neox_bridge.layouts.tensor_names import check_names
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.layouts.tokenizer import tokenizer_size
from neox_bridge.layouts.transformer_engine import STATE, Ranks, to_plain
from neox_bridge.layouts.universal_folder import ZERO, is_universal
from neox_bridge.layouts.untrusted import settings, text, whole
from neox_bridge.layouts.window import effective_window
from neox_bridge.layouts.wrapped_names import without_wrappers
from neox_bridge.stores.paths import absolute, ahead
from neox_bridge.tensors.flat import in_place_of
from neox_bridge.tensors.fused import GqaOrder
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural, some

_MOST_FILES = 100_000  # of one step; even the largest models have fewer
_SHOWN = 7  # files in a message; any number of files can be missing


@dataclass(frozen=True, slots=True)
class _Read:
    """The contents of the files: tensors by tensor-parallel rank, GPT-NeoX layer and name.

    Attributes:
        states: The names of what Transformer Engine stores in addition to its weights.
        tp: The tensor-parallel ranks of a universal checkpoint; None for others.
        parts: The bytes of the tensors in ``ranks`` that ZeRO stage 3 keeps in parts.
        stores_buffers: Whether a universal checkpoint says that its run stored inv_freq.
    """

    layout: LayoutName
    ranks: Ranks
    meta: Mapping[str, Any]
    stages: int
    files: tuple[str, ...]
    states: tuple[str, ...] = ()
    tp: int | None = None
    stores_buffers: bool = False
    parts: Mapping[TensorRef, Whole] = field(default_factory=dict)

    @property
    def is_universal(self) -> bool:
        return self.tp is not None

    def stored_as(self, ref: TensorRef) -> list[TensorRef]:
        """The stored parts of a tensor in ``ranks``; the tensor itself if it is not in parts."""
        pieces = self.parts[ref].pieces if ref in self.parts else ()
        return [piece.source for piece in pieces if piece.source is not None] or [ref]

    @property
    def names(self) -> set[str]:
        """The names of the first rank's tensors, without their layers."""
        return {name for tensors in self.ranks[0].values() for name in tensors}


def open_neox(
    path: str,
    step: int | None = None,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
    revision: str = "",
) -> Checkpoint:
    """Open a checkpoint folder. Raises BridgeError or Refused, naming the file or key.

    Args:
        path: The folder.
        step: The step to open, instead of that in ``latest``.
        configs: yml files to use instead of those in the checkpoint.
        gqa_order: The order of grouped-query rows, instead of the order that the files show.
        revision: The Hub revision of the folder, ``org/name@step1000``, if it is known.
    """
    place = step_folder(path, step)
    root, folder = place.root, place.folder
    chosen = ConfigFiles(tuple(configs)) if configs else config_files(folder, root)
    raw, duplicates, unknown = _read_configs(place, chosen)
    names = list_folder(folder)
    read = _read_files(folder, names, raw)
    args = settings(read.meta, folder)
    check_neox(args, f"{folder}: the args of its mp_rank files")
    _check_args(raw, args, read, folder)
    record = read_record(folder)
    _refuse_quantized(folder, raw, read)
    _refuse_row_output(folder, raw, read)
    plain = to_plain(read.ranks, raw, folder, read.stored_as)
    window = effective_window(plain.raw, read.layout)
    raw, read = dict(window.raw), replace(read, ranks=plain.ranks)
    layers = _layers(raw, args, folder)
    architecture = _family(raw, record, read, layers, folder)
    if architecture.shared and read.is_universal:
        raise Refused(
            f"{folder}: {shared_reason(architecture.shared)}, and a universal checkpoint contains "
            "it once, which is not supported. Use the checkpoint that it was made from."
        )
    if architecture.neox_only and not read.is_universal:
        _check_yml(raw, read, folder)
    old = {weight.old for weight in architecture.weights if weight.old}
    mlp_names: MlpNames = "dense" if old & read.names else "linear"
    known_order = gqa_order or told_order(raw, record, mlp_names)
    order = known_order or "grouped"
    try:
        config, tensors, dropped, mismatch = assemble(
            architecture,
            read.ranks,
            _with_dropout(raw, text(read.meta, "ds_version"), mlp_names),
            layers,
            folder,
            order,
            frozenset(plain.modules),
        )
    except BridgeError as error:
        raise naming_proposal(error, raw, folder) from None
    if architecture.shared:
        architecture = _with_owners(architecture, config, raw, read)
    tokenizer = local_tokenizer(place, raw)
    revision = revision or revision_of(folder)
    named_step = step_in_name(folder, revision)
    saved = _saved_step(read.meta, record, folder)
    number = named_step if saved is None else saved
    check_step(step, place, number)
    iteration = (step or 0) if number is None else number
    tag = f"global_step{iteration}" if place.flat else os.path.basename(folder)
    state = NeoxState(
        root=root,
        folder=folder,
        step=tag,
        layout=read.layout,
        tp=read.tp or len(read.ranks),
        pp=read.stages if read.layout == "layers" else 0,
        mlp_names=mlp_names,
        inv_freq="store" if read.stores_buffers or INV_FREQ in read.names else "omit",
        iteration=iteration,
        named_step=named_step,
        configs=tuple(map(absolute, chosen.paths)),
        configs_given=bool(configs),
        writer=writer_of(read.meta, optimizer_files(names), text(record, "written_by")),
        args=dict(args),
        ds_version=text(read.meta, "ds_version"),
        optimizer=optimizer_files(names),
        gqa_order=order,
        te=frozenset(plain.modules),
        ranks=tuple(read.ranks),
        universal=read.is_universal,
        gqa_order_known=known_order is not None or "attention" in plain.modules,
        rms_eps="outside" if known_order == "interleaved" or mlp_names == "dense" else "inside",
        duplicate_keys=tuple(duplicates),
        dp=told_ranks(read.meta, "dp_world_size"),
        missing_ranks=() if read.is_universal or read.parts else missing_ranks(names, read.meta),
        parts=read.parts,
        stored_wholes=tensors if read.parts else {},
    )
    if read.parts:
        layer_tensors = [stored for rank in read.ranks for stored in rank.values()]
        held = {ref: whole_of(ref) for stored in layer_tensors for ref in stored.values()}
        held |= read.parts
        tensors = {
            name: replace(in_place_of(whole, held), dtype=whole.dtype)
            for name, whole in tensors.items()
        }
    tied_head = tensors.pop(architecture.head, None) if config.tied_embeddings else None
    if read.is_universal:
        from neox_bridge.layouts.universal import as_computed, dtype_of

        copies = state.tp // len(read.ranks)
        config, tensors = as_computed(architecture, config, tensors, dtype_of(read.meta), copies)
    outside = raw.get("norm") == "rmsnorm" and state.rms_eps == "outside"
    findings = (
        *map(duplicate_finding, duplicates),
        *map(skipped_finding, chosen.skipped),
        *plain.findings,
        *window.findings,
        step_finding(folder, revision, saved, step if named_step is None else named_step),
        weights_above_finding(place),
        missing_ranks_finding(folder, state.missing_ranks) if state.missing_ranks else None,
        mismatch_finding(mismatch) if mismatch else None,
        unknown_order() if config.grouped_query and not state.gqa_order_known else None,
        rms_epsilon() if outside else None,
    )
    return Checkpoint(
        kind="neox",
        path=absolute(path),
        revision=revision,
        architecture=architecture,
        config=config,
        raw=raw,
        tensors=tensors,
        files=read.files,
        refusals=(*architecture.refuse_neox_source(raw), *window.refusals),
        dropped=(*dropped, *plain.dropped, *_set_aside(read, state)),
        findings=tuple(filter(None, findings)),
        record=record,
        neox=state,
        original_rows=original_rows(raw, config.dims["vocab"], f"{folder}/configs"),
        tokenizer=tokenizer,
        tokenizer_size=tokenizer_size(tokenizer) or record.get("tokenizer_size"),
        missing_tokenizer="" if tokenizer else named_tokenizer(raw),
        generation=record.get("generation_config") or {},
        tied_head=tied_head,
        inv_freq_mismatch=mismatch,
        unknown_keys=unknown,
        ignored_keys=frozenset(record.get("ignored_keys") or ()),
        carried=carried_in_run(root, raw, flat=place.flat),
    )


def _read_files(folder: str, names: Sequence[str], raw: Mapping[str, Any]) -> _Read:
    """The contents of the files of a step, in either layout."""
    if any(map(ZERO3.fullmatch, names)):
        return _read_zero3(folder, names)
    if ZERO in names and is_universal(folder):
        return _read_universal(folder, names)
    if any(map(LAYER.fullmatch, names)):
        return _read_layers(folder, names, raw)
    return _read_ranks(folder, names)


def _set_aside(read: _Read, state: NeoxState) -> Iterator[Dropped]:
    """What the files contain besides weights."""
    for name in read.states:
        yield Dropped(name, "fp8 scales of Transformer Engine")
    names = [*(["zero"] if state.universal else []), *state.optimizer]
    if isinstance(read.meta.get("optimizer"), dict):
        names.append("mp_rank_*: optimizer")
    below = "" if state.flat else f"{state.step}/"
    for name in names:
        yield Dropped(f"{below}{name}", "optimizer states", "optimizer")


def _saved_step(meta: Mapping[str, Any], record: Mapping[str, Any], folder: str) -> int | None:
    """The step according to the mp_rank files.

    neox-bridge writes 0 for a Hugging Face model whose step is unknown, so such a 0 is ignored.
    """
    number = whole(meta, "iteration", folder)
    source = record.get("source")
    from_hf = isinstance(source, dict) and source.get("kind") == "hf"
    return None if number == 0 and from_hf else number


def _refuse_quantized(folder: str, raw: Mapping[str, Any], read: _Read) -> None:
    """Raise Refused if the tensors of the ranks are those of a quantized model."""
    stored = {
        f"layer {number}: {name}": ref
        for rank in read.ranks[:1]
        for number, tensors in rank.items()
        for name, ref in tensors.items()
    }
    refuse_quantized("neox", folder, raw, stored, read.files)


def _refuse_row_output(folder: str, raw: Mapping[str, Any], read: _Read) -> None:
    """Raise Refused if the columns of the output layer are split over tensor-parallel ranks.

    That is output_layer_parallelism: row, the default of GPT-NeoX v1.0 (megatron/model/
    transformer.py, ParallelLinear). #905 disabled it (2023-05-02).
    """
    rank, ranks = read.ranks[0], len(read.ranks)
    output = rank.get(max(rank, default=0), {}).get("final_linear.weight")
    embedding = rank.get(0, {}).get("word_embeddings.weight")
    if ranks == 1 or output is None or embedding is None:
        return
    if len(output.shape) == len(embedding.shape) == 2 and (
        output.shape[1] * ranks == embedding.shape[1]
    ):
        setting = raw.get(OUTPUT_LAYER)
        why = (
            f"{OUTPUT_LAYER}: {setting}" if setting else f"{OUTPUT_LAYER} is row by default in v1.0"
        )
        raise Refused(
            f"{folder}: the columns of final_linear.weight are split over {ranks} "
            f"tensor-parallel ranks ({why}), which is not supported. GPT-NeoX disabled this "
            "split in 2023 because it was broken (#905)."
        )


def _with_dropout(raw: Mapping[str, Any], version: str, mlp_names: MlpNames) -> Mapping[str, Any]:
    """The yml with the default dropout of v1.0 if it sets none, because config.json states it."""
    if not trained_before_changes(version, mlp_names):
        return raw
    left_out = defaults_left_out(raw, old=True)
    return {**raw, **{key: left_out[key] for key in DROPOUT if key in left_out}}


def _family(
    raw: Mapping[str, Any], record: Mapping[str, Any], read: _Read, layers: int, folder: str
) -> Architecture:
    """The family of the yml and the record, or GPT-NeoX's rules for a model without a family.

    If a weight that must be zero in the record's family is not zero, the yml alone decides.
    """
    positions = str(raw.get("pos_emb") or "learned")
    if (missing := POSITIONS.get(positions)) and missing not in read.names:
        why = "A universal checkpoint has no buffers" if read.is_universal else "Correct the yml"
        raise Refused(
            f"{folder}: the yml says pos_emb: {positions}, but the checkpoint has no {missing}. "
            f"{why}."
        )
    tensors = shapes_of(read.ranks[0])
    by_rules = partial(neox_only, raw, tensors, layers, len(read.ranks))
    architecture = for_neox(raw, record)
    if architecture is None:
        return by_rules() or _refuse_blocks(raw, tensors, layers, folder)
    if architecture.gated and "mlp.dense_h_to_4h.weight" in read.names:
        architecture = with_one_matrix(architecture)
    known = {name for w in architecture.weights for name in (w.neox, w.old, w.also)}
    fused = any(weight.split == "fused" for weight in architecture.weights)
    grouped = raw.get("num_kv_heads") not in (None, raw.get("num_attention_heads"))
    unreadable = architecture.refuse_shape(len(read.ranks), TODAY.name)
    strange = read.names - known or (grouped and not fused) or unreadable
    if strange and (rules := by_rules()) is not None:
        return rules
    zeros = {weight.neox for weight in architecture.weights if weight.split == "zero"}
    layer_tensors = [tensors for rank in read.ranks for tensors in rank.values()]
    held = [read.stored_as(t[name]) for t in layer_tensors for name in zeros & set(t)]
    if all(is_zero(ref) for refs in held for ref in refs):
        return architecture
    other = for_neox(raw)
    # StableLM has no relative with a bias at that place
    return (by_rules() if other is architecture else other) or architecture


def _with_owners(
    architecture: Architecture, config: ModelConfig, raw: Mapping[str, Any], read: _Read
) -> Architecture:
    """See ``pipeline_stages.with_owners``. More stages than layers are reported later."""
    stages = read.stages if read.stages <= config.head_layer + 1 else 1
    layers = read.ranks[0].items()
    bounds = stages_of(
        architecture,
        config,
        raw,
        stages,
        lambda: ((layer, ref.shape) for layer, tensors in layers for ref in tensors.values()),
    )
    return with_owners(architecture, config.layers, bounds)


def _check_yml(raw: Mapping[str, Any], read: _Read, folder: str) -> None:
    """Raise Refused if GPT-NeoX would build other tensors from the yml than the checkpoint has."""
    key, name = contradiction(raw, read.names)
    if key:
        says = f"{key}: {raw[key]}" if key in raw else f"no {key}"
        has = "has" if any(stored.startswith(name) for stored in read.names) else "has no"
        raise Refused(
            f"{folder}/configs: the yml says {says}, but the checkpoint {has} {name}, so GPT-NeoX "
            "does not load it. Correct the yml."
        )


def _refuse_blocks(
    raw: Mapping[str, Any], tensors: Mapping[int, Mapping[str, int]], layers: int, folder: str
) -> NoReturn:
    """Raise Refused for a model without a family that GPT-NeoX's rules do not describe."""
    if unknown := unknown_tensors(raw, tensors, layers):
        raise Refused(
            f"{folder} contains tensors that no known GPT-NeoX has: {some(unknown)}. How ranks "
            "split them is not known, so they cannot be moved."
        )
    raise Refused(
        f"{folder}/configs: attention_config: {', '.join(sorted(attention_kinds(raw)))}: the "
        "tensors belong to blocks of other kinds. Correct the yml."
    )


def _read_configs(
    place: StepFolder, chosen: ConfigFiles
) -> tuple[dict[str, Any], list[DuplicateKey], tuple[UnknownKey, ...]]:
    folder, configs = place.folder, chosen.paths
    if not configs:
        _refuse_other_program(folder)
        raise SettingsMissing(
            folder,
            config_nearby(folder),
            [os.path.basename(file.path) for file in chosen.skipped],
        )
    raw, duplicates = merge_ymls(configs)
    check_neox(raw, f"{folder}/configs")
    unknown = unknown_in_yml(raw, lambda key: _file_of(key, configs))
    return raw, duplicates, unknown


def _file_of(key: str, configs: Sequence[str]) -> str:
    """The name of the last yml file that has a key."""
    names = [path for path in sorted(configs, key=os.path.basename) if key in read_yml(path)]
    return os.path.basename(names[-1]) if names else ""


def _refuse_other_program(folder: str) -> None:
    """Raise BridgeError if DeepSpeed saved a folder without configs for another program."""
    names = list_folder(folder)
    ranks = [name for name in names if RANK.fullmatch(name)]
    if not ranks or any(map(LAYER.fullmatch, names)):
        return
    module = read_values(os.path.join(folder, ranks[0])).get("module")
    if isinstance(module, dict) and module and not any("sequential." in str(k) for k in module):
        refuse_deepspeed(os.path.dirname(folder), some(sorted(map(str, module)), 2))


def _layers(raw: Mapping[str, Any], args: Mapping[str, Any], folder: str) -> int:
    count = whole({**args, **raw}, "num_layers", f"{folder}/configs")
    if count is None:
        raise BridgeError(
            f"{folder}/configs: num_layers is missing, and the args in the mp_rank files do not "
            "contain it either. Add num_layers to the yml."
        )
    return count


def _read_layers(folder: str, names: Sequence[str], raw: Mapping[str, Any]) -> _Read:
    layer_files = {(int(m[1]), int(m[2])): m[0] for n in names if (m := LAYER.fullmatch(n))}
    _check_one_each(folder, [n for n in names if LAYER.fullmatch(n)], layer_files.values())
    tp = max(rank for _, rank in layer_files) + 1
    stage_files = [name for name in names if RANK.fullmatch(name)]
    order = sorted(layer_files)
    first = [os.path.join(folder, name) for name in stage_files[:1]]
    started = ahead([*first, *(os.path.join(folder, layer_files[place]) for place in order)])
    meta = read_values(next(started)) if first else {}
    if isinstance(meta.get("module"), dict) and meta["module"]:
        raise Refused(
            f"{folder} contains weights in both layouts: in layer_*-model_*-model_states.pt and "
            f"in {stage_files[0]} (module). With pipe_parallel_size 1 or more GPT-NeoX reads the "
            "first, with 0 the second, so the model depends on the yml. Move the files of the "
            "layout that this run did not write out of the folder."
        )
    args = settings(meta, folder)
    tp = max(tp, whole(args, "model_parallel_size", folder) or 1)
    stated = whole({**raw, **args}, "num_layers", folder)
    last = max(layer for layer, _ in layer_files)
    layers = stated if stated is not None else last - (4 if raw.get("no_weight_tying") else 3)
    _check_count(
        folder, f"{plural(layers, 'layer')} on {plural(tp, 'rank')}", layers * tp, len(layer_files)
    )
    want = {0, *range(2, layers + 2), layers + 3} | {layer for layer, _ in layer_files}
    if raw.get("no_weight_tying"):
        want.add(layers + 4)
    places = ((layer, rank) for layer in sorted(want) for rank in range(tp))
    lacking = (layer_file(*place) for place in places if place not in layer_files)
    if missing := list(islice(lacking, _SHOWN)):
        raise BridgeError(
            f"{folder} is incomplete: {some(missing)} missing, of {plural(layers, 'layer')} on "
            f"{plural(tp, 'tensor-parallel rank')}. Copy the checkpoint again."
        )
    ranks: list[dict[int, dict[str, TensorRef]]] = [{} for _ in range(tp)]
    states: list[str] = []
    for (layer, rank), path in zip(order, started, strict=True):
        value = read_values(path, alike=True)
        ranks[rank][layer] = without_wrappers(_tensors(value, path), path)
        states += [f"layer {layer}: {key}" for key in _states(value) if rank == 0]
    files = [os.path.join(folder, name) for name in (*layer_files.values(), *stage_files)]
    lost = missing_ranks(names, meta)
    stages = max(1, (told_ranks(meta, "mp_world_size") or 1 if lost else len(stage_files)) // tp)
    return _Read("layers", ranks, meta, stages, tuple(sorted(files)), tuple(states))


def _read_ranks(folder: str, names: Sequence[str]) -> _Read:
    rank_files = {int(m[1]): m[0] for name in names if (m := RANK.fullmatch(name))}
    if not rank_files:
        raise BridgeError(
            f"{folder} is not a complete GPT-NeoX checkpoint: it contains neither "
            "layer_*-model_*-model_states.pt nor mp_rank_*_model_states.pt."
        )
    _check_one_each(folder, [n for n in names if RANK.fullmatch(n)], rank_files.values())
    values = {}
    ordered = sorted(rank_files)
    paths = (os.path.join(folder, rank_files[rank]) for rank in ordered)
    for rank, path in zip(ordered, ahead(paths), strict=True):
        values[rank] = read_values(path)
    first = values[min(values)]
    args = settings(first, folder)
    tp = max(max(rank_files) + 1, whole(args, "model_parallel_size", folder) or 1)
    _check_count(folder, plural(tp, "rank"), tp, len(rank_files))
    if missing := [rank_file(r) for r in range(tp) if r not in rank_files]:
        raise BridgeError(
            f"{folder} is incomplete: {some(missing)} missing, of "
            f"{plural(tp, 'tensor-parallel rank')}. Copy the checkpoint again."
        )
    ranks = []
    for rank in range(tp):
        path = os.path.join(folder, rank_files[rank])
        module = values[rank].get("module")
        if not isinstance(module, dict):
            raise BridgeError(
                f"{path} contains no weights (module), and there are no "
                "layer_*-model_*-model_states.pt files beside it. Copy the checkpoint again."
            )
        ranks.append(_by_layer(_tensors(module, path), path))
    files = tuple(os.path.join(folder, name) for _, name in sorted(rank_files.items()))
    states = tuple(_states(first.get("module")))
    return _Read("ranks", ranks, first, 1, files, states)


def _read_universal(folder: str, names: Sequence[str]) -> _Read:
    """The master weights of a universal checkpoint; see ``universal``."""
    from neox_bridge.layouts.deepspeed_values import check_meta
    from neox_bridge.layouts.universal import masters

    paths = [os.path.join(folder, name) for name in names if RANK.fullmatch(name)]
    if not paths:
        raise BridgeError(
            f"{folder} is incomplete: mp_rank_*_model_states.pt is missing. Copy the checkpoint "
            "again."
        )
    metas = [read_values(path) for path in paths]
    for meta, path in zip(metas, paths, strict=True):
        check_meta(meta, path)
    tp = whole(settings(metas[0], folder), "model_parallel_size", folder) or 1
    if tp < 1 or len(paths) % tp:
        raise BridgeError(
            f"{folder} is incomplete: it has {plural(len(paths), 'mp_rank file')}, of "
            f"{plural(tp, 'tensor-parallel rank')}. Copy the checkpoint again."
        )
    stored = masters(folder, metas, tp)
    buffers = [str(name) for meta in metas for name in meta.get("buffer_names") or ()]
    return _Read(
        "ranks" if stored.numbered else "layers",
        stored.ranks,
        metas[0],
        len(paths) // tp,
        (*sorted(stored.files), *paths),
        tp=tp,
        stores_buffers=any(name.endswith(INV_FREQ) for name in buffers),
    )


def _read_zero3(folder: str, names: Sequence[str]) -> _Read:
    """The parameters of a ZeRO stage 3 checkpoint; see ``zero3``."""
    from neox_bridge.layouts.zero3 import read_zero3

    if stray := [name for name in names if LAYER.fullmatch(name) or RANK.fullmatch(name)]:
        first = next(name for name in names if ZERO3.fullmatch(name))
        raise Refused(
            f"{folder} contains files of ZeRO stage 3, such as {first}, and of another stage, such "
            f"as {stray[0]}, so the model depends on the yml. Move the files that this run did not "
            "write out of the folder."
        )
    stored = read_zero3(folder, names)
    files = tuple(path for paths in (*stored.files.models, *stored.files.states) for path in paths)
    states = tuple(_states(stored.meta["module"]))
    return _Read("ranks", stored.ranks, stored.meta, 1, files, states, parts=stored.parts)


def _check_one_each(folder: str, names: Sequence[str], read: Collection[str]) -> None:
    """Refuse two files of one layer and rank, whose numbers differ only in leading zeros."""
    if spare := sorted(set(names) - set(read)):
        raise Refused(
            f"{folder} contains two files of the same layer and rank, such as {spare[0]}, and "
            "different programs load different ones. Move the wrong one out of the folder."
        )


def _check_count(folder: str, what: str, count: int, present: int) -> None:
    """Raise BridgeError if more files are missing than can be listed."""
    if count > _MOST_FILES:
        raise BridgeError(
            f"{folder} is incomplete: it declares {what} but contains {plural(present, 'file')}. "
            "Copy the checkpoint again."
        )


def _by_layer(tensors: Mapping[str, TensorRef], path: str) -> dict[int, dict[str, TensorRef]]:
    layers: dict[int, dict[str, TensorRef]] = {}
    for key, ref in without_wrappers(tensors, path).items():
        match = re.fullmatch(r"sequential\.(\d{1,9})\.(.+)", key)
        if match is None:
            raise BridgeError(
                f"{path}: {key} is not a GPT-NeoX tensor name (sequential.N.…), so another "
                "program saved this file with DeepSpeed. Save that model in Hugging Face format."
            )
        layers.setdefault(int(match[1]), {})[match[2]] = ref
    return layers


def read_values(path: str, *, alike: bool = False) -> dict[str, Any]:
    """The values of a GPT-NeoX file by name. alike: see ``read_torch``."""
    value = read_torch(path, alike=alike)
    if not isinstance(value, dict):
        raise BridgeError(
            f"{path} is not a file of a GPT-NeoX checkpoint: it does not contain a dictionary. "
            "Copy the checkpoint again."
        )
    return value


def _tensors(value: Mapping[str, Any], path: str) -> dict[str, TensorRef]:
    check_names(value, path)
    weights = {key: ref for key, ref in value.items() if not str(key).endswith(STATE)}
    if strange := [str(k)[:100] for k, v in weights.items() if not isinstance(v, TensorRef)]:
        raise BridgeError(
            f"{path}: not a tensor: {some(strange)}. No known model stores other values among its "
            "weights. Copy the checkpoint again."
        )
    return weights


def _states(value: object) -> list[str]:
    """The names of Transformer Engine's states: None, bytes or an io.BytesIO, never a weight."""
    keys = value if isinstance(value, dict) else ()
    return [str(key) for key in keys if str(key).endswith(STATE)]


def _check_args(raw: Mapping[str, Any], args: Mapping[str, Any], read: _Read, folder: str) -> None:
    for key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if key in raw and key in args and raw[key] != args[key]:
            raise BridgeError(
                f"{folder}: the yml says {key}: {raw[key]}, but the args in the checkpoint say "
                f"{args[key]}. The yml belongs to another model. Name the right one with "
                "`configs=`."
            )
    ranks = whole(args, "model_parallel_size", folder)
    if ranks is not None and ranks != (read.tp or len(read.ranks)):
        raise BridgeError(
            f"{folder} contains files of {len(read.ranks)} tensor-parallel ranks, but its args "
            f"say {ranks}. Some files may be left over from another layout. Keep the files of "
            "one layout."
        )
