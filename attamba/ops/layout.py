"""How tensors lie in memory, as kernels want them."""

from __future__ import annotations

from torch import Tensor


def last_dense(t: Tensor) -> Tensor:
    """t, its last dimension without gaps; a copy where it has some."""
    return t if t.stride(-1) == 1 else t.contiguous()
