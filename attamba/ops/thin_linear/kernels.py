"""The Triton kernel of a linear map of few rows.

Shapes: R rows, P parts, K inputs, N outputs of a part.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_successor_start(OVERLAP: tl.constexpr):
    """From here on the kernel after this one may start, up to its wait_for_predecessor.

    Programmatic dependent launch. Where it stands first, kernels later in the chain hold their
    weights while this one still waits; where it stands after the wait, whoever starts knows that
    all but its predecessor have ended.
    """
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    """What comes before may run beside earlier kernels of the chain: it writes nothing, and reads
    constants alone, or what has ended for sure. After it all earlier kernels have ended."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def _weights(weight, first, n, k, K: tl.constexpr, N: tl.constexpr):
    """[BN, BK] of a matrix's rows n, its columns from `first` on."""
    exists = (n < N)[:, None] & (first + k < K)[None, :]
    return tl.load(weight + n[:, None] * K + (first + k)[None, :], mask=exists, other=0.0)


@triton.jit
def _rows(x, first, live, row, k, x_row, K: tl.constexpr):
    """[BR, BK] of the inputs."""
    exists = live[:, None] & (first + k < K)[None, :]
    return tl.load(x + row[:, None] * x_row + (first + k)[None, :], mask=exists, other=0.0)


@triton.jit
def _product(
    here, weight, total,
    BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + here weight^T. SPLIT: parts of the inputs, for warps that have no outputs of their
    own."""
    if SPLIT == 1:
        return tl.dot(here, tl.trans(weight), total, input_precision=PRECISION)
    here = tl.permute(tl.reshape(here, [BR, SPLIT, BK // SPLIT]), [1, 0, 2])
    weight = tl.permute(tl.reshape(weight, [BN, SPLIT, BK // SPLIT]), [1, 2, 0])
    return total + tl.sum(tl.dot(here, weight, input_precision=PRECISION), 0)


@triton.jit(do_not_specialize=["rows"])
def thin_linear_kernel(
    x, weight, gain, residual, out, kept_x, rows, eps, x_row, x_part, residual_row, residual_part,
    N: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, GATE: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [R, P, N]. weight: [P, N, K], or [P, 2N, K] with GATE. KEEP: the first program of
    each row stores the normed x [R, K] as kept_x (P is 1)."""
    if EARLY:
        let_successor_start(OVERLAP)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(2) * BR + tl.arange(0, BR)
    live = row < rows
    k = tl.arange(0, BK)
    HALVES: tl.constexpr = 2 if GATE else 1
    weight += part.to(tl.int64) * (HALVES * N * K)
    gain += part * K
    x += part * x_part
    w = _weights(weight, 0, n, k, K, N)
    w_up = w
    if GATE:
        w_up = _weights(weight + N * K, 0, n, k, K, N)
    wait_for_predecessor(OVERLAP)
    if not EARLY:
        let_successor_start(OVERLAP)

    exists = live[:, None] & (n < N)[None, :]
    total = tl.zeros([BR, BN], tl.float32)
    if RESIDUAL:
        at = residual + row[:, None] * residual_row + part * residual_part + n[None, :]
        total = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    squares = tl.zeros([BR], tl.float32)
    if NORM and K > BK:
        for first in range(0, K, BK):
            here = _rows(x, first, live, row, k, x_row, K).to(tl.float32)
            squares += tl.sum(here * here, 1)
    acc = tl.zeros([BR, BN], tl.float32)
    up = tl.zeros([BR, BN], tl.float32)
    for first in range(0, K, BK):
        here = _rows(x, first, live, row, k, x_row, K)
        if NORM:  # as the library does it: rounded to the inputs' dtype
            normed = here.to(tl.float32)
            if K <= BK:
                squares = tl.sum(normed * normed, 1)
            scale = tl.load(gain + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            normed = normed * tl.rsqrt(squares / K + eps)[:, None] * scale[None, :]
            here = normed.to(x.dtype.element_ty)
        if KEEP:
            kept = row < tl.where(tl.program_id(0) == 0, rows, 0)
            kept = kept[:, None] & (first + k < K)[None, :]
            tl.store(kept_x + row[:, None] * K + (first + k)[None, :], here, mask=kept)
        here = here.to(w.dtype)
        now, now_up = w, w_up
        if K > BK:  # on their way while these are multiplied
            w = _weights(weight, first + BK, n, k, K, N)
            if GATE:
                w_up = _weights(weight + N * K, first + BK, n, k, K, N)
        acc = _product(here, now, acc, BR, BN, BK, SPLIT, PRECISION)
        if GATE:
            up = _product(here, now_up, up, BR, BN, BK, SPLIT, PRECISION)
    if GATE:
        acc = acc * tl.sigmoid(acc) * up
    at = out + (row[:, None] * parts + part) * N + n[None, :]
    tl.store(at, (total + acc).to(out.dtype.element_ty), mask=exists)
