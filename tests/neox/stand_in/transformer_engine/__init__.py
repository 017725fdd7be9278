"""Stands for NVIDIA's transformer_engine on a CPU: what GPT-NeoX takes of it, and no more.

Names, shapes, states and arithmetic as in TransformerEngine 1.12: pytorch/module/linear.py,
layernorm_mlp.py, base.py and pytorch/attention.py.
"""

import io
import types

import torch
from torch import distributed, nn
from torch.nn import functional


class _WithState(nn.Module):
    """base.py: a state beside the weights, which a strict load wants."""

    def get_extra_state(self):
        state = io.BytesIO()
        torch.save(None, state)
        return state

    def set_extra_state(self, state):
        if state is not None:
            state.seek(0)
            assert torch.load(state) is None


def _sum(x, group, size):
    if size > 1:
        x = x.clone()
        distributed.all_reduce(x, group=group)
    return x


class _SumBackward(torch.autograd.Function):
    """What a column-parallel layer does with its input: the ranks' gradients of it are summed."""

    @staticmethod
    def forward(context, x, group, size):
        context.group, context.size = group, size
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return _sum(gradient, context.group, context.size), None, None


def _entered(x, group, size):
    return _SumBackward.apply(x, group, size) if size > 1 else x


class Linear(_WithState):
    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        init_method=None,
        return_bias=False,
        parallel_mode=None,
        tp_group=None,
        tp_size=1,
        params_dtype=None,
        **_rest,
    ):
        super().__init__()
        self.mode, self.group, self.size = parallel_mode, tp_group, tp_size
        self.returns = return_bias
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype))
        init_method(self.weight)
        self.bias = nn.Parameter(torch.zeros(rows, dtype=params_dtype)) if bias else None

    def forward(self, x):
        if self.mode == "column":
            x = _entered(x, self.group, self.size)
        out = functional.linear(x, self.weight)
        if self.mode == "row":
            out = _sum(out, self.group, self.size)
        if self.returns:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class _CoreAttention(_WithState):
    def forward(self, q, k, v):
        """q [s, b, n, d], k and v [s, b, groups, d]: causal."""
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def _rotate(x, freqs):
    freqs = freqs[: x.shape[0]]
    turned, rest = x[..., : freqs.shape[-1]], x[..., freqs.shape[-1] :]
    low, high = turned.chunk(2, -1)
    turned = turned * freqs.cos() + torch.cat([-high, low], -1) * freqs.sin()
    return torch.cat([turned, rest], -1)


class MultiheadAttention(nn.Module):
    def __init__(
        self,
        hidden_size,
        num_attention_heads,
        num_gqa_groups=None,
        set_parallel_mode=False,
        window_size=None,
        bias=True,
        input_layernorm=False,
        fuse_qkv_params=False,
        qkv_weight_interleaved=True,
        init_method=None,
        output_layer_init_method=None,
        return_bias=False,
        tp_size=1,
        **kept,
    ):
        super().__init__()
        assert fuse_qkv_params
        assert qkv_weight_interleaved
        assert not input_layernorm
        assert window_size is None
        self.groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.width = hidden_size // num_attention_heads
        self.per = num_attention_heads // tp_size // self.groups
        rows = hidden_size + 2 * self.groups * tp_size * self.width
        same = {"tp_group": kept["tp_group"], "tp_size": tp_size, "bias": bias}
        same["params_dtype"] = kept["params_dtype"]
        column, row = ("column", "row") if set_parallel_mode else (None, None)
        self.qkv = Linear(hidden_size, rows, init_method=init_method, parallel_mode=column, **same)
        self.core_attention = _CoreAttention()
        self.proj = Linear(
            hidden_size,
            hidden_size,
            init_method=output_layer_init_method,
            return_bias=return_bias,
            parallel_mode=row,
            **same,
        )

    def forward(self, x, _attention_mask, rotary_pos_emb=None, **_rest):
        mixed = self.qkv(x)
        mixed = mixed.view(*mixed.shape[:-1], self.groups, self.per + 2, self.width)
        q, k, v = mixed.split((self.per, 1, 1), dim=-2)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.width) for part in (q, k, v))
        q, k = _rotate(q, rotary_pos_emb), _rotate(k, rotary_pos_emb)
        return self.proj(self.core_attention(q, k, v))


class LayerNormMLP(_WithState):
    def __init__(
        self,
        hidden_size,
        ffn_hidden_size,
        eps,
        bias,
        normalization,
        activation,
        init_method,
        output_layer_init_method,
        return_bias,
        params_dtype,
        tp_group,
        tp_size,
        **_rest,
    ):
        super().__init__()
        self.eps, self.activation, self.group, self.size = eps, activation, tp_group, tp_size
        assert return_bias
        assert bias
        width = ffn_hidden_size // tp_size
        wide = width * (2 if activation == "swiglu" else 1)
        made = {"dtype": params_dtype}
        self.layer_norm_weight = nn.Parameter(torch.ones(hidden_size, **made))
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(hidden_size, **made))
        self.fc1_weight = nn.Parameter(torch.empty(wide, hidden_size, **made))
        self.fc1_bias = nn.Parameter(torch.zeros(wide, **made))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, width, **made))
        self.fc2_bias = nn.Parameter(torch.zeros(hidden_size, **made))
        init_method(self.fc1_weight)
        output_layer_init_method(self.fc2_weight)

    def forward(self, x):
        shape, weight = (x.shape[-1],), self.layer_norm_weight
        if self.layer_norm_bias is None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight
        else:
            x = functional.layer_norm(x, shape, weight, self.layer_norm_bias, self.eps)
        x = _entered(x, self.group, self.size)
        x = functional.linear(x, self.fc1_weight, self.fc1_bias)
        if self.activation == "swiglu":
            first, second = x.chunk(2, -1)
            x = functional.silu(first) * second
        else:
            assert self.activation == "gelu"
            x = functional.gelu(x, approximate="tanh")
        return _sum(functional.linear(x, self.fc2_weight), self.group, self.size), self.fc2_bias


class _Recipe:
    pass


pytorch = types.SimpleNamespace(
    Linear=Linear,
    LayerNormMLP=LayerNormMLP,
    MultiheadAttention=MultiheadAttention,
    LayerNorm=nn.LayerNorm,
    RMSNorm=nn.RMSNorm,
)
common = types.SimpleNamespace(recipe=types.SimpleNamespace(DelayedScaling=_Recipe))
