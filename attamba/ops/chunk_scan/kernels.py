"""Triton kernels of the scan, for chunks of any length: states pass between tiles of Q tokens.

Forward: each tile's own final state (tile_states), the states that enter the tiles
(pass_states), the outputs (tile_outputs). Backward: states again, the gradient that each tile
gives to the state entering it (tile_state_gradients), those passed backwards (pass_states), and
a tile's gradients, head by head (tile_gradients) and for B and C, which heads share
(tile_shared_gradients). Within a tile the recurrence is a masked product, as
in Mamba-2's "state-space duality" (arXiv 2405.21060, section 6):

    y_t = sum over s <= t of t's chunk of (C_t . B_s) exp(cum_t - cum_s) dt_s x_s

where cum is the running sum of A dt; the state that enters reaches the tokens before the tile's
first start, and the tokens since its last start make the state that leaves.

Shapes: B batch, T tokens, S heads, K groups of R heads, N state, W width of a head, n tiles of Q
tokens; NP and WP are N and W filled up to what a matrix product takes. Arrays of states are
float32 [B, n, S, N, W].
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = ["seq", "tiles", "x_b", "dt_b", "b_b", "c_b", "starts_b"]
"""Integers whose value must not make a kernel of its own."""


@triton.jit
def chunk_begin(starts, begin, ok, Q: tl.constexpr):
    """For each token of a tile the row at which its chunk begins, or -1 if before the tile."""
    row = tl.arange(0, Q)
    flag = tl.load(starts + begin + row, mask=ok, other=0) != 0
    earlier = (row[None, :] <= row[:, None]) & flag[None, :]
    return tl.max(tl.where(earlier, row[None, :], -1), 1)


@triton.jit
def columns(ok, column, width: tl.constexpr, padded: tl.constexpr):
    """Which elements of a [rows, padded] tile exist."""
    exists = ok[:, None]
    if width != padded:
        exists = exists & (column < width)[None, :]
    return exists


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2^x; in PTX one instruction, in which what is below the smallest normal number is zero."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        out = tl.exp2(x)
    return out


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """1 / (1 + exp(-x)); in PTX with a reciprocal that is one instruction."""
    if PTX:
        out = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + exp2(x * -1.4426950408889634, PTX)],
            tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        out = tl.sigmoid(x)
    return out


@triton.jit
def _running_sum(dt, A, token, ok, head, dt_t, dt_s):
    """dt and the running sum of A dt, float32 [Q]; no step past the end."""
    at = dt + token * dt_t + tl.cast(head, tl.int64) * dt_s
    step = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    return step, tl.cumsum(step * tl.load(A + head).to(tl.float32), 0)


@triton.jit
def _decay(cum, first, Q: tl.constexpr):
    """[Q, Q] (t, s): the decay from token s to token t of the same chunk, zero elsewhere."""
    row = tl.arange(0, Q)
    same = (row[None, :] >= first[:, None]) & (row[None, :] <= row[:, None])
    return tl.exp(tl.where(same, cum[:, None] - cum[None, :], float("-inf")))


@triton.jit
def _from_start(cum, first):
    """[Q]: the decay from the state that enters the tile, zero after the tile's first start."""
    return tl.exp(tl.where(first < 0, cum, float("-inf")))


@triton.jit
def _state_at(states, batch, tile, tiles, head, S: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
              n, w):  # fmt: skip
    """Pointers to one state [NP, WP]."""
    index = ((batch.to(tl.int64) * tiles + tile) * S + head) * (N * W)
    return states + index + n[:, None] * W + w[None, :]


