"""Logits of Transformer Engine's modules as GPT-NeoX puts them together, straight from the files.

Written from TransformerEngine 1.12 (pytorch/attention.py, module/layernorm_mlp.py) and GPT-NeoX
(megatron/model/transformer.py, transformer_engine.py) with none of the tool's own row maps: it is
what the tool is held against, since Transformer Engine itself wants a GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is None:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _rotate(x: Tensor, dim: int, base: float) -> Tensor:
    """x: [heads, tokens, width]; the first ``dim`` dimensions turn, by halves."""
    angles = torch.outer(
        torch.arange(x.shape[1]).float(), 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    )
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    turned, rest = x[..., :dim], x[..., dim:]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def _attention(x: Tensor, ranks: list[dict[str, Tensor]], at: str, yml: dict[str, Any]) -> Tensor:
    """Each rank's share of the heads; the ranks' outputs are summed, the bias added once."""
    heads = yml["num_attention_heads"]
    groups = yml.get("num_kv_heads") or heads
    width, per = yml["hidden_size"] // heads, heads // groups
    total = torch.zeros_like(x)
    for rank in ranks:
        mixed = functional.linear(
            x, rank[f"{at}attention.qkv.weight"], rank[f"{at}attention.qkv.bias"]
        )
        mixed = mixed.view(len(x), groups // len(ranks), per + 2, width)
        q, k, v = mixed.split((per, 1, 1), dim=2)
        q = q.reshape(len(x), -1, width).transpose(0, 1)
        k, v = (part.squeeze(2).transpose(0, 1).repeat_interleave(per, 0) for part in (k, v))
        dim, base = int(width * yml.get("rotary_pct", 1)), yml.get("rotary_emb_base", 10000)
        q, k = _rotate(q, dim, base), _rotate(k, dim, base)
        out = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        total += functional.linear(
            out.transpose(0, 1).flatten(1), rank[f"{at}attention.proj.weight"]
        )
    return total + ranks[0][f"{at}attention.proj.bias"]


def _mlp(x: Tensor, ranks: list[dict[str, Tensor]], at: str, yml: dict[str, Any]) -> Tensor:
    first = ranks[0]
    bias = first.get(f"{at}mlp.layer_norm_bias")
    eps = 1e-8 if bias is None else 1e-5
    x = _norm(x, first[f"{at}mlp.layer_norm_weight"], bias, eps)
    total = torch.zeros_like(x)
    for rank in ranks:
        wide = functional.linear(x, rank[f"{at}mlp.fc1_weight"], rank[f"{at}mlp.fc1_bias"])
        if yml["activation"] == "swiglu":
            gate, up = wide.chunk(2, -1)
            wide = functional.silu(gate) * up
        else:
            acts = {
                "gelu": lambda w: functional.gelu(w, approximate="tanh"),
                "relu": functional.relu,
            }
            wide = acts[yml["activation"]](wide)
        total += functional.linear(wide, rank[f"{at}mlp.fc2_weight"])
    return total + first[f"{at}mlp.fc2_bias"]


def forward(ranks: list[dict[str, Tensor]], yml: dict[str, Any], tokens: Tensor) -> Tensor:
    """[batch, tokens, vocabulary] for ranks of "<layer>.<name>" to tensor, and the yml."""
    layers, first = yml["num_layers"], ranks[0]
    rms = yml["norm"] == "rmsnorm"
    eps = yml["rms_norm_epsilon"] if rms else yml.get("layernorm_epsilon", 1e-5)

    def norm(x: Tensor, name: str) -> Tensor:
        weight = first.get(f"{name}.scale", first.get(f"{name}.weight"))
        return _norm(x, weight, first.get(f"{name}.bias"), eps)

    embeddings = torch.cat([rank["0.word_embeddings.weight"] for rank in ranks])
    head = embeddings
    if yml["no_weight_tying"]:
        head = torch.cat([rank[f"{layers + 4}.final_linear.weight"] for rank in ranks])
    rows = []
    for row in tokens:
        x = embeddings[row]
        for layer in range(2, layers + 2):
            at = f"{layer}."
            attended = _attention(norm(x, f"{at}input_layernorm"), ranks, at, yml)
            if yml.get("gpt_j_residual"):
                x = x + attended + _mlp(x, ranks, at, yml)
            else:
                x = x + attended
                x = x + _mlp(x, ranks, at, yml)
        rows.append(norm(x, f"{layers + 3}.norm") @ head.T)
    return torch.stack(rows)
