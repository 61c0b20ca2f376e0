"""Triton kernels of the compressors where states pass between tiles, backward.

As forward, but a program walks over its segment's tiles from the last to the first and holds the
gradient of the state that leaves the tile. It recomputes what the forward pass had from the state
that entered each tile, which is kept.

    gradient_along     the mean of y dy over a compressor, for the norm
    segment_gradients  what each segment's own outputs give to the state that enters it
    scan_gradients     a head's gradients, up to the convolution's outputs
    step_gradients     of steps, and of A, dt_bias and D
    sum_heads          of B and C, which heads share
    conv_gradients     through the convolution

Shapes: see the forward kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attamba.ops.chunk_scan.kernels import columns, sigmoid
from attamba.ops.compress.kernels import one_of
from attamba.ops.compress.scan.kernels import (
    VARYING,
    convolve,
    decay_from_start,
    decay_through,
    decay_to_end,
    decay_within,
    once,
    shared_at,
    state_at,
)


@triton.jit
def _slope(out, gate):
    """The derivative of SiLU, from SiLU(a) and sigmoid(a)."""
    return gate + out * (1.0 - gate)


@triton.jit
def _step_slope(dt):
    """(d dt / d raw) / dt = (1 - exp(-dt)) / dt, where dt = softplus(raw)."""
    series = 1.0 - dt * (0.5 - dt * 0.16666667)
    return tl.where(dt < 1e-2, series, (1.0 - tl.exp(-dt)) / tl.maximum(dt, 1e-2))


@triton.jit(do_not_specialize=VARYING)
def gradient_along(
    y_k, y_v, dy_k, dy_v, along, seq,
    E: tl.constexpr, R: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """along, float32 [B*T, 2]. Grid: blocks of R tokens x B x 2."""
    batch, kv = tl.program_id(1), tl.program_id(2)
    y, dy = one_of(kv, y_k, y_v), one_of(kv, dy_k, dy_v)
    token = tl.program_id(0) * R + tl.arange(0, R)
    e = tl.arange(0, EP)
    ok = token < seq
    token = batch.to(tl.int64) * seq + token
    at = token[:, None] * E + e[None, :]
    exists = columns(ok, e, E, EP)
    normed = tl.load(y + at, mask=exists, other=0.0).to(tl.float32)
    normed *= tl.load(dy + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(along + token * 2 + kv, tl.sum(normed, 1) / E, mask=ok)


@triton.jit
def _norm_gradient(y, dy, rstd, along, at, token, row, ok, exists):
    """The gradient of what was normed, float32 [Q, WP]. rstd, along: at the compressor's column."""
    factor = tl.load(rstd + (token + row) * 2, mask=ok, other=0.0)
    mean = tl.load(along + (token + row) * 2, mask=ok, other=0.0)
    normed = tl.load(y + at, mask=exists, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, mask=exists, other=0.0).to(tl.float32)
    return (grad - normed * mean[:, None]) * factor[:, None]


