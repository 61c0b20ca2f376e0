"""The recurrence as it is written, one token at a time, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See chunk_scan; B and C are [B, T, K, N], starts is [B or 1, T]."""
    batch, seq, heads, width = x.shape
    per_group = heads // B.shape[2]
    xs, dts = x.float(), dt.float()
    Bs, Cs = (t.float().repeat_interleave(per_group, 2) for t in (B, C))
    state = x.new_zeros(batch, heads, B.shape[3], width, dtype=torch.float32)
    if initial_state is not None:
        state = initial_state.float()
    ys = []
    for t in range(seq):
        state = state.masked_fill(starts[:, t, None, None, None], 0.0)
        decay = torch.exp(A.float() * dts[:, t])[..., None, None]
        update = (dts[:, t, :, None] * Bs[:, t])[..., None] * xs[:, t, :, None, :]
        state = decay * state + update
        y = (Cs[:, t, :, None, :] @ state)[:, :, 0]
        ys.append(y if D is None else y + D.float()[:, None] * xs[:, t])
    out = torch.stack(ys, 1) if ys else xs
    return out.to(x.dtype), state
