"""Stands for mamba_ssm's MambaLMHeadModel: its config, names, shapes and arithmetic, on a CPU.

Of e9594ce: models/{config_mamba,mixer_seq_simple}.py, modules/{block,mamba_simple}.py.
"""

import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_SCAN = Path(__file__).parents[1] / "neox/stand_in/mamba_ssm/ops/selective_scan_interface.py"
_spec = importlib.util.spec_from_file_location("_scan", _SCAN)
assert _spec is not None
assert _spec.loader is not None
_scan = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_scan)


@dataclass
class Config:
    """Every key that config.json may have; another is a TypeError."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Mixer(nn.Module):
    def __init__(
        self,
        hidden: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: Any = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        dt_min: float = 0.001,
    ) -> None:
        super().__init__()
        inner, rank = expand * hidden, -(-hidden // 16) if dt_rank == "auto" else dt_rank
        self.sizes = [rank, d_state, d_state]
        self.A_log = nn.Parameter(torch.ones(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(
            inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, 1)
        x = functional.silu(self.conv1d(x)[..., : hidden.shape[1]])
        dt, b, c = self.x_proj(x.transpose(1, 2)).transpose(1, 2).split(self.sizes, 1)
        dt = torch.einsum("dr,brs->bds", self.dt_proj.weight, dt)
        decay = -torch.exp(self.A_log)
        bias = self.dt_proj.bias
        y = _scan.selective_scan_ref(x, dt, decay, b, c, self.D, z, bias, True, False)
        return self.out_proj(y.transpose(1, 2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = Norm(config.d_model)
        self.mixer = Mixer(config.d_model, **config.ssm_cfg)


class Backbone(nn.Module):
    def __init__(self, config: Config, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = Norm(config.d_model)


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // config.pad_vocab_size_multiple)
        rows *= config.pad_vocab_size_multiple
        self.backbone = Backbone(config, rows)
        self.lm_head = nn.Linear(config.d_model, rows, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.backbone.embedding(tokens)
        for block in self.backbone.layers:
            x = x + block.mixer(block.norm(x))
        return self.lm_head(self.backbone.norm_f(x))


def load(folder: Path) -> Model:
    """As from_pretrained, whose dtype is float32 unless told."""
    model = Model(Config(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    return model


def save(folder: Path, seed: int = 0, **config: Any) -> Path:
    """As save_pretrained, with every tensor random."""
    torch.manual_seed(seed)
    model = Model(Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=4))
    return folder
