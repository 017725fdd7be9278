"""Plans a Hugging Face folder: shards, index, config.json, tokenizer, model card, record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig, Presence
from neox_bridge.architectures.hf_config import hf_sizes
from neox_bridge.architectures.rows import model_rows
from neox_bridge.findings import Dropped, Finding
from neox_bridge.formats.safetensors import layout_safetensors
from neox_bridge.layouts.carried_names import CARD, GENERATION
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint
from neox_bridge.layouts.joined_tensors import to_stored
from neox_bridge.layouts.same_values import relation
from neox_bridge.layouts.text_files import dump_json
from neox_bridge.layouts.tokenizer import Tokenizer
from neox_bridge.planning.common import (
    carried_outputs,
    cast,
    cut_rows,
    text_file,
    tokenizer_outputs,
    with_vocabulary_rows,
)
from neox_bridge.planning.library_forms import WEIGHTS, chosen_form, form_settings, form_weights
from neox_bridge.planning.model_card import card_text, model_card
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.record import hf_record
from neox_bridge.tensors.fragments import cut_reductions
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Whole, cut
from neox_bridge.tensors.sharing import arranged, shared_together
from neox_bridge.wording import plural


def plan_hf(checkpoint: Checkpoint, options: Options, tokenizer: Tokenizer) -> Plan:
    """Plan all files of a Hugging Face folder with this model."""
    architecture = checkpoint.architecture
    form = chosen_form(architecture, options)
    wholes, config, dropped, findings = hf_model(checkpoint)
    rows, more, padding = _rows_to_keep(checkpoint, options, tokenizer)
    dropped += more
    findings += padding
    config = replace(config, dims={**config.dims, "vocab": rows})
    if options.dtype != "keep":
        config = replace(config, dtype=options.dtype)
    kept = with_vocabulary_rows(architecture, config, wholes)
    tensors = [
        _output(name, cast(whole, options.dtype))
        for name, whole in to_stored(architecture, config, kept).items()
    ]
    if form is None:
        files, layout = _safetensors(tensors, options)
    else:
        files, layout = [form_weights(form, architecture, config, tensors)], WEIGHTS
    eos = tokenizer.end_of_text
    if eos is not None and checkpoint.kind == "neox":
        config = replace(config, bos_token_id=eos, eos_token_id=eos)
    raw, originals = _config_json(architecture, checkpoint, config)
    record = hf_record(checkpoint)
    if form is not None:
        was = originals.get(form.name) or {}
        written, lost = form_settings(form, checkpoint, config, raw, was, tokenizer.size)
        dropped += lost
        files.append(text_file("config.json", dump_json(written)))
        record["config"] = raw
        if checkpoint.generation:
            record["generation_config"] = dict(checkpoint.generation)
    else:
        files.append(text_file("config.json", dump_json(raw)))
        if config.reward:
            findings += _padding(raw)
        else:
            generation = dump_json(_generation(checkpoint, raw))
            files.append(text_file("generation_config.json", generation))
    carried = {file.path: file for file in carried_outputs(checkpoint)}
    carried.pop(CARD, None)
    if (verbatim := carried.pop(GENERATION, None)) is not None:
        files = [verbatim if file.path == GENERATION else file for file in files]
    files += tokenizer_outputs(tokenizer)
    files += carried.values()
    files.append(text_file(RECORD, dump_json(record), seals=True))
    summary = {
        "kind": "hf",
        "architecture": architecture.name,
        **({} if form is None else {"format": form.name}),
        "layout": layout,
        "dtype": config.dtype,
        "vocab_rows": rows,
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
    }
    card, remarks = model_card(checkpoint, summary, [*checkpoint.dropped, *dropped], form)
    files.append(text_file(CARD, card_text(card)))
    findings += remarks
    notes = () if tokenizer.files else ("no tokenizer is written; `tokenizer=PATH` adds one",)
    return Plan({}, summary, tuple(files), tuple(dropped), tuple(findings), (), notes, card=card)


def hf_model(
    checkpoint: Checkpoint,
) -> tuple[dict[str, Whole], ModelConfig, list[Dropped], list[Finding]]:
    """The tensors and the config as transformers expects them for this model."""
    wholes, config = dict(checkpoint.tensors), checkpoint.config
    dropped: list[Dropped] = []
    findings: list[Finding] = []
    if config.tied_norms:
        for row in checkpoint.table:
            if row.weight.neox.startswith("post_attention_layernorm"):
                if row.hf in wholes:
                    dropped.append(Dropped(row.hf, "unused with gpt_j_tied: true"))
                wholes[row.hf] = wholes[row.hf.replace("post_attention", "input")]
        config = replace(config, tied_norms=False)
    tp = checkpoint.neox.tp if checkpoint.neox is not None else 1
    # in files from neox-bridge rank 0 has the whole bias
    if tp > 1 and config.parallel_residual and not checkpoint.record:
        spread = {
            f"how {row.weight.neox} was spread over {tp} ranks"
            for row in checkpoint.rows
            if row.weight.split == "row_bias"
        }
        dropped += [
            Dropped(name, "merged: every rank held a part, and their sum is written", "merged")
            for name in sorted(spread)
        ]
    lacking = {flag: True for flag in checkpoint.architecture.always if not getattr(config, flag)}
    if checkpoint.kind == "neox" and lacking:
        config = replace(config, **lacking)  # type: ignore[arg-type]
        added = _add_biases(checkpoint.architecture, config, wholes)
        findings.append(
            Finding(
                "biases-added",
                "info",
                f"the source does not contain {plural(added, 'bias')}, written as zeros, because "
                f"{checkpoint.architecture.name} in transformers always has them",
            )
        )
    return wholes, config, dropped, findings


def _add_biases(architecture: Architecture, config: ModelConfig, wholes: dict[str, Whole]) -> int:
    added = 0
    for row in model_rows(architecture, config):
        if row.hf not in wholes:
            shape = tuple(config.dims[dim] for dim in row.weight.shape)
            wholes[row.hf] = Whole(config.dtype, shape, (constant(shape, -0.0),))
            added += 1
    return added


def _rows_to_keep(
    checkpoint: Checkpoint, options: Options, tokenizer: Tokenizer
) -> tuple[int, list[Dropped], list[Finding]]:
    """The rows of the embeddings to keep: all except padding that a conversion added."""
    have = checkpoint.config.dims["vocab"]
    if options.vocab_rows == "all":
        return have, [], []
    known = checkpoint.unpadded_rows
    rows, dropped = cut_rows(known, have, options, tokenizer)
    if rows < have and not dropped:
        why = "padding that the conversion to GPT-NeoX added"
        dropped = [Dropped(f"vocabulary rows {rows} to {have - 1}", why)]
        return rows, dropped, _trained_padding(checkpoint, rows, have)
    unknown = checkpoint.kind == "neox" and rows == have and options.vocab_rows == "keep"
    if unknown and tokenizer.size is not None and tokenizer.size < have:
        return rows, dropped, [_unknown_padding(have, tokenizer.size)]
    return rows, dropped, []


def _trained_padding(checkpoint: Checkpoint, rows: int, have: int) -> list[Finding]:
    """The finding that rows of padding, which were written as zeros, are no longer zero."""
    trained = [
        row.hf
        for row in checkpoint.rows
        if row.weight.split == "vocab" and not _zero_from(checkpoint.tensors[row.hf], rows)
    ]
    if not trained:
        return []
    return [
        Finding(
            "padding-trained",
            "warning",
            f"the model had {rows} vocabulary rows when it was converted to GPT-NeoX (recorded "
            f"in config_files of the yml), and rows {rows} to {have - 1} were zero padding. The "
            f"run has trained them since ({', '.join(trained)}). They are left out",
            "to keep them, use `vocab_rows=all`",
        )
    ]


def _zero_from(whole: Whole, rows: int) -> bool:
    """Whether all elements from this row on are zero."""
    shape = (whole.shape[0] - rows, *whole.shape[1:])
    start = (rows, *(0 for _ in shape[1:]))
    tail = Whole(whole.dtype, shape, cut(whole, start, shape, (0,) * len(shape)))
    return relation(tail, Whole(whole.dtype, shape, (constant(shape, 0.0),))) == "equal"


def _unknown_padding(have: int, entries: int) -> Finding:
    return Finding(
        "padding-unknown",
        "info",
        f"the embeddings have {have} rows and the tokenizer {entries} entries. The number of "
        "rows before GPT-NeoX padded the vocabulary is not recorded, so all rows are kept",
        f"to cut the padding, use `vocab_rows=N`, or `vocab_rows=tokenizer` for {entries} rows",
    )


def _output(name: str, whole: Whole) -> OutputTensor:
    return OutputTensor(
        name, whole.dtype, whole.shape, whole.pieces, whole.reduce, random=whole.random
    )


def _safetensors(tensors: Sequence[OutputTensor], options: Options) -> tuple[list[OutputFile], str]:
    """The shards, with an index if there are several, and a description of them."""
    shards = _shards(tensors, options)
    files = []
    for name, group in shards.items():
        first, order = arranged(group)
        files.append(cut_reductions(layout_safetensors(name, order, first)))
    if len(shards) == 1:
        return files, "1 safetensors file"
    return [*files, _index(shards)], f"{len(shards)} safetensors files"


def _shards(tensors: Sequence[OutputTensor], options: Options) -> dict[str, list[OutputTensor]]:
    """The tensors of each file, by file name.

    With ``--shards clone``, a file has tensors that can share blocks together. Tensors in a file
    follow each other without gaps, so they keep their offsets within a block only if those offsets
    fit together in the source.
    """
    together = shared_together(tensors) if options.shards == "clone" else [tensors]
    groups: list[list[OutputTensor]] = []
    for part in together:
        size = options.shard_size + 1
        for tensor in part:
            if size + tensor.nbytes > options.shard_size:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups)}


def _index(shards: Mapping[str, Sequence[OutputTensor]]) -> OutputFile:
    tensors: Iterable[OutputTensor] = [t for group in shards.values() for t in group]
    metadata = {
        "total_parameters": sum(prod(t.shape) for t in tensors),
        "total_size": sum(t.nbytes for t in tensors),
    }
    weight_map = {t.name: file for file, group in shards.items() for t in group}
    body = dump_json({"metadata": metadata, "weight_map": weight_map})
    return text_file("model.safetensors.index.json", body)


def _config_json(
    architecture: Architecture, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json in both spellings, with the original values if the model is the same.

    Also returns the original configs of other libraries, by the names of forms.
    """
    written = architecture.write_hf(config)
    original = checkpoint.raw if checkpoint.kind == "hf" else checkpoint.record.get("config")
    if not isinstance(original, Mapping) or original.get("model_type") != architecture.name:
        return written, {}
    names = frozenset(row.hf for row in model_rows(architecture, config))
    presence = Presence(names, config.dtype, config.layers)
    then = architecture.read_hf(original, config.dims, presence)
    same = replace(
        then, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    ) == replace(config, initializer_range=then.initializer_range)
    if not same:
        return written, {}
    forms = {form.name for form in architecture.forms}
    originals = {key: original[key] for key in forms & set(original)}
    original = {key: value for key, value in original.items() if key not in forms}
    # keys that depend on this output and not on the model
    again = ["dtype", "torch_dtype"]
    # a size that the original states as it is keeps its spelling
    sizes = hf_sizes(architecture, config).items()
    again += [key for key, (_, size) in sizes if original.get(key) != size]
    rope = ("rotary_pct", "rotary_emb_base", "rope_theta", "rope_parameters")
    # the tensors decide about the head, even if the record describes the model before training
    head = (
        ("architectures", "id2label", "label2id") if config.reward and not _scored(original) else ()
    )
    fresh = {key: written[key] for key in (*again, *rope, *head) if key in written}
    return {**written, **original, **fresh}, originals


def _scored(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model with a head for scores."""
    return any("SequenceClassification" in str(name) for name in raw.get("architectures") or ())


def _padding(raw: Mapping[str, Any]) -> list[Finding]:
    """The finding about padding: transformers scores at the last token that is not padding.

    GPT-NeoX has no setting for it.
    """
    if raw.get("pad_token_id") is not None:
        return []
    return [
        Finding(
            "pad-token-unknown",
            "warning",
            "pad_token_id is missing from the source. transformers needs it to score more than "
            "one text at a time with a reward model",
            "set pad_token_id in config.json to the padding token",
        )
    ]


def _generation(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> dict[str, Any]:
    if checkpoint.generation:
        return dict(checkpoint.generation)
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id")}
    return {"_from_model_config": True, **ids}
