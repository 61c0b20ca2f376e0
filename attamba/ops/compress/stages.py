"""The compressors' stages in PyTorch, which the vectorised backend and the decoding path share.

Shapes: B batch, T tokens, E inner width, S heads, N state, W = E/S width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops.row_ranks import RowRanks
from attamba.ops.shared_rows import carry_scan


def split_projection(proj: Tensor, state_dim: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 4E + 4N + 2S] -> z [B, T, 2E], xbc [B, T, 2E + 4N], dt [B, T, 2S]; views."""
    inner = (proj.shape[-1] - 4 * state_dim - 2 * heads) // 4
    z, xbc, dt = proj.split([2 * inner, 2 * inner + 4 * state_dim, 2 * heads], -1)
    return z, xbc, dt


def causal_conv(inputs: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """Causal depthwise convolution that sees nothing before a start.

    inputs: [B, reach + T, channels], the `reach` inputs before the first token included.
    weight: [channels, reach + 1], starts: bool [B or 1, T]. Returns [B, T, channels].
    """
    reach, seq = weight.shape[1] - 1, starts.shape[1]
    segment = segments(starts, reach)
    now = segment[:, reach:]
    weight = weight.to(inputs.dtype)
    out = inputs[:, reach:] * weight[:, -1]
    for lag in range(1, reach + 1):
        at = slice(reach - lag, reach - lag + seq)
        tap = (segment[:, at] == now)[..., None] * weight[:, -1 - lag]
        out = torch.addcmul(out, inputs[:, at], tap)
    return out


def segments(starts: Tensor, reach: int) -> Tensor:
    """How many starts there were, of each input: bool [B or 1, T] -> int64 [B or 1, reach + T]."""
    return F.pad(starts.long().cumsum(1), (reach, 0))


def scan_convolved(
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    mask: Tensor | None,
    initial_state: Tensor | None,
    scan: str,
    ranks: RowRanks | None = None,
) -> tuple[Tensor, Tensor]:
    """From the convolution's output [B, T, 2E + 4N] to y [B, T, 2E] and the last state.

    The state is float32 [B, 2S, N, W]; ranks: see carry_scan; see compress for the rest.
    """
    heads = A.shape[1]
    inner = xbc.shape[-1] // 2 - 2 * state_dim
    x, B, C = F.silu(xbc).split([2 * inner, 2 * state_dim, 2 * state_dim], -1)
    dt = F.softplus(dt.float() + dt_bias.float().flatten())
    if mask is not None:
        dt = dt * mask[..., None]  # no step: neither decay nor update
    y, state = carry_scan(
        x.unflatten(-1, (2 * heads, -1)),
        dt,
        A.flatten(),
        B.unflatten(-1, (2, -1)),
        C.unflatten(-1, (2, -1)),
        starts,
        D.flatten(),
        initial_state,
        scan,
        ranks,
    )
    return y.flatten(2), state


def gate_and_norm(y: Tensor, z: Tensor, eps: float) -> Tensor:
    """y * SiLU(z), each compressor's half divided by its root mean square. [B, T, 2E]."""
    y = (y * F.silu(z)).unflatten(-1, (2, -1))
    return F.rms_norm(y, y.shape[-1:], eps=eps).flatten(-2)
