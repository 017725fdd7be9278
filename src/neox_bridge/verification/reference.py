"""A small implementation of GPT-NeoX's forward pass in torch, as a reference.

Each tensor-parallel rank computes with its own shards. The results are reduced and gathered where
GPT-NeoX does that, so shards that are split, ordered or biased wrongly change the logits.

File names in docstrings are those of GPT-NeoX below ``megatron/``. Shapes: b is the batch, s the
sequence, h the hidden size, n the attention heads of one rank, d the head dimension.
"""

import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rank = Mapping[str, Tensor]
Config = Mapping[str, Any]

# model/activations.py; "gelu" also depends on bias_gelu_fusion
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "softsign": F.softsign,
    "swish": lambda x: x * torch.sigmoid(x),  # F.silu has one rounding less
    "silu": F.silu,
    "mish": F.mish,
    "geglu": F.gelu,
    "reglu": F.relu,
    "bilinear": lambda x: x,
    "swiglu": lambda x: x * torch.sigmoid(x),
    "glu": torch.sigmoid,
}
_GATED = ("geglu", "reglu", "bilinear", "swiglu", "glu")
# settings that change the forward pass: the default of GPT-NeoX (neox_arguments/), and the values
# that are supported here
_COVERED: dict[str, tuple[object, tuple[object, ...]]] = {
    "pos_emb": ("learned", ("rotary", "learned", "none")),
    "norm": ("layernorm", ("layernorm", "rmsnorm", "non_parametric_layernorm")),
    "activation": ("gelu", tuple(_ACTIVATIONS)),
    "use_qk_layernorm": (False, (False,)),
    "use_mup": (False, (False,)),
    "moe_num_experts": (1, (1,)),
    "gqa_order": ("grouped", ("grouped", "interleaved", "te")),
    "rms_eps": ("inside", ("inside", "outside")),
    # variants of other tools or of an old GPT-NeoX, to find the cause of a difference
    "row_biases": ("told", ("told", "first", "sum", "mean", "twice", "half")),
    "gate": ("second", ("second", "first")),
    "rope_tables": ("float32", ("float32", "float16", "bfloat16")),
}


@dataclass(frozen=True)
class Stage:
    """The result of one stage of a model, to compare two implementations.

    Attributes:
        name: "embeddings", "layer N" from 0, "final norm" or "logits".
        output: [b, s, h], or the logits [b, s, vocabulary].
        parts: What the "attention" and the "mlp" of a layer add, [b, s, h], summed over the ranks
            and with their biases.
    """

    name: str
    output: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Spec:
    """The facts that the layers need.

    Attributes:
        config: See ``stages``.
        heads: The query heads of one rank.
        kv_heads: The key-value heads of one rank.
        head_dim: The dimension of a head.
        rope: The cosines and sines of ``_rope_tables``.
    """

    config: Config
    heads: int
    kv_heads: int
    head_dim: int
    rope: tuple[Tensor, Tensor]


