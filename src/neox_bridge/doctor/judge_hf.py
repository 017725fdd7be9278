"""Decides whether a version of transformers loads a Hugging Face folder, and as which model.

Rules from {configuration,modeling}_gpt_neox.py and modeling_utils.py of transformers 4.30 to 5.24.
Most failures are silent there: a version skips config keys that it does not know, and initializes
missing weights at random with a warning. A model that would compute something else counts as one
that fails.
"""

import re
from collections.abc import Iterator
from typing import Any

from neox_bridge.architectures.gpt_neox import ARCHITECTURE as GPT_NEOX
from neox_bridge.architectures.gpt_neox import rope_of
from neox_bridge.architectures.hf_config import hf_sizes
from neox_bridge.architectures.transformers_limits import llama_ignores
from neox_bridge.doctor.verdict import Case, another_model, case, convert_into, failure, fix_command
from neox_bridge.findings import Details, Severity
from neox_bridge.formats.safetensors import read_safetensors
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.changes import change_named, since
from neox_bridge.frameworks.changes_transformers import CLASS_SINCE
from neox_bridge.frameworks.facts import TransformersFacts
from neox_bridge.frameworks.targets import has_class, knows
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.head import head_relation
from neox_bridge.layouts.tensor_names import state_dict_of, tensors_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural, some

_MASKS = re.compile(r"attention\.(bias|masked_bias)$")
_OLD, _NEW = ("rotary_pct", "rotary_emb_base"), ("partial_rotary_factor", "rope_theta")
_DEFAULTS = (0.25, 10000.0)  # defaults of GPTNeoXConfig


