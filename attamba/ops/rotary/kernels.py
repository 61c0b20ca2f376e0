"""The kernel of the rotary table of a decode step.

Shapes: R positions, C = D/2 frequencies; CP is C up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step_table_kernel(positions, frequency, cos, sin, C: tl.constexpr, CP: tl.constexpr):
    """cos and sin, float32 [R, C], of positions times frequencies, angles in float64."""
    row = tl.program_id(0)
    column = tl.arange(0, CP)
    live = column < C
    angle = tl.load(frequency + column, mask=live, other=0.0) * tl.load(positions + row)
    tl.store(cos + row * C + column, tl.cos(angle).to(tl.float32), mask=live)
    tl.store(sin + row * C + column, tl.sin(angle).to(tl.float32), mask=live)
