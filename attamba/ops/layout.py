"""How tensors lie in memory, as kernels want them."""

from __future__ import annotations

import torch
from torch import Tensor


def last_dense(t: Tensor) -> Tensor:
    """t, its last dimension without gaps; a copy where it has some."""
    return t if t.stride(-1) == 1 else t.contiguous()


def even_rows(t: Tensor) -> Tensor:
    """[B, T, C] with tokens evenly spaced in memory, over rows too; a copy where they are not."""
    even = t.stride(2) == 1 and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    # contiguous() would leave the stride of a dimension of one as it is.
    return t if even else t.clone(memory_format=torch.contiguous_format)
