"""Triton kernels of the compressors where states pass between tiles, forward.

A program owns one head of one compressor in one segment of a row. It walks over the segment's
tiles in order and holds the state. Within a tile the recurrence is a masked product, as in
Mamba-2's "state-space duality" (arXiv 2405.21060, section 6):

    y_t = sum over s <= t of t's chunk of (C_t . B_s) exp(cum_t - cum_s) dt_s x_s

where cum is the running sum of A dt since the tile began; the state that enters the tile reaches
its tokens before the first start, those since the last start make the state that leaves.

    shared_inputs     what heads share, once: convolved B and C, dt and cum, where chunks begin
    segment_states    the state that a segment's own tokens leave, where a row has several
    segment_outputs   outputs of a head, not yet normed, and the sums of their squares
    normalise         the norm over the heads of a compressor

Shapes: B batch, T tokens, E inner width, S heads, N state, W = E/S width of a head, Q tokens of a
tile, n tiles of a row, m segments; NP, WP, EP and SP are N, W, E and the number of heads filled up
to a power of two. Rows of an array are tokens. dt, cum and squares are float32 [2S, B, nQ], first
and visible int32 [B, nQ], so that tiles are aligned and whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attamba.ops.chunk_scan.kernels import chunk_begin, columns, exp2, sigmoid
from attamba.ops.compress.kernels import head_steps, one_of

VARYING = ["seq", "tiles", "span", "steps", "starts_stride"]
"""Integers whose value must not make a kernel of its own."""


@triton.jit
def once(x, PTX: tl.constexpr):
    """x, float32. Left alone, Triton computes what leads to x anew in each layout that uses it."""
    if PTX:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [x], tl.float32, is_pure=False, pack=1
        )
    return x


@triton.jit
def convolve(inputs, weight, visible, column, stride, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
             PADDED: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """The convolution at some tokens, float32 [rows, PADDED].

    inputs: pointers to the tokens' own inputs; weight: to the columns' first tap, of [TAPS,
    CHANNELS]. visible: how many tokens before each are of its chunk (up to TAPS - 1), -1 where
    there is no token.
    """
    out = tl.zeros(inputs.shape, tl.float32)
    for lag in tl.static_range(TAPS):
        w = tl.load(weight + (TAPS - 1 - lag) * CHANNELS, mask=column < WIDTH, other=0.0)
        exists = columns(visible >= lag, column, WIDTH, PADDED)
        now = tl.load(inputs - lag * stride, mask=exists, other=0.0).to(tl.float32)
        out += now * w.to(tl.float32)[None, :]
    return out


@triton.jit
def shared_at(shared, kv, column, row, N: tl.constexpr):
    """Pointers to one compressor's B of a tile; its C is 2N columns further."""
    return shared + kv * N + row[:, None] * (4 * N) + column[None, :]


@triton.jit
def state_at(states, batch, tile, tiles, head, HEADS: tl.constexpr, N: tl.constexpr,
             W: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr):  # fmt: skip
    """Pointers to one state [NP, WP] of [B, tiles, HEADS, N, W], and which elements exist."""
    n, w = tl.arange(0, NP), tl.arange(0, WP)
    one = ((batch.to(tl.int64) * tiles + tile) * HEADS + head) * (N * W)
    return states + one + n[:, None] * W + w[None, :], (n < N)[:, None] & (w < W)[None, :]


@triton.jit
def decay_within(cum, first, row, PTX: tl.constexpr):
    """[Q, Q] (t, s): the decay from token s to token t of the same chunk, zero elsewhere."""
    same = (row[None, :] >= first[:, None]) & (row[None, :] <= row[:, None])
    return exp2(tl.where(same, cum[:, None] - cum[None, :], float("-inf")), PTX)


@triton.jit
def decay_from_start(cum, first, PTX: tl.constexpr):
    """[Q]: the decay from the state that enters the tile, zero after the tile's first start."""
    return exp2(tl.where(first < 0, cum, float("-inf")), PTX)


@triton.jit
def decay_to_end(cum, row, total, last, PTX: tl.constexpr):
    """[Q]: the decay until the tile's end, zero before its last start."""
    return exp2(tl.where(row >= last, total - cum, float("-inf")), PTX)


@triton.jit
def decay_through(total, last, PTX: tl.constexpr):
    """The tile's factor on the state that enters it."""
    return exp2(tl.where(last < 0, total, float("-inf")), PTX)


@triton.jit
def _reach(starts, token, seq, TAPS: tl.constexpr):
    """How many tokens before each are of its chunk, up to TAPS - 1; -1 where there is no token."""
    ok = token < seq
    seen = tl.where(ok, 0, -1)
    flag = tl.load(starts + token, mask=ok, other=1)
    same = (flag == 0) & (token > 0)
    for lag in tl.static_range(1, TAPS):
        seen += same.to(tl.int32)
        flag = tl.load(starts + token - lag, mask=same, other=1)
        same = (flag == 0) & (token > lag)
    return seen