def judge_hf(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    """The cases of loading a folder with a version of transformers."""
    if (form := checkpoint.form) is not None:
        yield failure(
            "other-form",
            f"config.json and the tensor names are {form.name}'s, which transformers does not read",
            convert_into(checkpoint, "transformers", "--format", "transformers"),
        )
        return
    yield from _names(checkpoint, facts)
    yield from _sizes(checkpoint, facts)
    yield from _two_heads(checkpoint, facts)
    is_gpt_neox = checkpoint.architecture is GPT_NEOX  # only this family has further checks
    if is_gpt_neox:
        yield from _rope(checkpoint, facts)
        yield from _made_up(checkpoint, facts)
    else:
        yield from _relatives_of_llama(checkpoint, facts)
    yield from _buffers(checkpoint, facts)
    yield from _dtype(checkpoint, facts)
    if is_gpt_neox and facts.loses_rotary_pct and checkpoint.config.rotary_pct != _DEFAULTS[0]:
        yield case(
            "rotary-pct-lost",
            "warning",
            f"transformers {facts.version} writes rotary_pct 0.25 when it saves this model, whose "
            f"fraction is {checkpoint.config.rotary_pct:g} (as 5.0 to 5.4 do)",
            "save with 5.5 or newer, or correct config.json after saving",
            details=Details(more=(change_named("hf-rotary-pct-kept").link,)),
        )


def _two_heads(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    """A tied config with a different stored head: each version computes one of two models."""
    if head_relation(checkpoint) != "differs":
        return
    head, embeddings = checkpoint.architecture.head, checkpoint.architecture.embeddings
    keeps = knows(facts, "hf-stored-head-kept")
    computes = "both, as an untied model" if keeps else f"{embeddings} alone, and ignores {head}"
    yield case(
        "head-differs",
        "warning",
        f"config.json ties the embeddings, and the files contain {head} with other values than "
        f"{embeddings}: these are two models. transformers {facts.version} computes with "
        f"{computes}. 5.0 and newer keep both, and 4.x ties them. `head=keep` writes the untied "
        "model, and `head=tie` the tied one",
        convert_into(checkpoint, "one-head", "--to", "hf", "--head", "keep"),
        subject="stored head",
        details=Details(wrong=(head,)),
    )


def _names(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    """Names and files that transformers does not find."""
    if checkpoint.wrappers:
        wrappers = ", ".join(f"`{wrapper}`" for wrapper in checkpoint.wrappers)
        yield failure(
            "wrapped-names",
            f"the tensor names contain {wrappers}, which is not part of the model: transformers "
            "does not find the weights and initializes them at random",
            fix_command(checkpoint, facts),
            subject="wrapped names",
        )
    if checkpoint.unindexed:
        yield failure(
            "no-index",
            f"the folder has {plural(len(checkpoint.files), 'shard')} and no index file",
            fix_command(checkpoint, facts),
            f"OSError: Error no file named model.safetensors, or pytorch_model.bin, found in "
            f"directory {checkpoint.path}.",
            subject="missing index",
        )


def stored_names(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """Every tensor of the files, by its stored name."""
    stored: dict[str, TensorRef] = {}
    for path in checkpoint.files:
        if path.endswith(".safetensors"):
            stored |= read_safetensors(path)
        else:
            stored |= tensors_of(state_dict_of(read_torch(path), path), path)
    return stored


def rope_as_read(raw: dict[str, Any], rope_parameters: bool) -> tuple[float, float]:
    """(fraction, base) as a version reads them: 4.x knows the old keys only, 5.x both."""
    if rope_parameters:
        return rope_of(raw)
    return rope_of({key: raw[key] for key in _OLD if key in raw})


def _rope(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    raw, config = dict(checkpoint.raw), checkpoint.config
    read = rope_as_read(raw, facts.rope_parameters)
    meant = (config.rotary_pct, config.rotary_base)
    both = any(key in raw for key in _OLD) and bool(raw.get("rope_parameters"))
    for old, new, got, want in zip(_OLD, _NEW, read, meant, strict=True):
        if got == want:
            continue
        why = f"config.json has no {old}, and rope_parameters.{new} is not read before 5.0"
        if old in raw:
            why = (
                f"{old} in config.json contradicts rope_parameters.{new}, which is not read before "
                "5.0"
            )
        yield _other_rope(checkpoint, facts, old, got, want, why)
    only = "new" if not any(key in raw for key in _OLD) else "old"
    if not both and read == meant and meant != _DEFAULTS:
        yield case(
            "rope-one-spelling",
            "info",
            f"config.json has only the {only} spelling of the rotary settings",
            fix_command(checkpoint, facts),
        )


def _other_rope(
    checkpoint: Checkpoint,
    facts: TransformersFacts,
    key: str,
    got: float,
    want: float,
    why: str,
) -> Case:
    """A version that takes another value for a rotary setting than the model has."""
    return another_model(
        "rope-spelling",
        f"transformers {facts.version} computes with {key} {got:g}, and the model has {want:g}: "
        f"{why}. It prints nothing",
        fix_command(checkpoint, facts),
        subject="rotary settings",
        details=Details(
            wrong=(f"{key}: {got:g}, {want:g} expected",),
            more=(change_named("hf-rope-parameters").link,),
        ),
    )


def _relatives_of_llama(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    """Whether the version has the class, and RoPE: 4.x does not read rope_parameters."""
    config, name = checkpoint.config, checkpoint.architecture.name
    grouped = name == "llama" and config.grouped_query
    if not has_class(facts, name) or (grouped and not knows(facts, "hf-llama-grouped")):
        first = since("hf-llama-grouped") if grouped else f"transformers {CLASS_SINCE[name]}"
        yield failure(
            "class-unknown",
            f"{checkpoint.architecture.hf_class} needs {first} or newer for this model",
            f"use {first} or newer",
        )
    ignored = llama_ignores(name, config, facts)
    for what in ignored:
        yield another_model(
            "llama-ignored",
            f"transformers {facts.version} ignores {what}. It prints nothing",
            "use a newer transformers",
        )
    if ignored or facts.rope_parameters or not checkpoint.architecture.has_rotary_buffer:
        return
    share = {"stablelm": 0.25, "glm": 0.5}.get(name, 1.0)
    defaults = {"rope_theta": 10000.0, "partial_rotary_factor": share}
    meant = (config.rotary_base, config.rotary_pct)
    for (key, default), want in zip(defaults.items(), meant, strict=True):
        got = float(checkpoint.raw.get(key) or default)
        if got == want:
            continue
        why = "it does not read rope_parameters"
        yield _other_rope(checkpoint, facts, key, got, want, why)


def _sizes(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    """A size in config.json that the tensors contradict makes load_state_dict fail."""
    dims, raw = checkpoint.config.dims, checkpoint.raw
    for key, (dim, size) in hf_sizes(checkpoint.architecture, checkpoint.config).items():
        setting = raw.get(key)
        if setting is None or setting == size:
            continue
        joined = checkpoint.architecture.joined_name
        row = next(
            row
            for row in checkpoint.table
            if dim in row.weight.shape and joined(row.weight.hf) == row.weight.hf
        )
        have = [dims[d] for d in row.weight.shape]
        wanted = setting + dims[dim] - size
        want = [wanted if d == dim else dims[d] for d in row.weight.shape]
        if row.weight.transposed:
            have, want = have[::-1], want[::-1]
        yield failure(
            "config-size",
            f"config.json says {key}: {setting}, and the tensors have {size}",
            fix_command(checkpoint, facts),
            f"RuntimeError: Error(s) in loading state_dict for {checkpoint.architecture.hf_class}:"
            f"\n\tsize mismatch for {row.hf}: copying a param with shape torch.Size({have}) from "
            f"checkpoint, the shape in current model is torch.Size({want}).",
            subject="config sizes",
            details=Details(wrong=(f"{key}: {setting} in config.json, {size} expected",)),
        )


def _made_up(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    """Weights that transformers does not find and initializes at random, with a warning."""
    config, stored = checkpoint.config, stored_names(checkpoint)
    renamed = "lm_head.weight" in stored and "embed_out.weight" not in stored
    if renamed and not config.tied_embeddings and not knows(facts, "hf-lm-head"):
        why = f"only {since('hf-lm-head')} and newer read lm_head.weight"
        yield _newly(checkpoint, facts, ["embed_out.weight"], why, "head-name")
    has_biases = checkpoint.raw.get("attention_bias", True) is not False
    if not config.attention_bias and not knows(facts, "hf-attention-bias"):
        why = f"attention_bias: false needs {since('hf-attention-bias')} or newer"
        newer = f"use {since('hf-attention-bias')} or newer"
        yield _newly(checkpoint, facts, _biases(checkpoint, "attention_bias"), why, "biases", newer)
    elif has_biases and not config.attention_bias:
        why = "config.json does not say attention_bias: false"
        yield _newly(checkpoint, facts, _biases(checkpoint, "attention_bias"), why, "biases")
    for flag, there in (("mlp_bias", config.mlp_bias), ("norm_bias", config.norm_bias)):
        if not there:
            why, names = "gpt_neox always has them", _biases(checkpoint, flag)
            yield _newly(checkpoint, facts, names, why, "biases", "add them as zeros")


def _biases(checkpoint: Checkpoint, flag: str) -> list[str]:
    return sorted(row.hf for row in checkpoint.table if row.weight.flag == flag)


def _newly(
    checkpoint: Checkpoint,
    facts: TransformersFacts,
    names: list[str],
    why: str,
    code: str,
    remedy: str = "",
) -> Case:
    return failure(
        code,
        f"transformers {facts.version} does not find {some(names, 2)} and initializes them at "
        f"random: {why}",
        remedy or fix_command(checkpoint, facts),
        f"Some weights of {checkpoint.architecture.hf_class} were not initialized from the model "
        f"checkpoint at {checkpoint.path} and are newly initialized: {names}",
        details=Details(missing=tuple(names)),
    )


def _buffers(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    stored = stored_names(checkpoint)
    masks = [name for name in stored if _MASKS.search(name)]
    if masks:
        size = sum(stored[name].nbytes for name in masks)
        yield case(
            "mask-buffers",
            "info",
            f"the files contain {plural(len(masks), 'causal mask')} ({size:,} bytes), which "
            "transformers stored until 4.30 and computes since",
            fix_command(checkpoint, facts),
        )
    if any(name.endswith("inv_freq") for name in stored):
        uses = facts.persistent_inv_freq
        deviates = checkpoint.inv_freq_mismatch is not None
        how, version = "reads it" if uses else "computes it", facts.version
        text = f"the files contain inv_freq, which transformers stored until 4.34; {version} {how}"
        if deviates:
            text += (
                ". It does not follow from config.json, so versions before and since 4.35 compute "
                "different models"
            )
        severity: Severity = "warning" if uses and deviates else "info"
        fix = fix_command(checkpoint, facts, *["--recompute"] * deviates)
        yield case("inv-freq-stored", severity, text, fix)


def _dtype(checkpoint: Checkpoint, facts: TransformersFacts) -> Iterator[Case]:
    raw, dtype = checkpoint.raw, checkpoint.config.dtype
    setting = raw.get("dtype") or raw.get("torch_dtype")
    if setting is None:
        return
    if setting != dtype:
        yield case(
            "config-dtype",
            "warning",
            f"config.json says dtype {setting}, and the tensors are {dtype}: transformers casts "
            'them with dtype="auto"',
            fix_command(checkpoint, facts),
        )
    elif "torch_dtype" not in raw and not knows(facts, "hf-dtype-key"):
        yield case(
            "dtype-one-spelling",
            "info",
            f"config.json says dtype, which transformers {facts.version} does not read: it takes "
            "the dtype of the tensors",
            fix_command(checkpoint, facts),
        )
