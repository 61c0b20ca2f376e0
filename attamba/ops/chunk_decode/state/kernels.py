"""The rest of a decode step in Triton: the compressors' recurrence, norms and gates.

Shapes: B rows, E inner width of a compressor, S heads of width W, N state, C channels of the
convolution, D model width. A P at the end: the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inputs(conv, x, tap, channel, live, fresh, C: tl.constexpr, TAPS: tl.constexpr):
    """Inputs of the convolution [TAPS_P, channels], the new token's last, float32."""
    before = tl.load(
        conv + tap[:, None] * C + channel[None, :],
        mask=(tap < TAPS - 1)[:, None] & live[None, :],
        other=0.0,
    ).to(tl.float32)
    now = tl.load(
        x + channel[None, :] + 0 * tap[:, None],
        mask=(tap == TAPS - 1)[:, None] & live[None, :],
        other=0.0,
    ).to(tl.float32)
    return tl.where(fresh != 0, 0.0, before) + now


@triton.jit
def _convolved(inputs, weight, tap, channel, live, TAPS: tl.constexpr):
    """SiLU of the convolution, [channels]."""
    factor = tl.load(
        weight + channel[None, :] * TAPS + tap[:, None],
        mask=(tap < TAPS)[:, None] & live[None, :],
        other=0.0,
    )
    total = tl.sum(inputs * factor.to(tl.float32), 0)
    return total * tl.sigmoid(total)


@triton.jit
def _shift(conv, inputs, tap, channel, written, C: tl.constexpr, TAPS: tl.constexpr):
    """All inputs but the first are the next token's earlier ones."""
    tl.store(
        conv + (tap - 1)[:, None] * C + channel[None, :],
        inputs.to(conv.dtype.element_ty),
        mask=((tap > 0) & (tap < TAPS))[:, None] & written[None, :],
    )


@triton.jit(do_not_specialize=["mask_stride"])
def compress_step_kernel(
    projected,
    h,
    conv,
    conv_weight,
    A_log,
    dt_bias,
    D_skip,
    norm_weight,
    starts,
    mask,
    y,
    eps,
    projected_stride,
    mask_stride,
    E: tl.constexpr,
    EP: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    NB: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P: tl.constexpr,
    STARTS: tl.constexpr,
    MASK: tl.constexpr,
):
    """One compressor of one row: everything from the input projection to the output one.

    Several threads may hold one number, and one of them writes: so barriers part the loads of
    what is carried from token to token from its stores.
    """
    b = tl.program_id(0)
    part = tl.program_id(1)  # 0 for K, 1 for V
    C: tl.constexpr = 2 * (E + 2 * N)
    S: tl.constexpr = E // W
    takes = b >= 0
    if MASK:
        takes = tl.load(mask + b * mask_stride) != 0
    fresh = 0
    if STARTS:
        fresh = tl.load(starts + b).to(tl.int32)
    row = projected + b * projected_stride
    x_row = row + 2 * E
    conv_row = conv + b * (TAPS - 1) * C

    # All loads first: each waits as long as memory takes, and so they wait together.
    e = tl.arange(0, EP)
    tap = tl.arange(0, TAPS_P)
    live = e < E
    x_at = part * E + e
    x_in = _inputs(conv_row, x_row, tap, x_at, live, fresh, C, TAPS)
    head = part * S + e // W
    dt = tl.load(row + 2 * E + C + head, mask=live, other=0.0).to(tl.float32)
    dt += tl.load(dt_bias + head, mask=live, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head, mask=live, other=0.0).to(tl.float32))
    skip = tl.load(D_skip + head, mask=live, other=0.0).to(tl.float32)
    gain = tl.load(norm_weight + x_at, mask=live, other=0.0).to(tl.float32)
    z = tl.load(row + x_at, mask=live, other=0.0).to(tl.float32)

    x = _convolved(x_in, conv_weight, tap, x_at, live, TAPS)
    dt = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(tl.minimum(dt, 20.0))))
    decay = tl.where(fresh != 0, 0.0, tl.exp(-rate * dt))
    xdt = x * dt
    total = skip * x
    h_row = h + ((b * 2 * S + head) * N) * W + e % W  # h: [B, 2S, N, W]
    for first in tl.static_range(0, N, NB):
        n = first + tl.arange(0, NB)
        in_state = n < N
        kept = n < tl.where(takes, N, 0)
        where = h_row[None, :] + n[:, None] * W
        state = tl.load(where, mask=in_state[:, None] & live[None, :], other=0.0)
        b_at = 2 * E + part * N + n
        c_at = b_at + 2 * N
        b_in = _inputs(conv_row, x_row, tap, b_at, in_state, fresh, C, TAPS)
        c_in = _inputs(conv_row, x_row, tap, c_at, in_state, fresh, C, TAPS)
        into = _convolved(b_in, conv_weight, tap, b_at, in_state, TAPS)
        out_of = _convolved(c_in, conv_weight, tap, c_at, in_state, TAPS)
        state = state * decay[None, :] + into[:, None] * xdt[None, :]
        total += tl.sum(state * out_of[:, None], 0)
        tl.debug_barrier()
        tl.store(where, state, mask=kept[:, None] & live[None, :])
        _shift(conv_row, b_in, tap, b_at, kept, C, TAPS)
        _shift(conv_row, c_in, tap, c_at, kept, C, TAPS)
    _shift(conv_row, x_in, tap, x_at, e < tl.where(takes, E, 0), C, TAPS)

    gated = tl.where(live, total * z * tl.sigmoid(z), 0.0)
    gated = gated * tl.rsqrt(tl.sum(gated * gated, 0) / E + eps) * gain
    tl.store(y + (b * 2 + part) * E + e, gated.to(y.dtype.element_ty), mask=live)


@triton.jit
def add_norm_kernel(
    x, delta, weight, total, normed, eps, x_stride, delta_stride, D: tl.constexpr, DP: tl.constexpr
):
    """total = x + delta, normed = RMSNorm(total) weight, of one row."""
    row = tl.program_id(0)
    d = tl.arange(0, DP)
    live = d < D
    gain = tl.load(weight + d, mask=live, other=0.0).to(tl.float32)
    a = tl.load(x + row * x_stride + d, mask=live, other=0.0).to(tl.float32)
    b = tl.load(delta + row * delta_stride + d, mask=live, other=0.0).to(tl.float32)
    # As the sum is rounded for the next layer, so it is normed.
    summed = (a + b).to(total.dtype.element_ty)
    tl.store(total + row * D + d, summed, mask=live)
    summed = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(summed * summed, 0) / D + eps)
    tl.store(normed + row * D + d, (summed * scale * gain).to(normed.dtype.element_ty), mask=live)


@triton.jit
def silu_mul_kernel(both, out, both_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """out = SiLU(first half) second half, of a part of one row."""
    row = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = d < D
    gate = tl.load(both + row * both_stride + d, mask=live, other=0.0).to(tl.float32)
    up = tl.load(both + row * both_stride + D + d, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=live)
