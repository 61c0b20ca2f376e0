"""Mixer "mamba2": a state-space model with one decay per head (arXiv 2405.21060, section 7).

    z, x, B, C, dt = split(W_in u)
    x, B, C = SiLU(causal_conv(x, B, C))
    h_t = exp(-exp(A_log) dt_t) h_(t-1) + dt_t B_t x_t^T,   dt_t = softplus(dt_t + dt_bias)
    y = W_out RMSNorm((C_t h_t + D_skip x_t) * SiLU(z))

B and C are one for all heads. Rates and step sizes are drawn as in the paper's code.

Shapes: B batch, T tokens, d model width, E inner width, S heads of width W = E/S, N state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.mixers import Mamba2Mixer
from attamba.modules.cache import LayerCache, ScanState
from attamba.modules.convolution import CausalConv
from attamba.modules.layers import RMSNorm, linear
from attamba.modules.mixer import TimeMixer
from attamba.ops.chunking import Span
from attamba.ops.shared_rows import carry_scan

STEP_SIZES = (1e-3, 1e-1)
"""Between them softplus(dt_bias) is drawn, its logarithm uniformly."""

RATES = (1.0, 16.0)
"""Between them exp(A_log) is drawn, uniformly."""


class Mamba2(TimeMixer):
    """One Mamba-2 mixer. Documents start from a state of zeros."""

    def __init__(self, config: Mamba2Mixer, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.inner, self.state_dim = config.inner(dim), config.state_dim
        self.n_heads, self.backend = self.inner // config.head_dim, config.backend
        self.widths = [self.inner, self.inner + 2 * self.state_dim, self.n_heads]
        self.in_proj = linear(dim, sum(self.widths))
        self.conv = CausalConv(self.widths[1], config.conv_width)
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(*RATES).log())
        low, high = (math.log(size) for size in STEP_SIZES)
        step = torch.empty(self.n_heads).uniform_(low, high).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.D_skip = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(self.inner, norm_eps)
        self.wo = linear(self.inner, dim)

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None = None, given: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, d] -> [B, T, d]. `given` ends do not concern this mixer."""
        state = None
        if cache is not None:
            assert isinstance(cache.state, ScanState)
            state = cache.state
        z, xbc, dt = self.in_proj(x).split(self.widths, -1)
        y = self._scan(xbc, dt, span, state)
        return self.wo(self.norm(y * F.silu(z)))

    def _scan(self, xbc: Tensor, dt: Tensor, span: Span, state: ScanState | None) -> Tensor:
        """From the input projection's columns to y, [B, T, E]."""
        starts = span.positions == 0
        xbc = F.silu(self.conv(xbc, starts, span, state))
        x, B, C = xbc.split([self.inner, self.state_dim, self.state_dim], -1)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if span.mask is not None:
            dt = dt * span.mask[..., None]  # no step: neither decay nor update
        y, h = carry_scan(
            x.unflatten(-1, (self.n_heads, -1)),
            dt,
            -self.A_log.float().exp(),
            B[:, :, None],
            C[:, :, None],
            starts,
            self.D_skip,
            None if state is None else state.h,
            self.backend,
            span.ranks,
        )
        if state is not None:
            state.update(h=h)
        return y.flatten(2)

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        width = self.inner // self.n_heads
        h = torch.zeros(batch, self.n_heads, self.state_dim, width, device=device)
        return LayerCache(state=ScanState(h, self.conv.new_state(batch, dtype, device)))
