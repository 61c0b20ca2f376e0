"""Kernels of SiLU(a) * b, where a row of x is [a | b].

Shapes: R rows, F width of a and of b. A program has ROWS rows and COLUMNS columns of both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's rows, columns, and which of them there are."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < F)


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    x, out, rows, stride, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out [R, F] of x [R, 2F]. stride: from row to row of x."""
    row, column, live = _place(rows, F, ROWS, COLUMNS)
    at = x + row * stride + column
    a = tl.load(at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(at + F, mask=live, other=0.0).to(tl.float32)
    gated = a * tl.sigmoid(a) * b
    tl.store(out + row * F + column, gated.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows"])
def gate_backward_kernel(
    x, grad, out, dx, rows, stride, grad_stride,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out once more, and dx [R, 2F] of its gradient [R, F]."""
    row, column, live = _place(rows, F, ROWS, COLUMNS)
    at = x + row * stride + column
    a = tl.load(at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(at + F, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=live, other=0.0).to(tl.float32)
    gate = tl.sigmoid(a)
    silu = a * gate
    DTYPE: tl.constexpr = out.dtype.element_ty
    tl.store(out + row * F + column, (silu * b).to(DTYPE), mask=live)
    to = dx + row * (2 * F) + column
    tl.store(to, (g * b * (gate + silu * (1.0 - gate))).to(DTYPE), mask=live)
    tl.store(to + F, (g * silu).to(DTYPE), mask=live)