@triton.jit
def _store_steps(raw, A, dt_bias, dt, cum, row, ok, steps, stride, HEADS: tl.constexpr,
                 HP: tl.constexpr):  # fmt: skip
    """Writes dt and cum of a tile, [HEADS, Q] with rows of `steps`."""
    head = tl.arange(0, HP)
    raw += row[:, None] * stride + head[None, :]
    _, step, total = head_steps(raw, A, dt_bias, ok, head, HEADS)
    at = head[None, :].to(tl.int64) * steps + row[:, None]
    exists = (head < HEADS)[None, :] & (row >= 0)[:, None]
    tl.store(dt + at, step, mask=exists)
    tl.store(cum + at, total, mask=exists)


@triton.jit(do_not_specialize=VARYING)
def shared_inputs(
    proj, conv_weight, A, dt_bias, starts, shared, dt, cum, first, visible,
    seq, tiles, starts_stride, stride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr,
    Q: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid: tiles x B x blocks of columns. Writes

    shared [B*T, 4N]: B and C of both compressors, convolved, SiLU of it.
    dt, cum: steps, and the running sums of log2 a_t since the tile began.
    first: see chunk_begin. visible: see convolve.
    """
    tile, batch = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, Q)
    token = tile * Q + row
    ok = token < seq
    starts += batch.to(tl.int64) * starts_stride
    begin = batch.to(tl.int64) * seq + tile * Q
    proj += begin * stride + 4 * E
    seen = _reach(starts, token, seq, TAPS)
    if tl.program_id(2) == 0:
        here = (batch.to(tl.int64) * tiles + tile) * Q
        tl.store(visible + here + row, seen)
        tl.store(first + here + row, chunk_begin(starts, tile * Q, ok, Q))
        steps = tl.num_programs(1).to(tl.int64) * tiles * Q
        _store_steps(
            proj + 4 * N, A, dt_bias, dt + here, cum + here, row, ok, steps, stride, 2 * S, SP
        )
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inputs = proj + row[:, None] * stride + column[None, :]
    weight = conv_weight + 2 * E + column
    mixed = convolve(inputs, weight, seen, column, stride, 2 * E + 4 * N, 4 * N, 0, TAPS)
    mixed *= sigmoid(mixed, PTX)
    at = shared + begin * (4 * N) + row[:, None] * (4 * N) + column[None, :]
    tl.store(at, mixed.to(shared.dtype.element_ty), mask=columns(ok, column, 4 * N, 0))


@triton.jit(do_not_specialize=VARYING)
def segment_states(
    proj, conv_weight, shared, dt, cum, first, visible, own, decays,
    seq, tiles, span, stride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Grid: 2S x (m - 1) x B. Of each segment but the last: the state that its own tokens leave,
    float32 [B, m, 2S, N, W], and the factor on an older one, float32 [B, m, 2S]. span: tiles of a
    segment.
    """
    head, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segments = tl.num_programs(1) + 1
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    DTYPE: tl.constexpr = proj.dtype.element_ty
    column = head.to(tl.int64) * (tl.num_programs(2) * tiles * Q)
    weight = conv_weight + head * W + w
    h = tl.zeros([NP, WP], tl.float32)
    factor = 1.0
    for tile in range(segment * span, tl.minimum((segment + 1) * span, tiles)):
        here = (batch.to(tl.int64) * tiles + tile) * Q
        token = batch.to(tl.int64) * seq + tile * Q
        step = tl.load(dt + column + here + row)
        logs = tl.load(cum + column + here + row)
        seen = tl.load(visible + here + row)
        total = tl.load(cum + column + here + Q - 1)
        last = tl.load(first + here + Q - 1)
        at = proj + token * stride + (2 * E + head * W) + row[:, None] * stride + w[None, :]
        x = convolve(at, weight, seen, w, stride, 2 * E + 4 * N, W, WP, TAPS)
        x *= sigmoid(x, PTX)
        value = x * (step * decay_to_end(logs, row, total, last, PTX))[:, None]
        write = shared_at(shared + token * (4 * N), head // S, n, row, N)
        write = tl.load(write, mask=columns(seen >= 0, n, N, NP), other=0.0)
        through = decay_through(total, last, PTX)
        h *= through
        h = tl.dot(tl.trans(write), value.to(DTYPE), h, input_precision=PRECISION)
        factor *= through
    at, exists = state_at(own, batch, segment, segments, head, 2 * S, N, W, NP, WP)
    tl.store(at, h, mask=exists)
    one = (batch * segments + segment) * (2 * S) + head
    tl.store(decays + one, factor)


@triton.jit(do_not_specialize=VARYING)
def segment_outputs(
    proj, conv_weight, D, shared, dt, cum, first, visible, entering, y_k, y_v, squares, states,
    seq, tiles, span, stride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Grid: 2S x m x B. y_k and y_v [B*T, E], gated but not normed; each head's squares.

    entering: float32 [B, m, 2S, N, W], not read where a row is one segment, as states begin at
    zero. KEEP: write the states that enter the tiles, [B, n, 2S, N, W].
    """
    head, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    y = one_of(head // S, y_k, y_v)
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    DTYPE: tl.constexpr = proj.dtype.element_ty
    column = head.to(tl.int64) * (tl.num_programs(2) * tiles * Q)
    weight = conv_weight + head * W + w
    skip = tl.load(D + head).to(tl.float32)
    h = tl.zeros([NP, WP], tl.float32)
    if segment > 0:
        at, exists = state_at(
            entering, batch, segment, tl.num_programs(1), head, 2 * S, N, W, NP, WP
        )
        h = tl.load(at, mask=exists, other=0.0)
    for tile in range(segment * span, tl.minimum((segment + 1) * span, tiles)):
        here = (batch.to(tl.int64) * tiles + tile) * Q
        token = batch.to(tl.int64) * seq + tile * Q
        step = tl.load(dt + column + here + row)
        logs = tl.load(cum + column + here + row)
        firsts = tl.load(first + here + row)
        seen = tl.load(visible + here + row)
        total = tl.load(cum + column + here + Q - 1)
        last = tl.load(first + here + Q - 1)
        n_exists, w_exists = columns(seen >= 0, n, N, NP), columns(seen >= 0, w, W, WP)
        z_at = proj + token * stride + head * W + row[:, None] * stride + w[None, :]
        z = tl.load(z_at, mask=w_exists, other=0.0).to(tl.float32)
        gate = z * sigmoid(z, PTX)
        write_at = shared_at(shared + token * (4 * N), head // S, n, row, N)
        write = tl.load(write_at, mask=n_exists, other=0.0)
        read = tl.load(write_at + 2 * N, mask=n_exists, other=0.0)
        x = convolve(z_at + 2 * E, weight, seen, w, stride, 2 * E + 4 * N, W, WP, TAPS)
        x = once(x * sigmoid(x, PTX), PTX)
        value = x * step[:, None]

        low_h = h.to(DTYPE)
        if KEEP:
            at, exists = state_at(states, batch, tile, tiles, head, 2 * S, N, W, NP, WP)
            tl.store(at, low_h, mask=exists)
        mixing = tl.dot(read, tl.trans(write), input_precision=PRECISION)
        mixing *= decay_within(logs, firsts, row, PTX)
        out = tl.dot(read, low_h, input_precision=PRECISION)
        out *= decay_from_start(logs, firsts, PTX)[:, None]
        out = tl.dot(mixing.to(DTYPE), value.to(DTYPE), out, input_precision=PRECISION)
        out = (out + skip * x) * gate
        tl.store(squares + column + here + row, tl.sum(out * out, 1))
        at = y + token * E + (head % S) * W + row[:, None] * E + w[None, :]
        tl.store(at, out.to(DTYPE), mask=w_exists)

        value *= decay_to_end(logs, row, total, last, PTX)[:, None]
        h *= decay_through(total, last, PTX)
        h = tl.dot(tl.trans(write), value.to(DTYPE), h, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING)
def normalise(
    y_k, y_v, squares, rstd, seq, steps, eps,
    E: tl.constexpr, S: tl.constexpr, R: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """y_k and y_v in place, and the norm's factors rstd [B*T, 2]. Grid: blocks of R tokens x B x 2.

    steps: tokens of a row in squares, nQ.
    """
    batch, kv = tl.program_id(1), tl.program_id(2)
    y = one_of(kv, y_k, y_v)
    token = tl.program_id(0) * R + tl.arange(0, R)
    e, head = tl.arange(0, EP), tl.arange(0, SP)
    ok = token < seq
    column = (kv * S + head).to(tl.int64) * tl.num_programs(1) + batch
    at = squares + column[None, :] * steps + token[:, None]
    each = tl.load(at, mask=ok[:, None] & (head < S)[None, :], other=0.0)
    factor = 1.0 / tl.sqrt(tl.sum(each, 1) / E + eps)
    token = batch.to(tl.int64) * seq + token
    tl.store(rstd + token * 2 + kv, factor, mask=ok)
    at = y + token[:, None] * E + e[None, :]
    exists = columns(ok, e, E, EP)
    out = tl.load(at, mask=exists, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(at, out.to(y.dtype.element_ty), mask=exists)