@triton.jit(do_not_specialize=VARYING)
def tile_states(
    x, dt, A, B, starts, states, decays,
    seq, tiles, x_b, dt_b, b_b, starts_b, x_t, x_s, dt_t, dt_s, b_t, b_k,
    S: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each tile: the state that its own tokens leave, and the factor [B, n, S] on an older."""
    tile, group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = tile * Q
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    ok = begin + row < seq
    token = begin + row.to(tl.int64)
    x += batch.to(tl.int64) * x_b
    dt += batch.to(tl.int64) * dt_b
    B += batch.to(tl.int64) * b_b + group * b_k
    first = chunk_begin(starts + batch.to(tl.int64) * starts_b, begin, ok, Q)
    last = tl.max(first, 0)
    exists = columns(ok, n, N, NP)
    write = tl.load(B + token[:, None] * b_t + n[None, :], mask=exists, other=0.0)
    for head in range(group * (S // K), (group + 1) * (S // K)):
        step, cum = _running_sum(dt, A, token, ok, head, dt_t, dt_s)
        total = tl.sum(tl.where(row == Q - 1, cum, 0.0), 0)
        to_end = tl.exp(tl.where(row >= last, total - cum, float("-inf"))) * step
        at = x + token[:, None] * x_t + tl.cast(head, tl.int64) * x_s + w[None, :]
        value = tl.load(at, mask=columns(ok, w, W, WP), other=0.0)
        value = (value.to(tl.float32) * to_end[:, None]).to(write.dtype)
        state = tl.dot(tl.trans(write), value, input_precision=PRECISION)
        out = _state_at(states, batch, tile, tiles, head, S, N, W, n, w)
        tl.store(out, state, mask=(n < N)[:, None] & (w < W)[None, :])
        decay = tl.where(last < 0, tl.exp(total), 0.0)
        tl.store(decays + (batch.to(tl.int64) * tiles + tile) * S + head, decay)


@triton.jit
def _compose(decay, state, next_decay, next_state):
    """One step of h -> decay h + state after another."""
    return decay * next_decay, state * next_decay + next_state


@triton.jit(do_not_specialize=VARYING)
def pass_states(
    own, decays, before, entering, after, tiles,
    S: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """h_i = decay_i h_(i-1) + own_i from tile to tile, GROUP tiles at once. SIZE = N * W.

    Writes the h that enters each tile and the last one. BACKWARDS goes from the last tile to the
    first: the gradients of the states that leave the tiles.
    """
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, GROUP)
    ok = at < SIZE
    batch, head = tl.program_id(0) // S, tl.program_id(0) % S
    one = (batch.to(tl.int64) * S + head) * SIZE + at
    state = tl.load(before + one, mask=ok, other=0.0)
    base = batch.to(tl.int64) * tiles
    start = (base + (tiles - 1 if BACKWARDS else 0)) * S + head
    tl.store(entering + start * SIZE + at, state, mask=ok)
    for group in range(tl.cdiv(tiles, GROUP)):
        step = group * GROUP + row
        tile = tiles - 1 - step if BACKWARDS else step
        exists = (step < tiles)[:, None] & ok[None, :]
        index = (base + tile) * S + head
        decay = tl.load(decays + index, mask=step < tiles, other=1.0)
        decay = tl.broadcast_to(decay[:, None], [GROUP, BLOCK])
        left = tl.load(own + index[:, None] * SIZE + at[None, :], mask=exists, other=0.0)
        decay, left = tl.associative_scan((decay, left), 0, _compose)
        left += decay * state[None, :]
        state = tl.sum(tl.where(row[:, None] == GROUP - 1, left, 0.0), 0)
        onwards = index + (-S if BACKWARDS else S)
        exists = (step + 1 < tiles)[:, None] & ok[None, :]
        tl.store(entering + onwards[:, None] * SIZE + at[None, :], left, mask=exists)
    tl.store(after + one, state, mask=ok)


@triton.jit(do_not_specialize=VARYING)
def tile_outputs(
    x, dt, A, B, C, D, starts, entering, y,
    seq, tiles, x_b, dt_b, b_b, c_b, starts_b, x_t, x_s, dt_t, dt_s, b_t, b_k, c_t, c_k,
    S: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, T, S, W], contiguous."""
    tile, group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = tile * Q
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    ok = begin + row < seq
    token = begin + row.to(tl.int64)
    x += batch.to(tl.int64) * x_b
    dt += batch.to(tl.int64) * dt_b
    B += batch.to(tl.int64) * b_b + group * b_k
    C += batch.to(tl.int64) * c_b + group * c_k
    first = chunk_begin(starts + batch.to(tl.int64) * starts_b, begin, ok, Q)
    n_exists, w_exists = columns(ok, n, N, NP), columns(ok, w, W, WP)
    write = tl.load(B + token[:, None] * b_t + n[None, :], mask=n_exists, other=0.0)
    read = tl.load(C + token[:, None] * c_t + n[None, :], mask=n_exists, other=0.0)
    scores = tl.dot(read, tl.trans(write), input_precision=PRECISION)
    for head in range(group * (S // K), (group + 1) * (S // K)):
        step, cum = _running_sum(dt, A, token, ok, head, dt_t, dt_s)
        at = x + token[:, None] * x_t + tl.cast(head, tl.int64) * x_s + w[None, :]
        value = tl.load(at, mask=w_exists, other=0.0)
        mixing = scores * _decay(cum, first, Q) * step[None, :]
        out = tl.dot(mixing.to(value.dtype), value, input_precision=PRECISION)
        state = tl.load(
            _state_at(entering, batch, tile, tiles, head, S, N, W, n, w),
            mask=(n < N)[:, None] & (w < W)[None, :], other=0.0,
        )  # fmt: skip
        carried = tl.dot(read.to(tl.float32), state, input_precision=PRECISION)
        out += _from_start(cum, first)[:, None] * carried
        out += tl.load(D + head).to(tl.float32) * value.to(tl.float32)
        to = ((batch.to(tl.int64) * seq + token) * S + head)[:, None] * W + w[None, :]
        tl.store(y + to, out.to(y.dtype.element_ty), mask=w_exists)


@triton.jit(do_not_specialize=VARYING)
def tile_state_gradients(
    dt, A, C, starts, dy, gradients,
    seq, tiles, dt_b, c_b, starts_b, dt_t, dt_s, c_t, c_k,
    S: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile's outputs alone give to the gradient of the state that enters it."""
    tile, group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = tile * Q
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    ok = begin + row < seq
    token = begin + row.to(tl.int64)
    dt += batch.to(tl.int64) * dt_b
    C += batch.to(tl.int64) * c_b + group * c_k
    first = chunk_begin(starts + batch.to(tl.int64) * starts_b, begin, ok, Q)
    exists = columns(ok, n, N, NP)
    read = tl.load(C + token[:, None] * c_t + n[None, :], mask=exists, other=0.0)
    for head in range(group * (S // K), (group + 1) * (S // K)):
        _, cum = _running_sum(dt, A, token, ok, head, dt_t, dt_s)
        at = ((batch.to(tl.int64) * seq + token) * S + head)[:, None] * W + w[None, :]
        grad = tl.load(dy + at, mask=columns(ok, w, W, WP), other=0.0)
        grad = (grad.to(tl.float32) * _from_start(cum, first)[:, None]).to(read.dtype)
        state = tl.dot(tl.trans(read), grad, input_precision=PRECISION)
        out = _state_at(gradients, batch, tile, tiles, head, S, N, W, n, w)
        tl.store(out, state, mask=(n < N)[:, None] & (w < W)[None, :])


@triton.jit(do_not_specialize=VARYING)
def tile_gradients(
    x, dt, A, B, C, D, starts, entering, leaving, dy,
    dx, ddt, dA, dD,
    seq, tiles, x_b, dt_b, b_b, c_b, starts_b, x_t, x_s, dt_t, dt_s, b_t, b_k, c_t, c_k,
    S: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x and dt, contiguous; of A and D each tile's share, float32 [B, n, S].

    Grid: tiles x heads x B. What heads of a group share, tile_shared_gradients adds up.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = head // (S // K)
    begin = tile * Q
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    ok = begin + row < seq
    token = begin + row.to(tl.int64)
    whole = batch.to(tl.int64) * seq + token
    x += batch.to(tl.int64) * x_b + head * x_s
    dt += batch.to(tl.int64) * dt_b
    B += batch.to(tl.int64) * b_b + group * b_k
    C += batch.to(tl.int64) * c_b + group * c_k
    n_exists, w_exists = columns(ok, n, N, NP), columns(ok, w, W, WP)
    state_exists = (n < N)[:, None] & (w < W)[None, :]
    at = (whole * S + head)[:, None] * W + w[None, :]
    write = tl.load(B + token[:, None] * b_t + n[None, :], mask=n_exists, other=0.0)
    read = tl.load(C + token[:, None] * c_t + n[None, :], mask=n_exists, other=0.0)
    value = tl.load(x + token[:, None] * x_t + w[None, :], mask=w_exists, other=0.0)
    grad = tl.load(dy + at, mask=w_exists, other=0.0)
    place = _state_at(entering, batch, tile, tiles, head, S, N, W, n, w)
    state = tl.load(place, mask=state_exists, other=0.0)
    place = _state_at(leaving, batch, tile, tiles, head, S, N, W, n, w)
    dstate = tl.load(place, mask=state_exists, other=0.0)
    step, cum = _running_sum(dt, A, token, ok, head, dt_t, dt_s)
    first = chunk_begin(starts + batch.to(tl.int64) * starts_b, begin, ok, Q)
    last = tl.max(first, 0)
    total = tl.sum(tl.where(row == Q - 1, cum, 0.0), 0)
    share = (batch.to(tl.int64) * tiles + tile) * S + head

    # Within the tile.
    decay = _decay(cum, first, Q)
    unscaled = tl.dot(read, tl.trans(write), input_precision=PRECISION) * decay
    mixing = (unscaled * step[None, :]).to(value.dtype)
    dvalue = tl.dot(tl.trans(mixing), grad, input_precision=PRECISION)
    pulled = tl.dot(grad, tl.trans(value), input_precision=PRECISION) * unscaled
    dstep = tl.sum(pulled, 0)
    dcum = tl.sum(pulled * step[None, :], 1) - dstep * step

    # From the state that enters.
    wide, wide_grad = value.to(tl.float32), grad.to(tl.float32)
    carried = tl.dot(read, state.to(read.dtype), input_precision=PRECISION)
    dcum += tl.sum(carried * wide_grad, 1) * _from_start(cum, first)

    # Into the state that leaves.
    to_end = tl.exp(tl.where(row >= last, total - cum, float("-inf")))
    pull = tl.dot(write, dstate.to(write.dtype), input_precision=PRECISION) * to_end[:, None]
    dvalue += pull * step[:, None]
    into = tl.sum(pull * wide, 1)
    dstep += into
    dcum -= into * step
    through = tl.where(last < 0, tl.exp(total), 0.0) * tl.sum(tl.sum(state * dstate, 1), 0)
    dtotal = tl.sum(into * step, 0) + through

    # Of log a_t: every later running sum.
    dlog = tl.sum(dcum, 0) - tl.cumsum(dcum, 0) + dcum + dtotal
    rate = tl.load(A + head).to(tl.float32)
    tl.store(ddt + whole * S + head, dstep + dlog * rate, mask=ok)
    tl.store(dA + share, tl.sum(dlog * step, 0))
    dvalue += tl.load(D + head).to(tl.float32) * wide_grad
    tl.store(dD + share, tl.sum(tl.sum(wide * wide_grad, 1), 0))
    tl.store(dx + at, dvalue.to(dx.dtype.element_ty), mask=w_exists)


@triton.jit(do_not_specialize=VARYING)
def tile_shared_gradients(
    x, dt, A, B, C, starts, entering, leaving, dy, dB, dC,
    seq, tiles, x_b, dt_b, b_b, c_b, starts_b, x_t, x_s, dt_t, dt_s, b_t, b_k, c_t, c_k,
    S: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C, contiguous: sums over the heads of a group. Grid: tiles x K x B."""
    tile, group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = tile * Q
    row, n, w = tl.arange(0, Q), tl.arange(0, NP), tl.arange(0, WP)
    ok = begin + row < seq
    token = begin + row.to(tl.int64)
    whole = batch.to(tl.int64) * seq + token
    x += batch.to(tl.int64) * x_b
    dt += batch.to(tl.int64) * dt_b
    B += batch.to(tl.int64) * b_b + group * b_k
    C += batch.to(tl.int64) * c_b + group * c_k
    first = chunk_begin(starts + batch.to(tl.int64) * starts_b, begin, ok, Q)
    last = tl.max(first, 0)
    n_exists, w_exists = columns(ok, n, N, NP), columns(ok, w, W, WP)
    state_exists = (n < N)[:, None] & (w < W)[None, :]
    dscores = tl.zeros([Q, Q], tl.float32)
    dwrite = tl.zeros([Q, NP], tl.float32)
    dread = tl.zeros([Q, NP], tl.float32)
    for head in range(group * (S // K), (group + 1) * (S // K)):
        step, cum = _running_sum(dt, A, token, ok, head, dt_t, dt_s)
        total = tl.sum(tl.where(row == Q - 1, cum, 0.0), 0)
        at = x + token[:, None] * x_t + tl.cast(head, tl.int64) * x_s + w[None, :]
        value = tl.load(at, mask=w_exists, other=0.0)
        at = dy + (whole * S + head)[:, None] * W + w[None, :]
        grad = tl.load(at, mask=w_exists, other=0.0)
        place = _state_at(entering, batch, tile, tiles, head, S, N, W, n, w)
        state = tl.load(place, mask=state_exists, other=0.0).to(grad.dtype)
        place = _state_at(leaving, batch, tile, tiles, head, S, N, W, n, w)
        dstate = tl.load(place, mask=state_exists, other=0.0).to(grad.dtype)
        dmixing = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        dscores += dmixing * (_decay(cum, first, Q) * step[None, :])
        grad = (grad.to(tl.float32) * _from_start(cum, first)[:, None]).to(grad.dtype)
        dread = tl.dot(grad, tl.trans(state), dread, input_precision=PRECISION)
        to_end = tl.exp(tl.where(row >= last, total - cum, float("-inf"))) * step
        value = (value.to(tl.float32) * to_end[:, None]).to(value.dtype)
        dwrite = tl.dot(value, tl.trans(dstate), dwrite, input_precision=PRECISION)
    write = tl.load(B + token[:, None] * b_t + n[None, :], mask=n_exists, other=0.0)
    read = tl.load(C + token[:, None] * c_t + n[None, :], mask=n_exists, other=0.0)
    low = dscores.to(write.dtype)
    dread = tl.dot(low, write, dread, input_precision=PRECISION)
    dwrite = tl.dot(tl.trans(low), read, dwrite, input_precision=PRECISION)
    at = (whole * K + group)[:, None] * N + n[None, :]
    tl.store(dB + at, dwrite.to(dB.dtype.element_ty), mask=n_exists)
    tl.store(dC + at, dread.to(dC.dtype.element_ty), mask=n_exists)
