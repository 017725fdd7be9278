"""Lets the real GPT-NeoX run on CPU: replaces what needs CUDA or apex, in this process.

The import does it, before anything of GPT-NeoX is imported.
"""

import os
import sys
import types

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

torch.set_num_threads(1)


def nothing():
    """A new function each time: torch's compiler wants them told apart."""
    return lambda *_args, **_kwargs: None


def without_cuda() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    torch.cuda.LongTensor = lambda values: torch.tensor(values, dtype=torch.long)
    for name in ("set_rng_state", "manual_seed", "synchronize"):
        setattr(torch.cuda, name, nothing())
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = nothing(), nothing()
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self


class Adam(torch.optim.AdamW):
    """Stands for apex's and DeepSpeed's fused Adam, whose other options don't matter here."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_rest):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def refresh_fp32_params(self):
        pass


def without_apex() -> None:
    names = ("apex", "apex.optimizers", "apex.normalization", "apex.normalization.fused_layer_norm")
    apex, optimizers, normalization, fused = (types.ModuleType(name) for name in names)
    apex.optimizers, optimizers.FusedAdam = optimizers, Adam
    fused.FusedLayerNormAffineFunction = types.SimpleNamespace(
        apply=lambda x, w, b, shape, eps, *_rest: torch.nn.functional.layer_norm(
            x, tuple(shape), w, b, eps
        )
    )
    for name, module in zip(names, (apex, optimizers, normalization, fused), strict=True):
        sys.modules.setdefault(name, module)


without_cuda()
import deepspeed
import deepspeed.ops.adam
import deepspeed.runtime.engine as engine
from deepspeed.accelerator import get_accelerator

deepspeed.ops.adam.FusedAdam = Adam
engine.is_zero_supported_optimizer = lambda _optimizer: True
type(get_accelerator()).is_fp16_supported = lambda _self: True
without_apex()  # after transformers has looked for the real one
