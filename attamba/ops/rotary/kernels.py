"""The rotary table of a decode step in Triton: one kernel for what PyTorch does in eight.

Shapes: R positions, C = D/2 frequencies; CP is C up to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def step_table_triton(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """See rotary.step_table. frequency: float64 [D/2]."""
    shape = (*positions.shape, 1, frequency.numel())
    cos, sin = (torch.empty(shape, device=positions.device) for _ in range(2))
    columns = triton.next_power_of_2(frequency.numel())
    step_table_kernel[(positions.numel(),)](
        positions.contiguous(), frequency, cos, sin, C=frequency.numel(), CP=columns, num_warps=1
    )
    return cos, sin


@triton.jit
def step_table_kernel(positions, frequency, cos, sin, C: tl.constexpr, CP: tl.constexpr):
    """cos and sin, float32 [R, C], of positions times frequencies, angles in float64."""
    row = tl.program_id(0)
    column = tl.arange(0, CP)
    live = column < C
    angle = tl.load(frequency + column, mask=live, other=0.0) * tl.load(positions + row)
    tl.store(cos + row * C + column, tl.cos(angle).to(tl.float32), mask=live)
    tl.store(sin + row * C + column, tl.sin(angle).to(tl.float32), mask=live)
