"""The rest of a decode step in Triton: the compressors' convolution, recurrence and gate.

Shapes: B rows, E inner width of a compressor, S heads of width W, N state, C channels of the
convolution. A P at the end: the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attamba.ops.thin_linear.kernels import let_successor_start, wait_for_predecessor


@triton.jit
def _before(conv, tap, channel, live, fresh, C: tl.constexpr, TAPS: tl.constexpr):
    """Earlier inputs of the convolution [TAPS_P, channels], float32, zero in the last place."""
    before = tl.load(
        conv + tap[:, None] * C + channel[None, :],
        mask=(tap < TAPS - 1)[:, None] & live[None, :],
        other=0.0,
    ).to(tl.float32)
    return tl.where(fresh != 0, 0.0, before)


@triton.jit
def _now(x, tap, channel, live, TAPS: tl.constexpr):
    """The new token's input in the last place [TAPS_P, channels], float32, zero elsewhere."""
    return tl.load(
        x + channel[None, :] + 0 * tap[:, None],
        mask=(tap == TAPS - 1)[:, None] & live[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _taps(weight, tap, channel, live, TAPS: tl.constexpr):
    """The convolution's weights [TAPS_P, channels], float32."""
    return tl.load(
        weight + channel[None, :] * TAPS + tap[:, None],
        mask=(tap < TAPS)[:, None] & live[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _convolved(inputs, weights):
    """SiLU of the convolution, [channels]."""
    total = tl.sum(inputs * weights, 0)
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
    projected, h, conv, conv_weight, A_log, dt_bias, D_skip, starts, mask, y,
    projected_stride, mask_stride,
    E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
    TAPS: tl.constexpr, TAPS_P: tl.constexpr, STARTS: tl.constexpr, MASK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One compressor of one row: everything from the input projection to the gate.

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

    # Constants and what the last step left, while the projection is still being made. All loads
    # come first: each waits as long as memory takes, and so they wait together.
    e = tl.arange(0, EP)
    tap = tl.arange(0, TAPS_P)
    live = e < E
    x_at = part * E + e
    head = part * S + e // W
    n = tl.arange(0, NB)
    h_row = h + ((b * 2 * S + head) * N) * W + e % W  # h: [B, 2S, N, W]
    b_at = 2 * E + part * N + n
    in_state = n < N
    state = tl.load(
        h_row[None, :] + n[:, None] * W, mask=in_state[:, None] & live[None, :], other=0.0
    )
    x_in = _before(conv_row, tap, x_at, live, fresh, C, TAPS)
    b_in = _before(conv_row, tap, b_at, in_state, fresh, C, TAPS)
    c_in = _before(conv_row, tap, b_at + 2 * N, in_state, fresh, C, TAPS)
    x_taps = _taps(conv_weight, tap, x_at, live, TAPS)
    b_taps = _taps(conv_weight, tap, b_at, in_state, TAPS)
    c_taps = _taps(conv_weight, tap, b_at + 2 * N, in_state, TAPS)
    bias = tl.load(dt_bias + head, mask=live, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head, mask=live, other=0.0).to(tl.float32))
    skip = tl.load(D_skip + head, mask=live, other=0.0).to(tl.float32)
    wait_for_predecessor(OVERLAP)
    let_successor_start(OVERLAP)  # only now: attend_step reads what has been made before

    x_in += _now(x_row, tap, x_at, live, TAPS)
    b_in += _now(x_row, tap, b_at, in_state, TAPS)
    c_in += _now(x_row, tap, b_at + 2 * N, in_state, TAPS)
    dt = bias + tl.load(row + 2 * E + C + head, mask=live, other=0.0).to(tl.float32)
    z = tl.load(row + x_at, mask=live, other=0.0).to(tl.float32)
    x = _convolved(x_in, x_taps)
    dt = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(tl.minimum(dt, 20.0))))
    decay = tl.where(fresh != 0, 0.0, tl.exp(-rate * dt))
    xdt = x * dt
    total = skip * x
    for first in tl.static_range(0, N, NB):
        if first > 0:
            n = first + tl.arange(0, NB)
            b_at = 2 * E + part * N + n
            in_state = n < N
            state = tl.load(
                h_row[None, :] + n[:, None] * W, mask=in_state[:, None] & live[None, :], other=0.0
            )
            b_in = _before(conv_row, tap, b_at, in_state, fresh, C, TAPS)
            b_in += _now(x_row, tap, b_at, in_state, TAPS)
            c_in = _before(conv_row, tap, b_at + 2 * N, in_state, fresh, C, TAPS)
            c_in += _now(x_row, tap, b_at + 2 * N, in_state, TAPS)
            b_taps = _taps(conv_weight, tap, b_at, in_state, TAPS)
            c_taps = _taps(conv_weight, tap, b_at + 2 * N, in_state, TAPS)
        kept = n < tl.where(takes, N, 0)
        into = _convolved(b_in, b_taps)
        out_of = _convolved(c_in, c_taps)
        state = state * decay[None, :] + into[:, None] * xdt[None, :]
        total += tl.sum(state * out_of[:, None], 0)
        tl.debug_barrier()
        tl.store(h_row[None, :] + n[:, None] * W, state, mask=kept[:, None] & live[None, :])
        _shift(conv_row, b_in, tap, b_at, kept, C, TAPS)
        _shift(conv_row, c_in, tap, b_at + 2 * N, kept, C, TAPS)
    _shift(conv_row, x_in, tap, x_at, e < tl.where(takes, E, 0), C, TAPS)

    gated = total * z * tl.sigmoid(z)
    tl.store(y + (b * 2 + part) * E + e, gated.to(y.dtype.element_ty), mask=live)