@triton.jit(do_not_specialize=VARYING)
def segment_gradients(
    proj, shared, cum, first, visible, y_k, y_v, dy_k, dy_v, rstd, along, own, decays,
    seq, tiles, span, stride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Grid: 2S x (m - 1) x B. Of each segment but the first: what its outputs give to the gradient
    of the state that enters it, float32 [B, m, 2S, N, W], and its factor on a later one, float32
    [B, m, 2S].
    """
    head, segment, batch = tl.program_id(0), tl.program_id(1) + 1, tl.program_id(2)
    segments = tl.num_programs(1) + 1
    kv = head // S
    y, dy = one_of(kv, y_k, y_v), one_of(kv, dy_k, dy_v)
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    DTYPE: tl.constexpr = proj.dtype.element_ty
    column = head.to(tl.int64) * (tl.num_programs(2) * tiles * Q)
    dh = tl.zeros([NP, WP], tl.float32)
    factor = 1.0
    begin, stop = segment * span, tl.minimum((segment + 1) * span, tiles)
    for index in range(begin, stop):
        tile = begin + stop - 1 - index
        here = (batch.to(tl.int64) * tiles + tile) * Q
        token = batch.to(tl.int64) * seq + tile * Q
        logs = tl.load(cum + column + here + row)
        firsts = tl.load(first + here + row)
        ok = tl.load(visible + here + row) >= 0
        through = decay_through(
            tl.load(cum + column + here + Q - 1), tl.load(first + here + Q - 1), PTX
        )
        w_exists = columns(ok, w, W, WP)
        z_at = proj + token * stride + head * W + row[:, None] * stride + w[None, :]
        z = tl.load(z_at, mask=w_exists, other=0.0).to(tl.float32)
        at = token * E + (head % S) * W + row[:, None] * E + w[None, :]
        grad = _norm_gradient(y, dy, rstd + kv, along + kv, at, token, row, ok, w_exists)
        grad *= z * sigmoid(z, PTX) * decay_from_start(logs, firsts, PTX)[:, None]
        read = shared_at(shared + token * (4 * N), kv, n, row, N) + 2 * N
        read = tl.load(read, mask=columns(ok, n, N, NP), other=0.0)
        dh *= through
        dh = tl.dot(tl.trans(read), grad.to(DTYPE), dh, input_precision=PRECISION)
        factor *= through
    at, exists = state_at(own, batch, segment, segments, head, 2 * S, N, W, NP, WP)
    tl.store(at, dh, mask=exists)
    one = (batch * segments + segment) * (2 * S) + head
    tl.store(decays + one, factor)


@triton.jit(do_not_specialize=VARYING)
def scan_gradients(
    proj, conv_weight, D, shared, dt, cum, first, visible, states, leaving,
    y_k, y_v, dy_k, dy_v, rstd, along, dproj, dconv, dshared, sums, through,
    seq, tiles, span, stride, dstride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Grid: 2S x m x B. Writes, of its head:

    dproj [B*T, width]: the columns of z.
    dconv [B*T, 2E + 4N]: the columns of x, at the convolution's output.
    dshared [S, B*T, 4N]: its share of the gradients of `shared`.
    sums, float32 [4, 2S, B, nQ], and through, float32 [B, n, 2S, N]: see step_gradients.
    leaving: float32 [B, m, 2S, N, W], gradients of the states that leave the segments; not read
    for the last one of a row. states: those that entered the tiles.
    """
    head, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv = head // S
    y, dy = one_of(kv, y_k, y_v), one_of(kv, dy_k, dy_v)
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    DTYPE: tl.constexpr = proj.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * E + 4 * N
    kind = tl.num_programs(2).to(tl.int64) * tiles * (2 * S * Q)  # from one of the sums to the next
    column = head.to(tl.int64) * (tl.num_programs(2) * tiles * Q)
    dshared += (head % S).to(tl.int64) * tl.num_programs(2) * seq * (4 * N)
    weight = conv_weight + head * W + w
    skip = tl.load(D + head).to(tl.float32)
    dh = tl.zeros([NP, WP], tl.float32)
    if segment + 1 < tl.num_programs(1):
        at, exists = state_at(
            leaving, batch, segment, tl.num_programs(1), head, 2 * S, N, W, NP, WP
        )
        dh = tl.load(at, mask=exists, other=0.0)
    begin, stop = segment * span, tl.minimum((segment + 1) * span, tiles)
    for index in range(begin, stop):
        tile = begin + stop - 1 - index
        here = (batch.to(tl.int64) * tiles + tile) * Q
        token = batch.to(tl.int64) * seq + tile * Q
        step = tl.load(dt + column + here + row)
        logs = tl.load(cum + column + here + row)
        firsts = tl.load(first + here + row)
        seen = tl.load(visible + here + row)
        total = tl.load(cum + column + here + Q - 1)
        last = tl.load(first + here + Q - 1)
        ok = seen >= 0
        n_exists, w_exists = columns(ok, n, N, NP), columns(ok, w, W, WP)
        at = proj + token * stride + head * W + row[:, None] * stride + w[None, :]
        z = tl.load(at, mask=w_exists, other=0.0).to(tl.float32)
        x = convolve(at + 2 * E, weight, seen, w, stride, CHANNELS, W, WP, TAPS)
        at = token * E + (head % S) * W + row[:, None] * E + w[None, :]
        grad = _norm_gradient(y, dy, rstd + kv, along + kv, at, token, row, ok, w_exists)
        at = shared_at(shared + token * (4 * N), kv, n, row, N)
        write = tl.load(at, mask=n_exists, other=0.0)
        read = tl.load(at + 2 * N, mask=n_exists, other=0.0)
        at, exists = state_at(states, batch, tile, tiles, head, 2 * S, N, W, NP, WP)
        state = tl.load(at, mask=exists, other=0.0)
        x_gate = sigmoid(x, PTX)
        x = once(x * x_gate, PTX)
        x_slope = once(_slope(x, x_gate), PTX)
        value = (x * step[:, None]).to(DTYPE)
        z_gate = sigmoid(z, PTX)
        z *= z_gate
        dgate = once(grad * _slope(z, z_gate), PTX)
        grad = once(grad * z, PTX)
        low = grad.to(DTYPE)

        # The outputs anew, without D x; the gate's gradient.
        decay = decay_within(logs, firsts, row, PTX)
        from_start = decay_from_start(logs, firsts, PTX)
        mixing = tl.dot(read, tl.trans(write), input_precision=PRECISION)
        mixing = (mixing * decay).to(DTYPE)
        out = tl.dot(read, state, input_precision=PRECISION) * from_start[:, None]
        out = tl.dot(mixing, value, out, input_precision=PRECISION)
        at = dproj + token * dstride + head * W + row[:, None] * dstride + w[None, :]
        tl.store(at, (dgate * (out + skip * x)).to(DTYPE), mask=w_exists)

        # Of B and C, which heads share.
        started = (grad * from_start[:, None]).to(DTYPE)
        to_end = decay_to_end(logs, row, total, last, PTX)
        low_dh = dh.to(DTYPE)
        dmixing = tl.dot(low, tl.trans(value), input_precision=PRECISION)
        dmixing = (dmixing * decay).to(DTYPE)
        dread = tl.dot(started, tl.trans(state), input_precision=PRECISION)
        dread = tl.dot(dmixing, write, dread, input_precision=PRECISION)
        ended = (value.to(tl.float32) * to_end[:, None]).to(DTYPE)
        dwrite = tl.dot(ended, tl.trans(low_dh), input_precision=PRECISION)
        dwrite = tl.dot(tl.trans(dmixing), read, dwrite, input_precision=PRECISION)
        at = shared_at(dshared + token * (4 * N), kv, n, row, N)
        tl.store(at, dwrite.to(DTYPE), mask=n_exists)
        tl.store(at + 2 * N, dread.to(DTYPE), mask=n_exists)

        # Of x, through dt x.
        pull = tl.dot(write, low_dh, input_precision=PRECISION) * to_end[:, None]
        dvalue = tl.dot(tl.trans(mixing), low, pull, input_precision=PRECISION)
        dx = (dvalue * step[:, None] + skip * low.to(tl.float32)) * x_slope
        at = dconv + token * CHANNELS + head * W + row[:, None] * CHANNELS + w[None, :]
        tl.store(at, dx.to(DTYPE), mask=w_exists)

        at = sums + column + here + row
        wide = value.to(tl.float32)
        tl.store(at, tl.sum(dvalue * wide, 1))
        tl.store(at + kind, tl.sum(out * low.to(tl.float32), 1))
        tl.store(at + 2 * kind, tl.sum(pull * wide, 1))
        tl.store(at + 3 * kind, tl.sum(grad * x, 1))
        dh *= decay_through(total, last, PTX)
        at = through + ((batch.to(tl.int64) * tiles + tile) * (2 * S) + head) * N + n
        tl.store(at, tl.sum(dh * state.to(tl.float32), 1), mask=n < N)
        dh = tl.dot(tl.trans(read), started, dh, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING)
def step_gradients(
    A, dt, visible, sums, through, dproj, dscalars, seq, tiles, dstride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, NP: tl.constexpr,
    SP: tl.constexpr,
):  # fmt: skip
    """dproj's columns of dt, and each tile's share of the gradients of A, dt_bias and D.

    sums, of each token s: of dvalue_s and (dt x)_s, where dvalue is the gradient of dt x; of the
    gradient of y_s and y_s without D x; of (dt x)_s and its gradient through the state that leaves
    the tile; of D's. through, of each row of a state: of the state that enters the tile and its
    gradient through the one that leaves. dscalars: float32 [B, n, 3, 2S]. Grid: tiles x B.
    """
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, n, head = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, SP)
    h_ok = head < 2 * S
    here = (batch.to(tl.int64) * tiles + tile) * Q
    ok = tl.load(visible + here + row) >= 0
    steps = tl.num_programs(1).to(tl.int64) * tiles * Q
    at = here + head[None, :] * steps + row[:, None]
    exists = h_ok[None, :] & (row >= 0)[:, None]
    step = tl.load(dt + at, mask=exists, other=0.0)
    dstep = tl.load(sums + at, mask=exists, other=0.0)  # dt times dt's gradient where it is alone
    risen = tl.load(sums + 2 * S * steps + at, mask=exists, other=0.0)
    ended = tl.load(sums + 4 * S * steps + at, mask=exists, other=0.0)
    dskip = tl.load(sums + 6 * S * steps + at, mask=exists, other=0.0)
    at = through + ((batch.to(tl.int64) * tiles + tile) * (2 * S) + head[:, None]) * N + n[None, :]
    dtotal = tl.sum(tl.load(at, mask=h_ok[:, None] & (n < N)[None, :], other=0.0), 1)

    # Every pair of tokens adds a term to the gradient of the later one's cum and takes it from that
    # of the earlier one. Both are made of the same rounded factors, so that they cancel in sums.
    # dlog, the gradient of log a_t, is that of all later running sums.
    dcum = risen - dstep
    dtotal += tl.sum(dcum + ended, 0)
    dlog = dtotal[None, :] - tl.cumsum(dcum, 0) + dcum
    rate = tl.load(A + head, mask=h_ok, other=0.0).to(tl.float32)
    draw = (dstep + dlog * step * rate[None, :]) * _step_slope(step)
    at = dproj + (batch.to(tl.int64) * seq + tile * Q) * dstride + (4 * E + 4 * N)
    at += row[:, None] * dstride + head[None, :]
    tl.store(at, draw.to(dproj.dtype.element_ty), mask=exists & ok[:, None])
    at = dscalars + (batch.to(tl.int64) * tiles + tile) * (6 * S) + head
    tl.store(at, tl.sum(dlog * step, 0), mask=h_ok)
    tl.store(at + 2 * S, tl.sum(draw, 0), mask=h_ok)
    tl.store(at + 4 * S, tl.sum(dskip, 0), mask=h_ok)


