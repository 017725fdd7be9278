"""Run with the real mamba_ssm: loads a folder, and computes with its own references for kernels.

Arguments: the folder, an npz with tokens, an npz for the logits. mamba_ssm, triton and einops must
be importable; no GPU is needed.
"""

import sys
from typing import Any

import numpy as np
import torch
from mamba_ssm.models import mixer_seq_simple
from mamba_ssm.modules import block, mamba_simple
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import layer_norm_ref, rms_norm_ref


def add_and_norm(
    x: Any,
    weight: Any,
    bias: Any,
    is_rms_norm: bool = False,
    residual_in_fp32: Any = None,
    **more: Any,
) -> Any:
    function = rms_norm_ref if is_rms_norm else layer_norm_ref
    return function(x, weight, bias, upcast=True, **more)


mixer_seq_simple.layer_norm_fn = block.layer_norm_fn = add_and_norm
mamba_simple.selective_scan_fn = selective_scan_ref
model = mixer_seq_simple.MambaLMHeadModel.from_pretrained(sys.argv[1])
with np.load(sys.argv[2]) as file, torch.no_grad():
    np.savez(sys.argv[3], logits=model(torch.from_numpy(file["tokens"])).logits.numpy())
