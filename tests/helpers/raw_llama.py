"""Llama in the form in which Meta publishes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import hf_tensors

if TYPE_CHECKING:
    import torch

SPLIT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.norm": "norm",
}


def pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads, 2 halves, d/2] to neighbouring pairs: what Meta's rotary embedding takes."""
    rows, columns = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_raw(hf: Path, folder: Path, shards: int, vocab_rows: bool = False, **more: Any) -> Path:
    """A transformers Llama in Meta's form."""
    import torch

    config = json.loads((hf / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in hf_tensors(hf).items():
        key = name
        for old, new in NAMES.items():
            if f"{old}." in key:
                key = key.replace(old, new)
                break
        key = key.removeprefix("model.")
        if "q_proj" in name or "k_proj" in name:
            tensor = pairs(tensor, heads if "q_proj" in name else kv_heads)
        dim = next((d for part, d in SPLIT.items() if f"{part}." in key), None)
        dim = (0 if vocab_rows else 1) if key.startswith("tok_") else dim
        parts = [tensor] * shards if dim is None else tensor.chunk(shards, dim)
        for file, part in zip(files, parts, strict=True):
            file[key] = part.clone()
    folder.mkdir()
    for number, file in enumerate(files):
        file["rope.freqs"] = torch.ones(4)
        torch.save(file, folder / f"consolidated.{number:02d}.pth")
    params = {
        "dim": config["hidden_size"],
        "n_heads": heads,
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": -1,
        "multiple_of": 256,
        "max_seq_len": config["max_position_embeddings"],
        **({"n_kv_heads": kv_heads} if kv_heads != heads else {}),
        **more,
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder
