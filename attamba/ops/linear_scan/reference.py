"""The recurrence as it is written, one token at a time, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan_reference(
    a: Tensor, b: Tensor, starts: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See linear_scan; starts is [B or 1, T]."""
    state, states = initial_state, []
    for t in range(b.shape[1]):
        before = torch.where(starts[:, t, None], 0.0, state)
        state = a[:, t].float() * before + b[:, t].float()
        states.append(state)
    h = torch.stack(states, 1) if states else b
    return h.to(b.dtype), state
