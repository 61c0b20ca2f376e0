"""Rotary position embedding (arXiv 2104.09864), first half against second half."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x by its position. Computed in float32, returned in x's dtype.

    x: [..., H, D]; rotary: cosine and sine, float32 [..., 1, D/2].
    """
    cos, sin = rotary
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
