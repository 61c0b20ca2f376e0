"""Norm, feed-forward, rotary positions, initialisation.

Shapes: B batch, T tokens, d model width, H heads, D width of a head.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.ops.chunking import Span
from attamba.ops.rotary import frequencies, rotary_table, rotate

__all__ = ["Linear", "RMSNorm", "Rotary", "SwiGLU", "linear", "product", "rotate", "trunc_normal_"]


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
        """Cosine and sine, float32 [B or 1, T, 1, D/2], of the span's positions."""
        key = (self.head_dim, self.theta)
        if key not in span.memo:
            span.memo[key] = self._table(span.positions)
        return span.memo[key]

    def _table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if positions.shape[1] > 1:
            return rotary_table(positions, self.head_dim, self.theta)
        # A decode step is made of small operations, and an operator's entry takes as long as three.
        frequency = _kept_frequencies(self.head_dim, self.theta, positions.device)
        angle = positions[..., None, None] * frequency
        return angle.cos().float(), angle.sin().float()


@functools.lru_cache(maxsize=64)
def _kept_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return frequencies(head_dim, theta, device)


class Linear(nn.Linear):
    """A linear map; products of few rows on a CPU go through `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias, drawn with standard deviation inputs ** -0.5."""
    layer = Linear(inputs, outputs, bias=False)
    trunc_normal_(layer.weight, inputs)
    return layer


FEW_ROWS = 4
"""So many rows, on a CPU, take as long as reading the weights does."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: [..., K], [N, K] -> [..., N].

    A decode step on a CPU is bound by reading its weights, and the library multiplies so few rows
    in one thread, from the wrong side. There W is cut into a part for each thread.
    """
    parts = math.gcd(weight.shape[0], torch.get_num_threads()) if _few_rows(x, weight) else 1
    if parts == 1:
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1]).t()
    y = torch.bmm(weight.unflatten(0, (parts, -1)), rows.expand(parts, -1, -1))
    return y.flatten(0, 1).t().reshape(*x.shape[:-1], -1)


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # a sharded weight has its own product
    )


def trunc_normal_(weight: Tensor, fan_in: int) -> None:
    """Normal of standard deviation fan_in ** -0.5, cut at three of them."""
    std = fan_in**-0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
