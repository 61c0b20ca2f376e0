"""The product of few rows in PyTorch, and in all threads of a CPU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from attamba.ops.thin_linear import Norm

FEW_ROWS = 4
"""So many rows, on a CPU, take as long as reading the weights does."""


def thin_linear_torch(
    x: Tensor, weight: Tensor, norm: Norm | None, gate: bool, residual: Tensor | None
) -> Tensor:
    """See thin_linear."""
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], eps=norm.eps) * norm.gain.to(x.dtype)
    if x.dim() == 2:
        y = product(x, weight)
    else:
        y = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    if gate:
        first, second = y.chunk(2, -1)
        y = F.silu(first) * second
    return y if residual is None else residual + y


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: [..., K], [N, K] -> [..., N], of any number of rows.

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