@torch.no_grad()  # type: ignore[untyped-decorator]
def stages(
    ranks: Sequence[Rank], config: Config, tokens: Tensor
) -> Generator[Stage, Tensor | None, None]:
    """Compute what GPT-NeoX computes in evaluation mode from these shards, in their dtype.

    A tensor that is sent into the generator replaces the output for the next stage.

    Args:
        ranks: The tensors of each tensor-parallel rank, named "<layer index>.<name>". The layers
            have GPT-NeoX's sequential numbers (model/gpt2_model.py): 0 the embeddings, 2 to L+1 the
            blocks, L+3 the final norm, L+4 the output layer, which is missing if the embeddings are
            tied. The tensors are read layer by layer, so a mapping can load them on demand.
        config: The merged yml with underscores in its keys. Missing keys have the defaults of
            GPT-NeoX. More keys select a variant:

            - "gqa_order": the grouped-query rows of a rank are "grouped", [all q | all k | all v]
              (since 2024-11), "interleaved", [q | slice of k | slice of v] for each query head, or
              "te", in the order of Transformer Engine.
            - "rms_eps": RMSNorm adds its epsilon "inside" the root (since 2025-05) or "outside".
            - "row_biases": the added row bias is that of the "first" rank, the "sum" or the "mean"
              of the ranks, or "twice" or "half" of what GPT-NeoX adds.
            - "gate": which half of a gated MLP's projection is the gate, "first" or "second".
            - "rope_tables": positions, frequencies and angles are rounded to this dtype. Before
              neox-rope-fp32 it was that of the parameters.
        tokens: int64 [b, s], on the device of the tensors.

    Yields:
        Each stage. The last one has float32 logits [b, s, padded vocabulary]. A reward model
        (train_impl: rm, with rm_linear instead of the output layer) has [b, s, 1].

    Raises:
        ValueError: The model or its split is not supported, or a token is outside the vocabulary.
        KeyError: A tensor is missing.
    """
    if not ranks:
        raise ValueError("ranks: at least one tensor-parallel rank is needed")
    _refuse_uncovered(config)
    layers = int(config["num_layers"])
    tied = not config.get("no_weight_tying")
    head = "0.word_embeddings.weight" if tied else f"{layers + 4}.final_linear.weight"
    x = _embed(ranks, tokens)
    if (config.get("pos_emb") or "learned") == "learned":
        x = x + _positions(ranks[0]["0.position_embeddings.weight"], config, tokens.shape[1])
    spec = _read_spec(config, len(ranks), x)
    x = replaced((yield Stage("embeddings", x)), x)
    for index in range(2, layers + 2):
        x, parts = _block(ranks, index, x, spec)
        x = replaced((yield Stage(f"layer {index - 2}", x, parts)), x)
    normed = [_norm(rank, f"{layers + 3}.norm", x, config) for rank in ranks]
    given = yield Stage("final norm", normed[0])
    if given is not None:
        normed = [given] * len(ranks)
    if config.get("train_impl") == "rm":
        rewards = [rank[f"{layers + 4}.rm_linear.weight"] for rank in ranks]
        yield Stage("logits", F.linear(normed[0], torch.cat(rewards, dim=1)).float())
        return
    logits = [F.linear(x, rank[head]) for x, rank in zip(normed, ranks, strict=True)]
    yield Stage("logits", torch.cat(logits, dim=-1).float())


def replaced(given: Tensor | None, output: Tensor) -> Tensor:
    """The input of the next stage: the tensor that was sent in, or else the output."""
    return output if given is None else given


def _refuse_uncovered(config: Config) -> None:
    """Raise ValueError for settings that change the forward pass and are not supported here."""
    for key, (default, covered) in _COVERED.items():
        value = config.get(key) or default
        if value not in covered:
            raise ValueError(f"{key}: {value!r} is not supported, only {covered}")
    # a nested list of kinds and counts, such as [[["global"], 24]]
    if set(re.findall(r"[a-z_]+", str(config.get("attention_config") or ""))) - {"global", "flash"}:
        raise ValueError(f"attention_config: {config['attention_config']} is not supported")


