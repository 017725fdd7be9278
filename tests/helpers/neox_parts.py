"""Writes ranks of any GPT-NeoX model, cut by rules that are written here a second time."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

HIDDEN, HEADS, LAYERS, VOCABULARY, POSITIONS = 48, 12, 2, 96, 24
# rows, columns: dimension 0 or 1 is divided over the ranks. own: each rank has one of its own
How = Literal["rows", "columns", "same", "own"]


@dataclass(frozen=True)
class Part:
    """A tensor of the model, or one of the parts that are fused in a tensor of GPT-NeoX.

    name: in the layer. parts with one name are one tensor, in which each rank has its rows of each.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    how: How = "same"

    def of_rank(self, tp: int, rank: int, fused: str = "") -> torch.Tensor:
        key = f"{self.layer} {self.name} {fused} {rank if self.how == 'own' else ''}"
        seed = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        whole = torch.randn(self.shape, generator=seed)
        if self.how in ("same", "own"):
            return whole
        return whole.chunk(tp, dim=0 if self.how == "rows" else 1)[rank].contiguous()


def block(layer: int, *, norm: str = "weight", ffn: int = 4 * HIDDEN) -> list[Part]:
    """A transformer block with biases and a plain MLP. norm: the name of the norms' parameter."""
    norms = {"g": (1,)}.get(norm, (HIDDEN,))
    named: list[tuple[str, tuple[int, ...], How]] = [
        (f"input_layernorm.{norm}", norms, "same"),
        ("attention.query_key_value.weight", (3 * HIDDEN, HIDDEN), "rows"),
        ("attention.query_key_value.bias", (3 * HIDDEN,), "rows"),
        ("attention.dense.weight", (HIDDEN, HIDDEN), "columns"),
        ("attention.dense.bias", (HIDDEN,), "same"),
        (f"post_attention_layernorm.{norm}", norms, "same"),
        ("mlp.linear1.weight", (ffn, HIDDEN), "rows"),
        ("mlp.linear1.bias", (ffn,), "rows"),
        ("mlp.linear2.weight", (HIDDEN, ffn), "columns"),
        ("mlp.linear2.bias", (HIDDEN,), "same"),
    ]
    return [Part(layer, name, shape, how) for name, shape, how in named]


def model(blocks: list[list[Part]], *, norm: str = "weight", **more: Part) -> list[Part]:
    """The parts of a whole model."""
    last = len(blocks) + 3
    return [
        Part(0, "word_embeddings.weight", (VOCABULARY, HIDDEN), "rows"),
        *more.values(),
        *(replace(part, layer=n + 2) for n, parts in enumerate(blocks) for part in parts),
        Part(last, f"norm.{norm}", (1,) if norm == "g" else (HIDDEN,)),
        Part(last + 1, "final_linear.weight", (VOCABULARY, HIDDEN), "rows"),
    ]


def cut(parts: list[Part], tp: int, rank: int) -> dict[int, dict[str, torch.Tensor]]:
    """What a rank holds, by layer and name."""
    layers: dict[int, dict[str, list[torch.Tensor]]] = {}
    for part in parts:
        tensors = layers.setdefault(part.layer, {}).setdefault(part.name, [])
        tensors.append(part.of_rank(tp, rank, str(len(tensors))))
    return {
        layer: {name: torch.cat(tensors) for name, tensors in named.items()}
        for layer, named in layers.items()
    }


def write(root: Path, parts: list[Part], tp: int, settings: dict[str, Any]) -> Path:
    """A GPT-NeoX folder with a file for each layer and rank."""
    step = root / "global_step5"
    (step / "configs").mkdir(parents=True)
    sizes = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    }
    yml = {
        **sizes,
        "pos_emb": "rotary",
        "no_weight_tying": True,
        "norm": "layernorm",
        "activation": "gelu",
        "model_parallel_size": tp,
        "pipe_parallel_size": 1,
        "make_vocab_size_divisible_by": 8,
        **settings,
    }
    (step / "configs" / "run.yml").write_text(yaml.safe_dump(yml))
    args = {**sizes, "model_parallel_size": tp, "make_vocab_size_divisible_by": 8}
    for rank in range(tp):
        for layer, tensors in cut(parts, tp, rank).items():
            torch.save(tensors, step / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
        meta = {"module": None, "iteration": 5, "args": args, "mp_world_size": tp}
        torch.save(meta, step / f"mp_rank_{rank:02d}_model_states.pt")
    (root / "latest").write_text("global_step5")
    return root


def read(root: Path) -> list[dict[int, dict[str, torch.Tensor]]]:
    """The tensors of each rank of a folder in either layout, by layer and name."""
    (step,) = root.glob("global_step*")
    ranks: dict[int, dict[int, dict[str, torch.Tensor]]] = {}
    for path in sorted(step.glob("layer_*")):
        layer, rank = (int(word[-2:]) for word in path.name.split("-")[:2])
        ranks.setdefault(rank, {})[layer] = torch.load(path, weights_only=False)
    for path in [] if ranks else sorted(step.glob("mp_rank_*")):
        layers = ranks.setdefault(int(path.name.split("_")[2]), {})
        for name, tensor in torch.load(path, weights_only=False)["module"].items():
            _, layer_name, rest = name.split(".", 2)
            layers.setdefault(int(layer_name), {})[rest] = tensor
    return [ranks[rank] for rank in sorted(ranks)]
