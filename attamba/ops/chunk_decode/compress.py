"""One token of the compressors: convolution, recurrence and gate.

Shapes: B rows, E inner width, S heads of width W = E/S, N state, C = 2(E+2N) channels of the
convolution, r taps before the current one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops.backends import choose


class CompressorWeights(NamedTuple):
    """Parameters of the K and the V compressor, K first.

    conv: [C, r+1]. A_log, dt_bias, D_skip: [2, S].
    """

    conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    D_skip: Tensor


def compress_step(
    projected: Tensor,
    h: Tensor,
    conv: Tensor,
    weights: CompressorWeights,
    *,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The Mamba-2 recurrence for one token (arXiv 2405.21060, section 7).

        x, B, C = SiLU(conv(x, B, C)),   dt = softplus(dt + dt_bias)
        h = exp(-exp(A_log) dt) h + dt B x^T,   y = (C h + D_skip x) SiLU(z)

    The norm of y belongs to the product that follows, see ops.thin_linear.

    Args:
        projected: [B, 2E + C + 2S], the columns z | x | B | C | dt, each for K then V.
        h: float32 [B, 2S, N, W], the state. conv: [B, r, C], the last inputs of the convolution.
        starts: bool [B], rows whose state and convolution start afresh. Default: none.
        mask: bool [B], False for rows whose state stays as it is. Default: all go on.
        backend: see attamba.ops. "triton" writes the new state over h and conv and computes no
            gradients; the others leave h and conv alone.

    Returns y [B, 2, E] in projected's dtype, and the new h and conv. Raises ValueError where
    shapes disagree, and for backend "triton" where it cannot run.
    """
    _check(projected, h, conv, weights, starts, mask)
    backend = choose(backend, projected.device, projected.dtype)
    if backend == "triton":
        from attamba.ops.chunk_decode.triton import compress_step_triton

        return compress_step_triton(projected, h, conv, weights, starts, mask), h, conv
    if backend == "reference":
        from attamba.ops.chunk_decode.reference import compress_step_reference

        return compress_step_reference(projected, h, conv, weights, starts, mask)
    return _compress_step_torch(projected, h, conv, weights, starts, mask)


def _check(
    projected: Tensor,
    h: Tensor,
    conv: Tensor,
    weights: CompressorWeights,
    starts: Tensor | None,
    mask: Tensor | None,
) -> None:
    """The kernel knows all sizes from h and weights.conv, and reads the rest as if it fitted."""
    if h.dim() != 4 or h.shape[1] % 2:
        raise ValueError(f"h has shape {list(h.shape)}; it must be [B, 2S, N, W]")
    batch, heads, state, width = h.shape
    channels = heads * width + 4 * state
    if weights.conv.dim() != 2 or weights.conv.shape[0] != channels or not weights.conv.shape[1]:
        raise ValueError(
            f"weights.conv has shape {list(weights.conv.shape)}, expected [{channels}, r+1] "
            f"for h of shape {list(h.shape)}"
        )
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "projected": (projected, (batch, heads * width + channels + heads)),
        "conv": (conv, (batch, weights.conv.shape[1] - 1, channels)),
        "weights.A_log": (weights.A_log, (2, heads // 2)),
        "weights.dt_bias": (weights.dt_bias, (2, heads // 2)),
        "weights.D_skip": (weights.D_skip, (2, heads // 2)),
        "starts": (starts, (batch,)),
        "mask": (mask, (batch,)),
    }
    for name, (tensor, wanted) in shapes.items():
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(wanted)} for h of shape "
                f"{list(h.shape)} and weights.conv of shape {list(weights.conv.shape)}"
            )


def _compress_step_torch(
    projected: Tensor,
    h: Tensor,
    conv: Tensor,
    weights: CompressorWeights,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, state, width = h.shape
    inner = heads * width  # of both compressors
    z, xbc, dt = projected.split([inner, conv.shape[2], heads], 1)
    dt = F.softplus(dt.float() + weights.dt_bias.float().flatten())
    decay = torch.exp(-weights.A_log.float().exp().flatten() * dt)
    before = conv.to(xbc.dtype)
    if starts is not None:
        before = before.masked_fill(starts[:, None, None], 0.0)
        decay = decay.masked_fill(starts[:, None], 0.0)
    inputs = torch.cat([before, xbc[:, None]], 1)
    xbc = F.silu((inputs * weights.conv.to(xbc.dtype).t()).sum(1)).float()
    x, B, C = xbc.split([inner, 2 * state, 2 * state], 1)
    xdt = x.view(batch, heads, width) * dt[..., None]
    update = B.view(batch, 2, 1, state, 1) * xdt.view(batch, 2, -1, 1, width)
    now = torch.addcmul(update, h.view_as(update), decay.view(batch, 2, -1, 1, 1))
    y = (now * C.view(batch, 2, 1, state, 1)).sum(3).view(batch, heads, width)
    y = torch.addcmul(y, weights.D_skip.float().view(heads, 1), x.view(batch, heads, width))
    y = (y.to(projected.dtype).view(batch, inner) * F.silu(z)).view(batch, 2, -1)
    h_new, conv_new = now.view(h.shape), inputs[:, 1:].to(conv.dtype, copy=True)
    if mask is not None:
        h_new = torch.where(mask[:, None, None, None], h_new, h)
        conv_new = torch.where(mask[:, None, None], conv_new, conv)
    return y, h_new, conv_new
