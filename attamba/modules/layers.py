"""Norm, feed-forward, rotary positions, initialisation.

Shapes: B batch, T tokens, d model width, H heads, D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.ops.backends import choose
from attamba.ops.chunking import Span
from attamba.ops.rotary import rotary_table, step_table
from attamba.ops.swiglu import gated_product
from attamba.ops.thin_linear import Norm, thin_linear
from attamba.ops.thin_linear.torch import product

__all__ = [
    "Linear",
    "RMSNorm",
    "Rotary",
    "SwiGLU",
    "linear",
    "plain",
    "product",
    "trunc_normal_",
]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def before(self) -> Norm:
        """The norm as a part of the product that follows."""
        return Norm(self.weight, self.eps)


class SwiGLU(nn.Module):
    """W2 (SiLU(W1 x) * W3 x)  (arXiv 2002.05202); W1 and W3 are one matrix."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w13 = linear(dim, 2 * hidden)
        self.w2 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        both = self.w13(x)
        fits = both.dim() == 3 and type(self.w2.weight) in (Tensor, nn.Parameter)
        if fits and plain(self.w2) and choose("auto", both.device, both.dtype) == "triton":
            return gated_product(both, self.w2.weight.to(both.dtype))
        gate, up = both.chunk(2, -1)
        return self.w2(F.silu(gate) * up)

    def step(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x + self(norm(x)) of one token per row in kernels, [B, 1, d]."""
        if not plain(norm, self.w13, self.w2):
            return x + self(norm(x))
        assert isinstance(norm, RMSNorm)
        rows = x[:, 0]
        hidden = thin_linear(rows, self.w13.weight, norm=norm.before(), gate=True, backend="triton")
        return thin_linear(hidden, self.w2.weight, residual=rows, backend="triton")[:, None]


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
        table = rotary_table if positions.shape[1] > 1 else step_table
        return table(positions, self.head_dim, self.theta)


class Linear(nn.Linear):
    """A linear map; products of few rows on a CPU go through `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias, drawn with standard deviation inputs ** -0.5."""
    layer = Linear(inputs, outputs, bias=False)
    trunc_normal_(layer.weight, inputs)
    return layer


def plain(*layers: nn.Module) -> bool:
    """Do these layers' weights say all that they do?

    Not so where an adapter took their place, or something waits for what goes through them.
    """
    return all(type(layer) in (Linear, RMSNorm) and not _watched(layer) for layer in layers)


def _watched(layer: nn.Module) -> bool:
    """Has the layer hooks, or a forward of its own in place of its class's?"""
    forward = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return bool(forward or layer._backward_hooks or layer._backward_pre_hooks)


def trunc_normal_(weight: Tensor, fan_in: int) -> None:
    """Normal of standard deviation fan_in ** -0.5, cut at three of them."""
    std = fan_in**-0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
