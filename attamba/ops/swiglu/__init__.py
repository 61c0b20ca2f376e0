"""The second half of SwiGLU (arXiv 2002.05202): a gated product, which keeps its input alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attamba.ops.backends import choose
from attamba.ops.thin_linear.torch import product

__all__ = ["gated_product"]


def gated_product(x: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """(SiLU(a) * b) W^T, where x is [a | b].

    x: [B, T, 2F]. weight: [N, F], of x's dtype. Returns [B, T, N]. Raises ValueError where
    shapes disagree, and for backend "triton" where it cannot run.

    In Triton the backward pass computes SiLU(a) * b anew, in the kernel that makes x's gradient.
    """
    _check(x, weight)
    if choose(backend, x.device, x.dtype) == "triton":
        from attamba.ops.swiglu.triton import gated_product_triton

        return gated_product_triton(x, weight)
    a, b = x.chunk(2, -1)
    return product(F.silu(a) * b, weight)


def _check(x: Tensor, weight: Tensor) -> None:
    """The kernels would leave out the last column of an odd width without a word."""
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(
            f"x has shape {list(x.shape)}; it must be [B, T, 2F], whose last width is even"
        )
    half = x.shape[2] // 2
    if weight.dim() != 2 or weight.shape[1] != half:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [N, {half}] "
            f"for x of shape {list(x.shape)}"
        )
