"""The selective scan of "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 3.2.

With A diagonal: h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t, and y_t = C_t h_t + D u_t.
"""

import torch
from torch.nn import functional

mamba_inner_fn = selective_scan_fn = None  # the kernels, which want a GPU


def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    return_last_state,
):
    """u, delta, z: [b, d, s]. A: [d, n]. B, C: [b, n, s]. D, delta_bias: [d]. Returns [b, d, s]."""
    assert delta_softplus
    assert not return_last_state
    delta = functional.softplus(delta.float() + delta_bias[:, None])
    state = torch.zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        dt, given = delta[:, :, t, None], u[:, :, t, None]
        state = torch.exp(dt * A) * state + dt * B[:, None, :, t] * given
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return ((torch.stack(outputs, 2) + u * D[:, None]) * functional.silu(z)).to(u.dtype)
