"""The compressors as they are written, one token at a time, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def compress_reference(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    """See compress; starts is [B or 1, T]."""
    batch, seq, width = proj.shape
    heads = A.shape[1]
    inner = (width - 4 * state_dim - 2 * heads) // 4
    taps = conv_weight.shape[1]
    weight = conv_weight.float()
    window = proj.new_zeros(batch, taps, 2 * (inner + 2 * state_dim), dtype=torch.float32)
    state = window.new_zeros(batch, 2, heads, state_dim, inner // heads)
    outputs = []
    for t in range(seq):
        token = proj[:, t].float()
        gate = token[:, : 2 * inner].reshape(batch, 2, inner)
        entering = token[:, 2 * inner : width - 2 * heads]
        step = torch.log1p(torch.exp(token[:, width - 2 * heads :] + dt_bias.float().flatten()))
        if mask is not None:
            step = step * mask[:, t, None]
        step = step.reshape(batch, 2, heads)
        fresh = starts[:, t].reshape(-1, 1, 1)
        window = torch.cat([torch.where(fresh, 0.0, window[:, 1:]), entering[:, None]], 1)
        mixed = torch.einsum("bkc,ck->bc", window, weight)
        mixed = mixed * torch.sigmoid(mixed)
        x = mixed[:, : 2 * inner].reshape(batch, 2, heads, -1)
        write = mixed[:, 2 * inner : 2 * (inner + state_dim)].reshape(batch, 2, 1, state_dim, 1)
        read = mixed[:, 2 * (inner + state_dim) :].reshape(batch, 2, 1, 1, state_dim)
        state = torch.where(fresh[..., None, None], 0.0, state)
        state = torch.exp(A.float() * step)[..., None, None] * state
        state = state + write * (step[..., None] * x)[..., None, :]
        y = (read @ state)[..., 0, :] + D.float()[..., None] * x
        y = y.reshape(batch, 2, inner) * gate * torch.sigmoid(gate)
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)
        outputs.append(y.reshape(batch, 2 * inner))
    return torch.stack(outputs, 1).to(proj.dtype) if outputs else proj[..., : 2 * inner]
