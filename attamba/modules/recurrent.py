"""Mixers "mingru", "minlstm" and "hawk": linear recurrences of one number per channel.

    h_t = a_t h_(t-1) + b_t,   a and b made from the input alone

    minGRU     a = 1 - z,         b = z g(c)          z, c = split(W u + bias), z through a sigmoid
    minLSTM    a = f / (f + i),   b = i / (f + i) g(c)               f, i through sigmoids
    RG-LRU     a = sigmoid(Lambda)^(8 r),   b = sqrt(1 - a^2) i u    r, i through sigmoids

g(c) = c + 1/2 where c is not negative, else sigmoid(c) (arXiv 2410.01201, appendix B, whose
log-space form this is: states stay positive). minGRU and minLSTM: u = causal_conv(x), the output
is W_o h. Hawk: u = causal_conv(W_u x), the output W_o (GeLU(W_y x) * h) (arXiv 2402.19427,
section 2). The state is float32.

Shapes: B batch, T tokens, d model width, C channels of the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.mixers import HawkMixer, MinGRUMixer, MinLSTMMixer
from attamba.modules.cache import LayerCache, ScanState
from attamba.modules.convolution import CausalConv
from attamba.modules.layers import linear, trunc_normal_
from attamba.modules.mixer import TimeMixer
from attamba.ops.chunking import Span
from attamba.ops.shared_rows import carry_linear_scan

POWER = 8.0
"""c of the RG-LRU: its decay is sigmoid(Lambda)^(c r)."""

DECAYS = (0.9, 0.999)
"""Between them sigmoid(Lambda)^c is drawn, uniformly."""

LEAST = 1e-8
"""Under the root of the RG-LRU, whose slope is infinite at zero."""


class Recurrence(TimeMixer):
    """A convolution and a linear recurrence. Documents start from a state of zeros."""

    conv: CausalConv

    def __init__(self, channels: int, backend: str) -> None:
        super().__init__()
        self.channels, self.backend = channels, backend

    def recur(
        self, a: Tensor, b: Tensor, starts: Tensor, span: Span, state: ScanState | None
    ) -> Tensor:
        """States h [B, T, C] of decays a and inputs b, float32; padding leaves them as they are."""
        if span.mask is not None:
            real = span.mask[..., None]
            a, b = torch.where(real, a, 1.0), torch.where(real, b, 0.0)
        before = None if state is None else state.h
        h, last = carry_linear_scan(a, b, starts, before, self.backend, span.ranks)
        if state is not None:
            state.update(h=last)
        return h

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        h = torch.zeros(batch, self.channels, device=device)
        return LayerCache(state=ScanState(h, self.conv.new_state(batch, dtype, device)))


class MinRNN(Recurrence):
    """minGRU or minLSTM (arXiv 2410.01201), by the type of its config."""

    def __init__(self, config: MinGRUMixer | MinLSTMMixer, dim: int) -> None:
        super().__init__(config.inner(dim), config.backend)
        self.conv = CausalConv(dim, config.conv_width)
        self.parts = 3 if isinstance(config, MinLSTMMixer) else 2  # gates, then c
        self.in_proj = linear(dim, self.parts * self.channels)
        self.in_bias = nn.Parameter(torch.zeros(self.parts * self.channels))
        self.wo = linear(self.channels, dim)

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None = None, given: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, d] -> [B, T, d]. `given` ends do not concern this mixer."""
        starts, state = span.positions == 0, _state(cache)
        projected = self.in_proj(self.conv(x, starts, span, state)).float() + self.in_bias.float()
        *gates, c = projected.chunk(self.parts, -1)
        if len(gates) == 1:
            forget = -gates[0]  # 1 - sigmoid(z) = sigmoid(-z)
        else:
            f, i = gates
            forget = F.softplus(-i) - F.softplus(-f)  # f / (f + i) = sigmoid(log f - log i)
        g = torch.where(c >= 0, c + 0.5, c.sigmoid())
        h = self.recur(forget.sigmoid(), (-forget).sigmoid() * g, starts, span, state)
        return self.wo(h.to(x.dtype))


class Hawk(Recurrence):
    """Hawk's recurrent block around an RG-LRU (arXiv 2402.19427)."""

    def __init__(self, config: HawkMixer, dim: int) -> None:
        super().__init__(config.inner(dim), config.backend)
        blocks, width = config.n_blocks, self.channels // config.n_blocks
        self.in_proj = linear(dim, 2 * self.channels)
        self.conv = CausalConv(self.channels, config.conv_width)
        self.gate_weight = nn.Parameter(torch.empty(2, blocks, width, width))
        self.gate_bias = nn.Parameter(torch.zeros(2, self.channels))
        self.gate_bias._no_weight_decay = True  # type: ignore[attr-defined]
        trunc_normal_(self.gate_weight, width)
        log_a = torch.empty(self.channels).uniform_(*DECAYS).log() / POWER
        self.Lambda = nn.Parameter(log_a - torch.log(-torch.expm1(log_a)))
        self.wo = linear(self.channels, dim)

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None = None, given: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, d] -> [B, T, d]. `given` ends do not concern this mixer."""
        starts, state = span.positions == 0, _state(cache)
        y, u = self.in_proj(x).chunk(2, -1)
        u = self.conv(u, starts, span, state)
        a, b = self._steps(u, starts)
        h = self.recur(a, b, starts, span, state)
        return self.wo(F.gelu(y) * h.to(y.dtype))

    def _steps(self, u: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and inputs of the recurrence, float32 [B, T, C].

        Where a document starts, and there is no state to make room for, the input is not scaled
        down, as in the authors' code.
        """
        blocks = u.unflatten(-1, (self.gate_weight.shape[1], -1))
        gates = torch.einsum("btnw,gnwv->btgnv", blocks, self.gate_weight.to(u.dtype)).flatten(3)
        r, i = (gates.float() + self.gate_bias.float()).sigmoid().unbind(2)
        log_a = -POWER * F.softplus(-self.Lambda.float()) * r
        scale = (-torch.expm1(2 * log_a)).clamp(min=LEAST).sqrt()
        scale = torch.where(starts[..., None], 1.0, scale)
        return log_a.exp(), scale * i * u.float()


def _state(cache: LayerCache | None) -> ScanState | None:
    if cache is None:
        return None
    assert isinstance(cache.state, ScanState)
    return cache.state
