"""The second half of SwiGLU (arXiv 2002.05202): a gated product, which keeps its input alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attamba.ops.backends import choose
from attamba.ops.thin_linear.torch import product

__all__ = ["gated_product"]


def gated_product(x: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """(SiLU(a) * b) W^T, where x is [a | b].

    x: [B, T, 2F]. weight: [N, F], of x's dtype. Returns [B, T, N]. Raises ValueError for backend
    "triton" where it cannot run.

    In Triton the backward pass computes SiLU(a) * b anew, in the kernel that makes x's gradient.
    """
    if choose(backend, x.device, x.dtype) == "triton":
        from attamba.ops.swiglu.triton import gated_product_triton

        return gated_product_triton(x, weight)
    a, b = x.chunk(2, -1)
    return product(F.silu(a) * b, weight)
