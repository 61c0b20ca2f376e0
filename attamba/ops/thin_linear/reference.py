"""The product of few rows in plain float32, one part after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attamba.ops.thin_linear import Norm


def thin_linear_reference(
    x: Tensor, weight: Tensor, norm: Norm | None, gate: bool, residual: Tensor | None
) -> Tensor:
    """See thin_linear."""
    if x.dim() == 2:
        gain = None if norm is None else norm.gain
        out = _one(x, weight, gain, norm, gate)
    else:
        parts = []
        for p in range(x.shape[1]):
            gain = None if norm is None else norm.gain[p]
            parts.append(_one(x[:, p], weight[p], gain, norm, gate))
        out = torch.stack(parts, 1)
    return (out if residual is None else out + residual.float()).to(x.dtype)


def _one(x: Tensor, weight: Tensor, gain: Tensor | None, norm: Norm | None, gate: bool) -> Tensor:
    x = x.float()
    if norm is not None and gain is not None:
        x = x / ((x * x).mean(1, keepdim=True) + norm.eps).sqrt() * gain.float()
    y = x @ weight.float().t()
    if gate:
        first, second = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
        y = first / (1 + torch.exp(-first)) * second
    return y
