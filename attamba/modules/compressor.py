"""The state-space models that turn a chunk's tokens into one key and one value.

    z, x, B, C, dt = split(W_in u)
    x, B, C = SiLU(causal_conv(x, B, C))
    h_t = exp(-exp(A_log) dt_t) h_(t-1) + dt_t B_t x_t^T,   dt_t = softplus(dt_t + dt_bias)
    y_t = C_t h_t + D_skip x_t
    SSM(u)_t = W_out RMSNorm(y_t * SiLU(z_t))

A Mamba-2 mixer (arXiv 2405.21060) with weights of its own for K and for V. Both run as one: one
input projection, one `compress`.

Shapes: B batch, T tokens, d model width, E inner width, S heads, N state, F output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.modules.cache import ScanState, State
from attamba.modules.convolution import convolve
from attamba.modules.layers import linear, trunc_normal_
from attamba.ops import compress
from attamba.ops.chunk_decode import CompressorWeights, compress_step
from attamba.ops.chunking import Span
from attamba.ops.compress.stages import (
    causal_conv,
    gate_and_norm,
    scan_convolved,
    split_projection,
)
from attamba.ops.shared_rows import padded
from attamba.ops.thin_linear import Norm, thin_linear


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
        init: float = 1.0,
    ) -> None:
        """init: size of the outputs when training begins, times that of the inputs; about."""
        super().__init__()
        self.ssm_dim, self.state_dim, self.n_heads = ssm_dim, state_dim, n_heads
        self.conv_width, self.norm_eps, self.backend = conv_width, norm_eps, backend
        self.all_heads = True
        """Are all heads here, so that one operator can compute and norm them?"""
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
            self.out_proj.mul_(init)
        for gain in (self.A_log, self.dt_bias, self.D_skip, self.norm_weight):
            gain._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self,
        u: Tensor,
        starts: Tensor,
        span: Span,
        state: State | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """u: [B, T, d], starts: bool [B or 1, T] -> SSM_k(u), SSM_v(u), each [B, T, F].

        With a state: goes on from it and updates it; padded tokens leave it as it is.
        longest: the most tokens between two starts, if that is known.
        """
        proj = self.in_proj(u)
        A = -self.A_log.float().exp()
        if state is None and self.all_heads and span.ranks is None:
            y_k, y_v = compress(
                proj,
                self.conv_weight,
                A,
                self.dt_bias,
                self.D_skip,
                starts,
                state_dim=self.state_dim,
                eps=self.norm_eps,
                mask=span.mask,
                longest=longest,
                backend=self.backend,
            )
            # The norm's gain goes into the smaller factor of the last product.
            w_k, w_v = (self.out_proj * self.norm_weight[:, None]).to(y_k.dtype).unbind(0)
            return F.linear(y_k, w_k), F.linear(y_v, w_v)
        assert state is None or isinstance(state, ScanState)
        return self.finish(*self._scan(proj, A, starts, span, state))

    def finish(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """From the scan's y and the gate z, [B, T, 2E] each, to the outputs."""
        y = gate_and_norm(y, z, self.norm_eps)
        y_k, y_v = (y * self.norm_weight.flatten().to(y.dtype)).chunk(2, -1)
        return F.linear(y_k, self.out_proj[0]), F.linear(y_v, self.out_proj[1])

    def _scan(
        self, proj: Tensor, A: Tensor, starts: Tensor, span: Span, state: ScanState | None
    ) -> tuple[Tensor, Tensor]:
        """y and z, [B, T, 2E] each, of tokens that follow a state, or other ranks'; updates it."""
        z, xbc, dt = split_projection(proj, self.state_dim, self.n_heads)
        if state is None:
            inputs = padded(xbc, span, self.conv_width - 1)
            xbc = causal_conv(inputs, self.conv_weight, starts)
        else:
            xbc = convolve(xbc, self.conv_weight, starts, span, state)
        y, h = scan_convolved(
            xbc,
            dt,
            A,
            self.dt_bias,
            self.D_skip,
            starts,
            self.state_dim,
            span.mask,
            None if state is None else state.h,
            self.backend,
            span.ranks,
        )
        if state is not None:
            state.update(h=h)
        return y, z

    def step(
        self, projected: Tensor, starts: Tensor | None, span: Span, state: ScanState
    ) -> tuple[Tensor, Tensor]:
        """One token: in_proj(u) [B, ...] -> SSM_k(u), SSM_v(u), each [B, F]; updates the state.

        starts: bool [B], None for nowhere.
        """
        weights = CompressorWeights(self.conv_weight, self.A_log, self.dt_bias, self.D_skip)
        mask = None if span.mask is None else span.mask[:, 0]
        y, h, conv = compress_step(
            projected,
            state.h,
            state.conv,
            weights,
            starts=starts,
            mask=mask,
            backend=self.backend,
        )
        state.h, state.conv = h.detach(), conv.detach()
        norm = Norm(self.norm_weight, self.norm_eps)
        k, v = thin_linear(y, self.out_proj, norm=norm, backend=self.backend).unbind(1)
        return k, v

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> ScanState:
        width = self.ssm_dim // self.n_heads
        h = torch.zeros(batch, 2 * self.n_heads, self.state_dim, width, device=device)
        conv = torch.zeros(batch, self.conv_width - 1, self.widths[1], dtype=dtype, device=device)
        return ScanState(h, conv)
