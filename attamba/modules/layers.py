"""Norm, feed-forward, rotary positions, initialisation.

Shapes: B batch, T tokens, d model width, H heads, D width of a head.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.ops.chunking import Span
from attamba.ops.rotary import rotate

__all__ = ["RMSNorm", "Rotary", "SwiGLU", "linear", "rotate", "trunc_normal_"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """W2 (SiLU(W1 x) * W3 x)  (arXiv 2002.05202); W1 and W3 are one matrix."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w13 = linear(dim, 2 * hidden)
        self.w2 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), first half against second half."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, span: Span) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [B or 1, T, 1, D/2], of the span's positions.

        Angles are float64: at position 200,000 float32 would be a hundredth of a radian off.
        """
        key = (self.head_dim, self.theta)
        if key not in span.memo:
            span.memo[key] = self._table(span.positions)
        return span.memo[key]

    def _table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        # A decode step is made of small operations: there, and not under a compiler, they are kept.
        frequencies = _kept_frequencies if positions.shape[1] == 1 else _frequencies
        frequency = frequencies(self.head_dim, self.theta, positions.device)
        angle = positions[..., None, None] * frequency
        return angle.cos().float(), angle.sin().float()


def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/D), float64 [D/2]."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
    return theta ** (-exponent / head_dim)


@functools.lru_cache(maxsize=64)
def _kept_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _frequencies(head_dim, theta, device)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias, drawn with standard deviation inputs ** -0.5."""
    layer = nn.Linear(inputs, outputs, bias=False)
    trunc_normal_(layer.weight, inputs)
    return layer


def trunc_normal_(weight: Tensor, fan_in: int) -> None:
    """Normal of standard deviation fan_in ** -0.5, cut at three of them."""
    std = fan_in**-0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
