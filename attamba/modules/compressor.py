"""The state-space models that turn a chunk's tokens into one key and one value.

    z, x, B, C, dt = split(W_in u)
    x, B, C = SiLU(causal_conv(x, B, C))
    h_t = exp(-exp(A_log) dt_t) h_(t-1) + dt_t B_t x_t^T,   dt_t = softplus(dt_t + dt_bias)
    y_t = C_t h_t + D_skip x_t
    SSM(u)_t = W_out RMSNorm(y_t * SiLU(z_t))

A Mamba-2 mixer (arXiv 2405.21060) with weights of its own for K and for V. Both run as one: one
input projection, one convolution, one scan of 2S heads in two groups.

Shapes: B batch, T tokens, d model width, E inner width, S heads, N state, F output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.modules.cache import CompressorState
from attamba.modules.layers import linear, trunc_normal_
from attamba.ops import chunk_scan
from attamba.ops.chunking import Span


class Compressors(nn.Module):
    """The K and the V compressor of one layer."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        ssm_dim: int,
        state_dim: int,
        n_heads: int,
        conv_width: int,
        norm_eps: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.ssm_dim, self.state_dim, self.n_heads = ssm_dim, state_dim, n_heads
        self.conv_width, self.norm_eps, self.backend = conv_width, norm_eps, backend
        # rows of W_in, each for K then V:  z | x | B | C | dt
        self.widths = [2 * ssm_dim, 2 * (ssm_dim + 2 * state_dim), 2 * n_heads]
        self.in_proj = linear(dim, sum(self.widths))
        self.conv_weight = nn.Parameter(torch.empty(self.widths[1], conv_width))
        self.A_log = nn.Parameter(torch.empty(2, n_heads))
        self.dt_bias = nn.Parameter(torch.zeros(2, n_heads))
        self.D_skip = nn.Parameter(torch.ones(2, n_heads))
        self.norm_weight = nn.Parameter(torch.ones(2, ssm_dim))
        self.out_proj = nn.Parameter(torch.empty(2, out_dim, ssm_dim))
        trunc_normal_(self.conv_weight, conv_width)
        trunc_normal_(self.out_proj, ssm_dim)
        with torch.no_grad():
            self.A_log.uniform_(0.01, 2.0).log_()
        for gain in (self.A_log, self.dt_bias, self.D_skip, self.norm_weight):
            gain._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, u: Tensor, starts: Tensor, span: Span, state: CompressorState | None = None
    ) -> tuple[Tensor, Tensor]:
        """u: [B, T, d], starts: bool [B or 1, T] -> SSM_k(u), SSM_v(u), each [B, T, F].

        With a state: goes on from it and updates it; padded tokens leave it as it is.
        """
        batch, seq, _ = u.shape
        z, xbc, dt = self.in_proj(u).split(self.widths, -1)
        xbc = F.silu(self._conv(xbc, starts, span, state))
        x, B, C = xbc.split([2 * self.ssm_dim, 2 * self.state_dim, 2 * self.state_dim], -1)
        dt = F.softplus(dt.float() + self.dt_bias.float().flatten())
        if span.mask is not None:
            dt = dt * span.mask[..., None]  # no step: neither decay nor update
        y, h = chunk_scan(
            x.unflatten(-1, (2 * self.n_heads, -1)),
            dt,
            -self.A_log.float().exp().flatten(),
            B.unflatten(-1, (2, -1)),
            C.unflatten(-1, (2, -1)),
            starts,
            D=self.D_skip.flatten(),
            initial_state=None if state is None else state.h,
            return_final_state=True,
            backend=self.backend,
        )
        if state is not None:
            state.h = h.detach().clone()  # not a view that keeps every tile alive
        y = (y.flatten(2) * F.silu(z)).unflatten(-1, (2, -1))
        y = F.rms_norm(y, (self.ssm_dim,), eps=self.norm_eps) * self.norm_weight.to(y.dtype)
        y = y.flatten(0, 1).transpose(0, 1) @ self.out_proj.transpose(1, 2)  # [2, B*T, F]
        k, v = y.unflatten(1, (batch, seq)).unbind(0)
        return k, v

    def _conv(self, x: Tensor, starts: Tensor, span: Span, state: CompressorState | None) -> Tensor:
        """Causal depthwise convolution that sees nothing before a start. x: [B, T, channels]."""
        reach, seq = self.conv_width - 1, x.shape[1]
        if state is not None and seq == 1:  # a decode step: one window of the inputs
            inputs = _join(state.conv.masked_fill(starts[..., None], 0.0), x, span)
            state.conv = inputs[:, 1:].detach().to(state.conv.dtype, copy=True)
            return (inputs * self.conv_weight.to(x.dtype).t()).sum(1, keepdim=True)
        inputs = F.pad(x, (0, 0, reach, 0)) if state is None else _join(state.conv, x, span)
        segment = F.pad(starts.long().cumsum(1), (reach, 0))  # [B or 1, reach + T]
        now = segment[:, reach:]
        weight = self.conv_weight.to(x.dtype)
        out = inputs[:, reach:] * weight[:, -1]
        for lag in range(1, self.conv_width):
            at = slice(reach - lag, reach - lag + seq)
            tap = (segment[:, at] == now)[..., None] * weight[:, -1 - lag]
            out = torch.addcmul(out, inputs[:, at], tap)
        if state is not None:
            alive = segment[:, seq:] == segment[:, -1:]
            state.conv = (inputs[:, seq:] * alive[..., None]).detach().to(state.conv.dtype)
        return out

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> CompressorState:
        width = self.ssm_dim // self.n_heads
        h = torch.zeros(batch, 2 * self.n_heads, self.state_dim, width, device=device)
        conv = torch.zeros(batch, self.conv_width - 1, self.widths[1], dtype=dtype, device=device)
        return CompressorState(h, conv)


def _join(carried: Tensor, x: Tensor, span: Span) -> Tensor:
    """[carried | x] along time, each row's padding moved to its left so that the two touch."""
    joined = torch.cat([carried.to(x.dtype), x], 1)
    if span.n_pad is None:
        return joined
    column = torch.arange(joined.shape[1], device=x.device)
    n_pad = span.n_pad[:, None]
    source = torch.where(column < n_pad + carried.shape[1], column - n_pad, column).clamp(min=0)
    return joined.gather(1, source[..., None].expand(-1, -1, x.shape[2]))
