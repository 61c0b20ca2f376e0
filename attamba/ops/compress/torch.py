"""The compressors in vectorised PyTorch: convolution, scan, gate and norm one after another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attamba.ops.compress.stages import (
    causal_conv,
    gate_and_norm,
    scan_convolved,
    split_projection,
)


def compress_torch(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
    mask: Tensor | None,
    scan: str = "torch",
) -> Tensor:
    """See compress; starts is [B or 1, T]. scan: the backend of its chunk_scan."""
    heads, reach = A.shape[1], conv_weight.shape[1] - 1
    z, xbc, dt = split_projection(proj, state_dim, heads)
    xbc = causal_conv(F.pad(xbc, (0, 0, reach, 0)), conv_weight, starts)
    y, _ = scan_convolved(xbc, dt, A, dt_bias, D, starts, state_dim, mask, None, scan)
    return gate_and_norm(y, z, eps)
