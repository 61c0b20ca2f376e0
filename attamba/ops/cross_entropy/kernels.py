"""Kernels of the cross entropy: logits are read once forward, read and written once back.

Shapes: R rows, V columns. A row is read in blocks of BLOCK columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def nats_kernel(
    logits, targets, nats, log_sum, stride, V: tl.constexpr, IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """nats and log_sum = log(sum(exp(logits))), float32 [R]; a program has a row.

    nats are NaN where there is no such target. stride: from row to row of logits.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top, total = -3.4028234663852886e38, 0.0  # finite, so that blocks of -inf alone make no NaN
    for begin in range(0, V, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        shares = tl.exp2((x - higher) * LOG2_E)
        total = total * tl.exp2((top - higher) * LOG2_E) + tl.sum(shares, 0)
        top = higher
    target = tl.load(targets + row)
    exists = (target >= 0) & (target < V)
    chosen = tl.load(logits + target, mask=exists, other=float("nan")).to(tl.float32)
    tl.store(nats + row, tl.where(target == IGNORED, 0.0, top - chosen + tl.log(total)))
    tl.store(log_sum + row, top + tl.log(total))


@triton.jit
def nats_backward_kernel(
    logits, targets, log_sum, grad, out, stride, V: tl.constexpr, IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [R, V]: the gradient of logits; grad: float32 [R], that of nats."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + column, mask=column < V, other=-float("inf")).to(tl.float32)
    target = tl.load(targets + row)
    scale = tl.where(target != IGNORED, tl.load(grad + row), 0.0)
    share = tl.exp2((x - tl.load(log_sum + row)) * LOG2_E)
    d = (share - tl.where(column == target, 1.0, 0.0)) * scale
    tl.store(out + row * V + column, d.to(out.dtype.element_ty), mask=column < V)
