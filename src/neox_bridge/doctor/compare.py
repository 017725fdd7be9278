"""Shows each feature of a model side by side in both frameworks.

What "cannot be" is what ``convert`` refuses: both use the refusals of the opened checkpoint.
Formulas: GPT-NeoX's megatron/model/{transformer,norms,activations,
positional_embeddings}.py of 2026-05, transformers' models/gpt_neox/modeling_gpt_neox.py at 5.24.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from neox_bridge.frameworks.changes import since
from neox_bridge.layouts.checkpoint import Checkpoint, new_folder, refuse_all
from neox_bridge.planning.make import relayout_command
from neox_bridge.planning.options import Options
from neox_bridge.planning.vocabulary import fit
from neox_bridge.wording import plural

Answer = Literal["same", "translated", "cannot be"]


@dataclass(frozen=True, slots=True)
class Row:
    """A feature in each framework. note: how it is translated, or why it cannot be."""

    feature: str
    neox: str
    transformers: str
    answer: Answer
    note: str = ""


# The feature that a refusal concerns, by the key of the refusal.
_FEATURES = {
    "rope_scaling": "RoPE scaling",
    "rotary_emb_base": "RoPE base",
    "pos_emb": "RoPE fraction",
    "norm": "norm",
    "hidden_act": "activation",
    "activation": "activation",
    "use_bias_in_mlp": "residual",
    "attention_config": "attention mask",
    "sliding_window_width": "attention mask",
    "quantization_config": "dtype",
}


def compare(checkpoint: Checkpoint) -> list[Row]:
    """Every feature of the model in both frameworks; "cannot be" is what convert refuses.

    Raises Refused for a model that has no class in transformers.
    """
    if checkpoint.architecture.neox_only:
        target = new_folder(checkpoint.path, "neox")
        refuse_all(checkpoint.refusals, checkpoint.path, relayout_command(checkpoint, target))
    refused: dict[str, Row] = {}
    for refusal in checkpoint.refusals:
        feature = _FEATURES.get(refusal.key, refusal.key)
        value = f"{refusal.key}: {checkpoint.raw.get(refusal.key)}"
        if feature in refused:  # the first key, with the last reason
            refused[feature] = replace(refused[feature], note=refusal.reason)
            continue
        sides = (value, "none") if checkpoint.kind == "neox" else ("none", value)
        refused[feature] = Row(feature, *sides, "cannot be", refusal.reason)
    rows = [refused.pop(row.feature, row) for row in _rows(checkpoint)]
    return [*rows, *refused.values()]


def _rows(checkpoint: Checkpoint) -> Iterator[Row]:
    config = checkpoint.config
    attends = "heads" not in config.idle
    if attends and not checkpoint.architecture.has_rotary_buffer:
        yield _equal("positions", f"{config.max_positions} learned (pos_emb: learned)")
    elif attends:
        yield _equal("RoPE base", f"{config.rotary_base:g}")
        yield _equal("RoPE fraction", f"{config.rotary_pct:g} ({config.rotary_dim} dimensions)")
        note = "trees before 2023-09 rounded before"
        yield _equal("RoPE tables", "fp32, rounded to the dtype", note)
        yield _inv_freq(checkpoint)
    rms = checkpoint.architecture.norm == "rmsnorm"
    norm = f"{checkpoint.architecture.norm}: (x - mean) / sqrt(var + eps)"
    older = f"until {since('neox-rms-epsilon')} GPT-NeoX had x / (rms + eps)"
    yield _equal("norm", "rmsnorm: x / sqrt(var + eps)", older) if rms else _equal("norm", norm)
    yield _equal("norm epsilon", f"{config.norm_eps:g}")
    if attends:
        yield _activation(checkpoint)
        yield _residual(checkpoint)
    if config.tied_norms:
        note = "transformers gets the same norm twice"
        yield Row("norms of a block", "one (gpt_j_tied)", "two", "translated", note)
    if attends:
        yield from _biases(checkpoint)
        yield _equal("attention mask", "causal, computed")
        yield _qkv(checkpoint)
    else:
        yield _equal("bias of the convolution", "yes" if config.conv_bias else "no")
    yield _vocabulary(checkpoint)
    tied = "tied" if config.tied_embeddings else "untied"
    word = f"no_weight_tying: {str(not config.tied_embeddings).lower()}"
    yield Row("embeddings", f"{tied} ({word})", tied, "same")
    yield _equal("dtype", config.dtype)


def _equal(feature: str, value: str, note: str = "") -> Row:
    return Row(feature, value, value, "same", note)


def _qkv(checkpoint: Checkpoint) -> Row:
    config, feature = checkpoint.config, "query, key, value"
    note = "the rows are head by head, [q k v] each"
    if all(weight.split != "fused" for weight in checkpoint.architecture.weights):
        return _equal(feature, f"{plural(config.heads, 'head')} in one matrix", note)
    if config.grouped_query:
        note = "all q, all k, all v on each rank since 2024-11, by query head before"
    heads = f"{plural(config.heads, 'head')}, {config.key_value_heads} of k and v"
    joined = any("attn" in name for name in checkpoint.architecture.joined)
    hf = "one matrix, all q, all k, all v" if joined else "three matrices"
    return Row(feature, f"{heads}, in one matrix", f"{heads}, {hf}", "translated", note)


def _inv_freq(checkpoint: Checkpoint) -> Row:
    state = checkpoint.neox
    neox = "stored, or not, by the tree"
    if state is not None:
        neox = "stored" if state.inv_freq == "store" else "not stored"
    note = "computed again; GPT-NeoX never computes with the stored one"
    return Row("inv_freq", neox, "not stored since 4.35", "translated", note)


def _activation(checkpoint: Checkpoint) -> Row:
    config, architecture = checkpoint.config, checkpoint.architecture
    if any(refusal.key in ("hidden_act", "activation") for refusal in checkpoint.refusals):
        return _equal("activation", config.activation)
    hf = architecture.write_hf(config)[architecture.hf_keys.get("hidden_act", "hidden_act")]
    written = architecture.write_neox(config, False)
    if architecture.gated:
        note = "one matrix [up | gate] on each rank in GPT-NeoX, two matrices in transformers"
        return Row("activation", str(written["activation"]), f"gated {hf}", "translated", note)
    fused = written.get("bias_gelu_fusion")
    neox = f"{written['activation']}{' with bias_gelu_fusion' if fused else ''}"
    if config.activation == "gelu_tanh":
        note = "the tanh form, with constants rounded as in GPT-NeoX's fused kernel"
        return Row("activation", neox, hf, "translated", note)
    exact = "exact (erf)" if config.activation == "gelu" else ""
    return Row("activation", neox, hf, "same", exact)


def _residual(checkpoint: Checkpoint) -> Row:
    config, architecture = checkpoint.config, checkpoint.architecture
    parallel = config.parallel_residual
    if architecture.gated or "use_parallel_residual" not in architecture.write_hf(config):
        return _equal("residual", "attention, then MLP")
    form = "x + attention(norm1 x) + mlp(norm2 x)" if parallel else "attention, then MLP"
    return Row(
        "residual",
        f"{form} (gpt_j_residual: {str(parallel).lower()})",
        f"{form} (use_parallel_residual: {str(parallel).lower()})",
        "same",
    )


def _biases(checkpoint: Checkpoint) -> Iterator[Row]:
    config = checkpoint.config
    for name, flag in (
        ("attention", "attention_bias"),
        ("MLP", "mlp_bias"),
        ("norms", "norm_bias"),
    ):
        present = getattr(config, flag)
        if present or flag not in (*checkpoint.architecture.always, "attention_bias"):
            yield _equal(f"biases of {name}", "yes" if present else "no")
        elif name == "attention":
            since = "" if checkpoint.architecture.gated else "since 4.37"
            yield Row("biases of attention", "no", "attention_bias: false", "same", since)
        else:
            note = "written as zeros"
            yield Row(f"biases of {name}", "no", "always", "translated", note)
    if any(row.weight.split == "row_bias" for row in checkpoint.rows):
        note = "GPT-NeoX sums those of the TP ranks" if config.parallel_residual else ""
        held = "sum over TP ranks" if config.parallel_residual else "whole on every TP rank"
        yield Row("row-parallel biases", held, "one", "translated", note)


def _vocabulary(checkpoint: Checkpoint) -> Row:
    rows, size = checkpoint.config.dims["vocab"], checkpoint.tokenizer_size
    if checkpoint.kind == "neox":
        kept = min(rows, int(checkpoint.record.get("vocab_size") or rows))
        note = "padding rows are kept" if kept == rows else "padding of neox-bridge is removed"
        answer: Answer = "same" if kept == rows else "translated"
        return Row("vocabulary", f"{rows} rows", f"vocab_size: {kept}", answer, note)
    tp = Options().tp or 1
    padded = fit(rows, size or rows, tp, None, known=size is not None).padded
    note = f"padded to a multiple of make_vocab_size_divisible_by * TP (here TP {tp})"
    answer = "same" if padded == rows else "translated"
    return Row("vocabulary", f"{padded} rows", f"vocab_size: {rows}", answer, note)
