"""What the code of arXiv 2411.17685 computed in the place of compressors, for studies.

It gave each token's place within its chunk to a scan that expects the number of a sequence: state
flows between tokens that have the same place in their chunks, over the whole document, and the
convolution sees one token. No chunk is compressed. The decay between two tokens counts every token
between them, as there. (There, kernels also cut states at every 256 tokens for all but the last
place, which is an accident of their tiles and not repeated.)

As a recurrence it has a state for each place, all of which decay at every token and one of which
is written and read: the scan of compressors with N R numbers in the place of N.

Shapes: B batch, T tokens, E inner width, S heads, N state, R places, F output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.modules.cache import State
from attamba.modules.compressor import Compressors
from attamba.modules.pooling import tokens_so_far
from attamba.ops import chunk_scan
from attamba.ops.chunking import Span
from attamba.ops.compress.stages import split_projection


class StridedState(State):
    """h: float32 [B, 2S, R N, E/S]; count: float32 [B, 1], tokens of the chunk so far."""

    def __init__(self, h: Tensor, count: Tensor) -> None:
        self.h, self.count = h, count


class StridedCompressors(Compressors):
    """The K and the V compressor of one layer, with the weights of Compressors."""

    def forward(
        self,
        u: Tensor,
        starts: Tensor,
        span: Span,
        state: State | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As Compressors.forward. longest: R; no chunk has more tokens."""
        assert longest is not None and (state is None or isinstance(state, StridedState))
        before = None if state is None else state.count
        count = tokens_so_far(u, starts, span, before, "torch")
        if state is not None:
            state.update(count=count[:, -1])
        place = (count[..., 0].long() - 1).clamp(0, longest - 1)
        z, xbc, dt = split_projection(self.in_proj(u), self.state_dim, self.n_heads)
        at_place = place[..., None] == torch.arange(longest, device=u.device)
        y = self._scan_places(xbc, dt, at_place, span, state)
        y = (y * F.silu(z)).unflatten(-1, (2, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm_eps) * self.norm_weight.to(y.dtype)
        k, v = torch.einsum("btce,cfe->btcf", y, self.out_proj.to(y.dtype)).unbind(2)
        return k, v

    def _scan_places(
        self, xbc: Tensor, dt: Tensor, place: Tensor, span: Span, state: StridedState | None
    ) -> Tensor:
        """From the input projection's columns and places, bool [B, T, R], to y [B, T, 2E]."""
        xbc = F.silu(xbc * self.conv_weight[:, -1].to(xbc.dtype))
        x, B, C = xbc.split([2 * self.ssm_dim, 2 * self.state_dim, 2 * self.state_dim], -1)
        B, C = (self._at_place(t, place) for t in (B, C))
        dt = F.softplus(dt.float() + self.dt_bias.float().flatten())
        if span.mask is not None:
            dt = dt * span.mask[..., None]  # no step: neither decay nor update
        y, h = chunk_scan(
            x.unflatten(-1, (2 * self.n_heads, -1)),
            dt,
            -self.A_log.float().exp().flatten(),
            B,
            C,
            span.positions == 0,
            D=self.D_skip.flatten(),
            initial_state=None if state is None else state.h,
            return_final_state=True,
            backend="reference" if self.backend == "reference" else "torch",
        )
        if state is not None:
            state.update(h=h)
        return y.flatten(2)

    def _at_place(self, t: Tensor, place: Tensor) -> Tensor:
        """B or C, [B, T, 2N], as one that is zero but at the token's place, [B, T, 2, R N]."""
        t = t.unflatten(-1, (2, 1, self.state_dim))
        return (t * place[:, :, None, :, None].to(t.dtype)).flatten(3)

    def new_places(self, batch: int, places: int, device: torch.device) -> StridedState:
        """The state before the first token. places: R."""
        width = self.ssm_dim // self.n_heads
        h = torch.zeros(batch, 2 * self.n_heads, places * self.state_dim, width, device=device)
        return StridedState(h, torch.zeros(batch, 1, device=device))
