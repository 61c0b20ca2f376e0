"""The rotary table of a decode step in Triton: one kernel for what PyTorch does in eight."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attamba.ops.rotary.kernels import step_table_kernel


def step_table_triton(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """See rotary.step_table. frequency: float64 [D/2]."""
    shape = (*positions.shape, 1, frequency.numel())
    cos, sin = (torch.empty(shape, device=positions.device) for _ in range(2))
    columns = triton.next_power_of_2(frequency.numel())
    step_table_kernel[(positions.numel(),)](
        positions.contiguous(), frequency, cos, sin, C=frequency.numel(), CP=columns, num_warps=1
    )
    return cos, sin
