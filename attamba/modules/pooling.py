"""Rivals of the state-space compressors: the tokens of a chunk so far, pooled.

    mean     (u_s + ... + u_t) / (t - s + 1)                 for a chunk that starts at s
    gated    RMSNorm(w_s c_s + ... + w_t c_t),   c = W_c u,
             w = softmax over s..t of (W_g u + bias of the place in the chunk), channel by channel

The gated one is the pooling of DeepSeek-V4's compressed attention (kv_proj, gate_proj,
position_bias and kv_norm of `DeepseekV4HCACompressor` in transformers 5.23), which it computes for
whole windows. Here each token pools what its chunk has so far, so nothing looks ahead and the
value at a chunk's last token is that of the whole chunk. A softmax that goes on is a recurrence:
with m_t the largest score so far,

    num_t = exp(m_(t-1) - m_t) num_(t-1) + exp(score_t - m_t) c_t     and den_t likewise with 1.

Shapes: B batch, T tokens, d model width, F output width, R places with a bias of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.modules.cache import State
from attamba.modules.layers import linear
from attamba.ops import linear_scan
from attamba.ops.chunking import Span

LOWEST = -1e30
"""The score of padding: finite, so that the difference of two of them is a number."""


class MeanState(State):
    """total: float32 [B, d], the sum of the chunk's inputs; count: float32 [B, 1], their number."""

    def __init__(self, total: Tensor, count: Tensor) -> None:
        self.total, self.count = total, count


class GatedState(State):
    """top, num, den: float32 [B, 2F], see above; count: float32 [B, 1], the chunk's tokens so far.

    The halves are those of K and of V.
    """

    def __init__(self, top: Tensor, num: Tensor, den: Tensor, count: Tensor) -> None:
        self.top, self.num, self.den, self.count = top, num, den, count


class MeanPooling(nn.Module):
    """Each token's chunk so far as its mean. It has no weights."""

    def __init__(self, dim: int, backend: str) -> None:
        super().__init__()
        self.dim, self.backend = dim, backend

    def forward(self, u: Tensor, starts: Tensor, span: Span, state: State | None = None) -> Tensor:
        """u: [B, T, d], starts: bool [B or 1, T] -> [B, T, d].

        With a state: goes on from it and updates it; padded tokens leave it as it is.
        """
        assert state is None or isinstance(state, MeanState)
        ones = _ones(u, span)
        inputs = torch.cat([u.float() * ones, ones], -1)
        before = None if state is None else torch.cat([state.total, state.count], -1)
        sums = linear_scan(torch.ones_like(inputs), inputs, starts, before, backend=self.backend)
        assert isinstance(sums, Tensor)
        total, count = sums.split([self.dim, 1], -1)
        if state is not None:
            state.update(total=total[:, -1], count=count[:, -1])
        return (total / count.clamp(min=1.0)).to(u.dtype)

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> MeanState:
        total = torch.zeros(batch, self.dim, device=device)
        return MeanState(total, torch.zeros(batch, 1, device=device))


class GatedPooling(nn.Module):
    """Each token's chunk so far as a softmax-gated sum, for K and for V.

    places: R; tokens after the first R of a chunk share the last place's bias.
    """

    def __init__(self, dim: int, out_dim: int, places: int, norm_eps: float, backend: str) -> None:
        super().__init__()
        self.out_dim, self.norm_eps, self.backend = out_dim, norm_eps, backend
        self.in_proj = linear(dim, 4 * out_dim)  # c of K and V, then scores of K and V
        self.position_bias = nn.Parameter(torch.zeros(places, 2 * out_dim))
        self.norm_weight = nn.Parameter(torch.ones(2, out_dim))
        for parameter in (self.position_bias, self.norm_weight):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self,
        u: Tensor,
        starts: Tensor,
        span: Span,
        state: State | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """u: [B, T, d], starts: bool [B or 1, T] -> what is added to keys and values, [B, T, F].

        With a state: goes on from it and updates it; padded tokens leave it as it is.
        longest: the most tokens between two starts, if that is known.
        """
        assert state is None or isinstance(state, GatedState)
        c, score = self.in_proj(u).float().chunk(2, -1)
        counted = None if state is None else state.count
        count = tokens_so_far(u, starts, span, counted, self.backend)
        place = (count[..., 0].long() - 1).clamp(0, self.position_bias.shape[0] - 1)
        score = score + self.position_bias.float()[place]
        if span.mask is not None:
            score = score.masked_fill(~span.mask[..., None], LOWEST)
        top_before = score[:, 0].detach() if state is None else state.top
        top = running_max(score.detach(), starts, None if state is None else top_before, longest)
        previous = torch.cat([top_before[:, None], top[:, :-1]], 1)
        decay = (previous - top).clamp(max=0.0).exp()
        weight = (score - top).exp()
        before = None if state is None else torch.cat([state.num, state.den], -1)
        inputs, decays = torch.cat([weight * c, weight], -1), torch.cat([decay, decay], -1)
        sums = linear_scan(decays, inputs, starts, before, backend=self.backend)
        assert isinstance(sums, Tensor)
        num, den = sums.chunk(2, -1)
        if state is not None:
            state.update(top=top[:, -1], num=num[:, -1], den=den[:, -1], count=count[:, -1])
        return self._normed(num / den.clamp(min=torch.finfo(torch.float32).tiny), u.dtype)

    def _normed(self, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pooled = self.norm(pooled.unflatten(-1, (2, -1)))
        k, v = (pooled * self.norm_weight.float()).to(dtype).unbind(-2)
        return k, v

    def norm(self, pooled: Tensor) -> Tensor:
        return F.rms_norm(pooled, (self.out_dim,), eps=self.norm_eps)

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> GatedState:
        top, num, den = (torch.zeros(batch, 2 * self.out_dim, device=device) for _ in range(3))
        return GatedState(top, num, den, torch.zeros(batch, 1, device=device))


def tokens_so_far(
    u: Tensor, starts: Tensor, span: Span, before: Tensor | None, backend: str
) -> Tensor:
    """Tokens of the chunk so far, the current one included, float32 [B, T, 1].

    before: [B, 1], those of the chunk that goes on from before the first token. backend: of the
    scan. Padding counts nothing.
    """
    ones = _ones(u, span)
    count = linear_scan(torch.ones_like(ones), ones, starts, before, backend=backend)
    assert isinstance(count, Tensor)
    return count


def running_max(
    x: Tensor, starts: Tensor, initial: Tensor | None = None, longest: int | None = None
) -> Tensor:
    """The largest value of each channel in the chunk so far, [B, T, C]; without gradients.

    initial: [B, C], that of the chunk that goes on from before the first token. By doubling: in
    each round a token learns what the token so many places before it knows.
    """
    segment = starts.long().cumsum(1)
    if initial is not None:
        goes_on = (segment == 0)[..., None]
        x = torch.where(goes_on, torch.maximum(x, initial[:, None]), x)
    reach = x.shape[1] if longest is None else min(longest, x.shape[1])
    distance = 1
    while distance < reach:
        same = (segment[:, distance:] == segment[:, :-distance])[..., None]
        now = x[:, distance:]
        now = torch.where(same, torch.maximum(now, x[:, :-distance]), now)
        x = torch.cat([x[:, :distance], now], 1)
        distance *= 2
    return x


def _ones(u: Tensor, span: Span) -> Tensor:
    """1 for each token and 0 for padding, float32 [B, T, 1]."""
    if span.mask is not None:
        return span.mask[..., None].float()
    return u.new_ones(*u.shape[:2], 1, dtype=torch.float32)