def _read_spec(config: Config, tp: int, x: Tensor) -> _Spec:
    """Read the config for embeddings x [b, s, h]. Raises ValueError if tp does not divide it."""
    hidden_size, heads = x.shape[-1], int(config["num_attention_heads"])
    kv_heads = int(config.get("num_kv_heads") or heads)
    totals = {"hidden_size": hidden_size, "num_attention_heads": heads, "num_kv_heads": kv_heads}
    for (key, total), parts in zip(totals.items(), (heads, tp, tp), strict=True):
        if total % parts:
            raise ValueError(f"{key}: {total} is not divisible by {parts}")
    head_dim = hidden_size // heads
    rope = _rope_tables(config, head_dim, x)
    return _Spec(config, heads // tp, kv_heads // tp, head_dim, rope)


def _rope_tables(config: Config, head_dim: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [s, 1, rotated dimensions], computed in fp32 and rounded to x's dtype.

    They are computed from the base: GPT-NeoX never reads a stored inv_freq
    (model/positional_embeddings.py). Before 2023-09 it computed them in the parameters' dtype.
    """
    share = float(config.get("rotary_pct", 1.0)) if config.get("pos_emb") == "rotary" else 0.0
    dim = int(head_dim * share)
    if not 0 <= share <= 1 or dim % 2:
        raise ValueError(
            f"rotary_pct: {share} does not rotate an even number of the {head_dim} dimensions"
        )
    base = float(config.get("rotary_emb_base", 10000))
    rounded = getattr(torch, config.get("rope_tables") or "float32")
    inv_freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / max(dim, 1))
    positions = torch.arange(x.shape[1], dtype=torch.float32)
    angles = torch.outer(positions.to(rounded), inv_freq.to(rounded))
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(x), angles.sin().to(x)


def _embed(ranks: Sequence[Rank], tokens: Tensor) -> Tensor:
    """Embed tokens [b, s] as [b, s, h]. Each rank holds a range of rows (mpu/layers.py)."""
    shards = [rank["0.word_embeddings.weight"] for rank in ranks]
    rows = sum(shard.shape[0] for shard in shards)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < rows:
        raise ValueError(f"tokens: outside the {rows} rows of the vocabulary")
    parts, start = [], 0
    for shard in shards:
        local = tokens - start
        elsewhere = (local < 0) | (local >= shard.shape[0])
        part = F.embedding(local.masked_fill(elsewhere, 0), shard)
        parts.append(part.masked_fill(elsewhere[..., None], 0.0))
        start += shard.shape[0]
    return _reduce(parts)


def _positions(table: Tensor, config: Config, length: int) -> Tensor:
    """The rows of the learned positions [s, h] (model/word_embeddings.py, Embedding.forward)."""
    first = int(config.get("opt_pos_emb_offset") or 0)
    if first + length > table.shape[0]:
        raise ValueError(f"tokens: {length} are more than the {table.shape[0] - first} positions")
    return table[first : first + length]


def _reduce(parts: Sequence[Tensor], in_fp32: bool = False) -> Tensor:
    """Sum over the ranks in the parts' dtype, or in fp32 (fp32_allreduce; mpu/mappings.py)."""
    total = parts[0].float() if in_fp32 else parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def _norm(rank: Rank, name: str, x: Tensor, config: Config) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, in x's shape and dtype (model/norms.py)."""
    if config.get("norm") != "rmsnorm":
        eps = float(config.get("layernorm_epsilon", 1e-5))  # YAML reads "1e-5" as text
        if config.get("norm") == "non_parametric_layernorm":
            return F.layer_norm(x, x.shape[-1:], eps=eps)
        return F.layer_norm(x, x.shape[-1:], rank[f"{name}.weight"], rank.get(f"{name}.bias"), eps)
    eps = float(config.get("rms_norm_epsilon", 1e-8))
    # GPT-NeoX's RMSNorm calls it scale, and the fused one weight
    scale = rank[f"{name}.scale" if f"{name}.scale" in rank else f"{name}.weight"]
    if config.get("rms_eps") == "outside":  # the older form, not in fp32
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * math.pow(x.shape[-1], -0.5)
        return torch.mul(scale, x / (rms + eps))
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scale * wide).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head of x [b, s, n, d], as many as the tables have."""
    half, end = cos.shape[-1] // 2, cos.shape[-1]
    swapped = torch.cat((-x[..., half:end], x[..., :half]), dim=-1)
    return torch.cat((x[..., :end] * cos + swapped * sin, x[..., end:]), dim=-1)


def _split_qkv(mixed: Tensor, spec: _Spec) -> list[Tensor]:
    """Split one rank's projection [b, s, rows] into q, k and v [b, s, n, d], with k and v repeated.

    "interleaved": each query head has a slice of k and of v, and all slices together are all of k
    and v (ParallelSelfAttention, model/transformer.py). "te": [its query heads | k | v] for each
    key-value head, as in Transformer Engine.
    """
    shape, kv_size = mixed.shape[:2], spec.kv_heads * spec.head_dim
    if spec.kv_heads != spec.heads and spec.config.get("gqa_order") == "te":
        group = spec.heads // spec.kv_heads
        mixed = mixed.reshape(*shape, spec.kv_heads, group + 2, spec.head_dim)
        q, k, v = mixed.split([group, 1, 1], dim=3)
        return [x.reshape(*shape, spec.heads, -1) for x in (q, k.expand_as(q), v.expand_as(q))]
    sizes = [spec.heads * spec.head_dim, kv_size, kv_size]
    if spec.kv_heads == spec.heads or spec.config.get("gqa_order") == "interleaved":
        mixed = mixed.reshape(*shape, spec.heads, -1)
        sizes = [size // spec.heads for size in sizes]
    parts = [part.reshape(*shape, -1, spec.head_dim) for part in torch.split(mixed, sizes, dim=-1)]
    return [part.repeat_interleave(spec.heads // part.shape[2], dim=2) for part in parts]


def _attend(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
    """The causal attention of q, k and v [b, s, n, d], as [b, s, n * d].

    This is the unfused path (model/fused_softmax.py). The softmax has q's dtype, or fp32 if the
    config says so.
    """
    batch, length, heads, head_dim = q.shape
    q, k, v = (x.transpose(1, 2).reshape(-1, length, head_dim) for x in (q, k, v))
    # one call scales half-precision scores before they are rounded
    scale = 1.0 / math.sqrt(head_dim)
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    if any(map(config.get, ("attention_softmax_in_fp32", "apply_query_key_layer_scaling"))):
        scores = scores.float()
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if (width := config.get("sliding_window_width")) is not None:
        # a query sees itself and `width` tokens before it (megatron/utils.py, get_attn_mask)
        hidden |= torch.ones_like(hidden).tril(-int(width) - 1)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    context = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
    return context.view(batch, heads, length, head_dim).transpose(1, 2).flatten(2)


def _attention(rank: Rank, index: int, x: Tensor, spec: _Spec) -> tuple[Tensor, Tensor | None]:
    """One rank's norm and attention of x [b, s, h]: the unreduced output and the bias to add."""
    name = f"{index}.attention"
    x = _norm(rank, f"{index}.input_layernorm", x, spec.config)
    bias = rank.get(f"{name}.query_key_value.bias")
    q, k, v = _split_qkv(F.linear(x, rank[f"{name}.query_key_value.weight"], bias), spec)
    context = _attend(_rotate(q, *spec.rope), _rotate(k, *spec.rope), v, spec.config)
    return F.linear(context, rank[f"{name}.dense.weight"]), rank.get(f"{name}.dense.bias")


def _mlp(rank: Rank, index: int, x: Tensor, spec: _Spec) -> tuple[Tensor, Tensor | None]:
    """One rank's norm and MLP of x [b, s, h]: the unreduced output and the bias to add."""
    tied = spec.config.get("gpt_j_residual") and spec.config.get("gpt_j_tied")
    norm = "input_layernorm" if tied else "post_attention_layernorm"
    x, name = _norm(rank, f"{index}.{norm}", x, spec.config), f"{index}.mlp"
    kind = spec.config.get("activation") or "gelu"
    activation = _ACTIVATIONS[kind]
    if kind == "gelu" and spec.config.get("bias_gelu_fusion"):
        activation = partial(F.gelu, approximate="tanh")
    if f"{name}.w1.weight" in rank:  # the MLP of Llama: always gated, never with biases
        names = ("w3", "w1") if spec.config.get("gate") == "first" else ("w1", "w3")
        gate, up = (F.linear(x, rank[f"{name}.{w}.weight"]) for w in names)
        return F.linear(activation(gate) * up, rank[f"{name}.w2.weight"]), None
    # GPT-NeoX changed the names in 2024-09
    old = f"{name}.dense_h_to_4h.weight" in rank
    first, last = ("dense_h_to_4h", "dense_4h_to_h") if old else ("linear1", "linear2")
    # unlike that of the projection, this bias is added separately, which rounds once more
    inner = _add(F.linear(x, rank[f"{name}.{first}.weight"]), rank.get(f"{name}.{first}.bias"))
    if kind in _GATED:
        up, gate = inner.chunk(2, dim=-1)
        if spec.config.get("gate") == "first":
            up, gate = gate, up
        inner = activation(gate) * up
    else:
        inner = activation(inner)
    return F.linear(inner, rank[f"{name}.{last}.weight"]), rank.get(f"{name}.{last}.bias")


def _block(
    ranks: Sequence[Rank], index: int, x: Tensor, spec: _Spec
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of one transformer layer for x [b, s, h], and its parts for ``Stage``.

    Source: ParallelTransformerLayer, model/transformer.py.
    """
    in_fp32 = bool(spec.config.get("fp32_allreduce"))
    parts: dict[str, Tensor] = {}
    if not spec.config.get("gpt_j_residual"):
        for name, sublayer in (("attention", _attention), ("mlp", _mlp)):
            outputs, bias = _on_ranks(sublayer, ranks, index, x, spec)
            parts[name] = _add_row_biases(_reduce(outputs, in_fp32), bias, spec)
            x = x + parts[name]
        return x, parts
    attention, mlp = (
        [_add(output, bias) for output, bias in zip(*results, strict=True)]
        for results in (
            _on_ranks(sublayer, ranks, index, x, spec) for sublayer in (_attention, _mlp)
        )
    )
    parts = {"attention": _reduce(attention, in_fp32), "mlp": _reduce(mlp, in_fp32)}
    if not any(f"{index}.mlp.{name}.bias" in ranks[0] for name in ("dense_4h_to_h", "linear2")):
        # GPT-NeoX adds the attention together with the bias of the MLP, and loses it without one
        return x + parts["mlp"], {**parts, "attention": torch.zeros_like(x)}
    both = [a + b for a, b in zip(attention, mlp, strict=True)]
    return x + _reduce(both, in_fp32), parts


def _add_row_biases(x: Tensor, biases: Sequence[Tensor | None], spec: _Spec) -> Tensor:
    """Add the bias to x [b, s, h], which is summed over the ranks.

    With sequence_parallel each rank adds its bias to its part of the sequence (mpu/layers.py,
    RowParallelLinear.forward, which scatters s over the ranks).
    """
    there = [bias for bias in biases if bias is not None]
    if len(there) < 2 or not spec.config.get("sequence_parallel"):
        return _add(x, biases[0])
    if spec.config.get("row_biases") not in (None, "told"):
        return _add(x, biases[0])
    length = -(-x.shape[1] // len(there))
    parts = x.split(length, dim=1)
    return torch.cat([part + bias for part, bias in zip(parts, there, strict=False)], dim=1)


def _on_ranks(
    sublayer: Callable[[Rank, int, Tensor, _Spec], tuple[Tensor, Tensor | None]],
    ranks: Sequence[Rank],
    index: int,
    x: Tensor,
    spec: _Spec,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The unreduced output of each rank for x, and the bias that it adds."""
    results = [sublayer(rank, index, x, spec) for rank in ranks]
    outputs, biases = [output for output, _ in results], [bias for _, bias in results]
    there = [bias for bias in biases if bias is not None]
    kind = spec.config.get("row_biases") or "told"
    if kind == "told" or not there:
        return outputs, biases
    if kind == "first":
        return outputs, [there[0], *(torch.zeros_like(bias) for bias in there[1:])]
    if kind == "mean":
        return outputs, [torch.stack(there).mean(dim=0)] * len(ranks)
    if kind == "sum":
        return outputs, [_reduce(there)] * len(ranks)
    return outputs, [bias * (2.0 if kind == "twice" else 0.5) for bias in there]


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
