"""Kernels of the rotary embedding: a row's positions applied, and the table of a decode step.

Shapes: R positions, H query heads, G key/value heads, C = D/2 frequencies; CP is C up to a power
of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(head, at, live, C: tl.constexpr):
    """Both halves of a head, float32."""
    a = tl.load(head + at, mask=live, other=0.0).to(tl.float32)
    return a, tl.load(head + at + C, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(head, at, a, b, live, C: tl.constexpr):
    tl.store(head + at, a.to(head.dtype.element_ty), mask=live)
    tl.store(head + at + C, b.to(head.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens", "positions"])
def rotate_kernel(
    q, k, v, direct, cos, sin, q_out, k_out, last_out,
    tokens, positions, q_stride, k_stride, v_stride, direct_stride,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr,
    BACK: tl.constexpr, SUMS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Heads of q and k turned by their tokens' angles; a program has BLOCK tokens.

    BACK: turned the other way, as gradients are. SUMS: direct's keys and values are added to k and
    v first, and the values' sums are last_out; going back, last_out is the gradient of direct.
    Without it there are no v, direct and last_out.

    cos, sin: float32 [positions, C]; token t has row t % positions. direct: a token's keys [G, 2C],
    then its values; SHARED: the same numbers for both. Strides: from token to token of what is
    read; what is written has no gaps.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, CP)[None, :]
    live = (token < tokens)[:, None] & (column < C)
    table = (token % positions)[:, None] * C + column
    c = tl.load(cos + table, mask=live, other=0.0)
    s = tl.load(sin + table, mask=live, other=0.0)
    if BACK:
        s = -s
    row = token.to(tl.int64)[:, None]
    D: tl.constexpr = 2 * C
    VALUES: tl.constexpr = 0 if SHARED else G * D  # from a token's keys in direct to its values
    for head in range(H):
        a, b = _halves(q + head * D, row * q_stride + column, live, C)
        to = row * (H * D) + column
        _store_halves(q_out + head * D, to, a * c - b * s, a * s + b * c, live, C)
    for head in range(G):
        a, b = _halves(k + head * D, row * k_stride + column, live, C)
        to = row * (G * D) + column
        if SUMS and not BACK:
            more_a, more_b = _halves(direct + head * D, row * direct_stride + column, live, C)
            a += more_a
            b += more_b
        turned_a, turned_b = a * c - b * s, a * s + b * c
        _store_halves(k_out + head * D, to, turned_a, turned_b, live, C)
        if SUMS:
            a, b = _halves(v + head * D, row * v_stride + column, live, C)
            if not BACK:
                at = row * direct_stride + column
                more_a, more_b = _halves(direct + VALUES + head * D, at, live, C)
                _store_halves(last_out + head * D, to, a + more_a, b + more_b, live, C)
            elif SHARED:
                _store_halves(last_out + head * D, to, a + turned_a, b + turned_b, live, C)
            else:
                to = row * (2 * G * D) + column
                _store_halves(last_out + head * D, to, turned_a, turned_b, live, C)
                _store_halves(last_out + VALUES + head * D, to, a, b, live, C)


@triton.jit
def step_table_kernel(positions, frequency, cos, sin, C: tl.constexpr, CP: tl.constexpr):
    """cos and sin, float32 [R, C], of positions times frequencies, angles in float64."""
    row = tl.program_id(0)
    column = tl.arange(0, CP)
    live = column < C
    angle = tl.load(frequency + column, mask=live, other=0.0) * tl.load(positions + row)
    tl.store(cos + row * C + column, tl.cos(angle).to(tl.float32), mask=live)
    tl.store(sin + row * C + column, tl.sin(angle).to(tl.float32), mask=live)