@triton.jit(do_not_specialize=VARYING)
def sum_heads(
    proj, conv_weight, visible, dshared, dconv,
    seq, tiles, stride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr,
    Q: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Columns of B and C of dconv, at the convolution's output. Grid: tiles x B x blocks."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, Q)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    seen = tl.load(visible + (batch.to(tl.int64) * tiles + tile) * Q + row)
    exists = columns(seen >= 0, column, 4 * N, 0)
    token = batch.to(tl.int64) * seq + tile * Q
    at = dshared + token * (4 * N) + row[:, None] * (4 * N) + column[None, :]
    grad = tl.zeros([Q, BLOCK], tl.float32)
    for _ in range(S):
        grad += tl.load(at, mask=exists, other=0.0).to(tl.float32)
        at += tl.num_programs(1).to(tl.int64) * seq * (4 * N)
    inputs = proj + token * stride + 4 * E + row[:, None] * stride + column[None, :]
    weight = conv_weight + 2 * E + column
    mixed = convolve(inputs, weight, seen, column, stride, 2 * E + 4 * N, 4 * N, 0, TAPS)
    gate = sigmoid(mixed, PTX)
    grad *= _slope(mixed * gate, gate)
    at = dconv + token * (2 * E + 4 * N) + 2 * E + row[:, None] * (2 * E + 4 * N) + column[None, :]
    tl.store(at, grad.to(dconv.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=VARYING)
def conv_gradients(
    proj, conv_weight, visible, dconv, dproj, dweight,
    seq, span, steps, stride, dstride,
    E: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, TP: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the convolution's output to its inputs: columns x, B and C of dproj.

    dweight: float32 [B, spans, TAPS, 2E + 4N], each program's share. span: tokens of one, a
    multiple of R. steps: tokens of a row in visible, nQ. Grid: column blocks x spans x B.
    """
    batch = tl.program_id(2)
    WIDTH: tl.constexpr = 2 * E + 4 * N
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, R)
    lag = tl.arange(0, TP)
    c_ok = column < WIDTH
    tap = (TAPS - 1 - lag)[:, None]
    taps_exist = (lag < TAPS)[:, None] & c_ok[None, :]
    weight = tl.load(conv_weight + tap * WIDTH + column[None, :], mask=taps_exist, other=0.0)
    weight = weight.to(tl.float32)
    sums = tl.zeros([R, TP, BLOCK], tl.float32)
    begin = tl.program_id(1) * span
    visible += batch.to(tl.int64) * steps
    for first in tl.range(begin, tl.minimum(begin + span, seq), R, num_stages=STAGES):
        token = first + row
        here = batch.to(tl.int64) * seq + first
        exists = (token < seq)[:, None] & c_ok[None, :]
        at = proj + here * stride + 2 * E + row[:, None] * stride + column[None, :]
        inputs = tl.load(at, mask=exists, other=0.0).to(tl.float32)
        # [R, TP]: the tokens `lag` later whose convolution takes this token.
        later = token[:, None] + lag[None, :]
        takes = (later < seq) & (lag < TAPS)[None, :]
        takes = takes & (tl.load(visible + later, mask=takes, other=-1) >= lag[None, :])
        at = (row[:, None] + lag[None, :])[:, :, None] * WIDTH + column[None, None, :]
        taken = takes[:, :, None] & c_ok[None, None, :]
        grad = tl.load(dconv + here * WIDTH + at, mask=taken, other=0.0).to(tl.float32)
        dinputs = tl.sum(grad * weight[None, :, :], 1)
        sums += grad * inputs[:, None, :]
        at = dproj + here * dstride + 2 * E + row[:, None] * dstride + column[None, :]
        tl.store(at, dinputs.to(dproj.dtype.element_ty), mask=exists)
    program = batch.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dweight += program * (TAPS * WIDTH) + tap * WIDTH + column[None, :]
    tl.store(dweight, tl.sum(sums, 0), mask=taps_exist)
