"""Triton kernels of the linear recurrence and of its gradient.

A program takes some channels of one piece of one row, tile by tile: inside a tile of tokens an
associative scan of (a, b), between tiles a state in registers. Where rows and channels alone are
too few programs, rows are cut into pieces: each piece's own product of decays and last state
(piece_totals), the states that enter the pieces (run_scan over those totals), then all states
(run_scan). The gradient runs from the last token to the first:

    g_t = dh_t + a_(t+1) g_(t+1),   db_t = g_t,   da_t = g_t h_(t-1)

Shapes: B batch, T tokens, C channels, Q tokens of a tile, W channels of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = ["seq", "span", "pieces", "a_b", "b_b", "starts_b"]
"""Integers whose value must not make a kernel of its own."""


@triton.jit
def _compose(a1, b1, a2, b2):
    """One step after another as one step."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _last_row(x, Q: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, Q)[:, None] == Q - 1, x, 0.0), 0)


@triton.jit
def _tile(
    a, b, starts, dfinal, offset, begin, stop, seq, a_t, b_t, channel, in_width,
    Q: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Steps [Q, W] in the order in which they are taken, and the tokens [Q] that they stand for.

    What is outside the piece is a step that changes nothing.
    """
    row = offset + tl.arange(0, Q)
    if BACKWARDS:
        token = stop - 1 - row
        source = token + 1  # the decay between the token and the one taken before it
    else:
        token = begin + row
        source = token
    inside = (token >= begin) & (token < stop)
    known = inside & (source < seq)
    fresh = tl.load(starts + source, mask=known, other=0) != 0
    exists = known[:, None] & in_width[None, :]
    decay = tl.load(a + source[:, None] * a_t + channel[None, :], mask=exists, other=1.0)
    decay = tl.where(fresh[:, None], 0.0, decay.to(tl.float32))
    exists = inside[:, None] & in_width[None, :]
    update = tl.load(b + token[:, None] * b_t + channel[None, :], mask=exists, other=0.0)
    update = update.to(tl.float32)
    if BACKWARDS:
        last = tl.load(dfinal + channel, mask=in_width, other=0.0)
        update += tl.where((token == seq - 1)[:, None], last[None, :], 0.0)
    return decay, update, token, exists


@triton.jit(do_not_specialize=VARYING)
def piece_totals(
    a, b, starts, dfinal, decays, states, seq, span, pieces, a_b, b_b, starts_b, a_t, b_t,
    C: tl.constexpr, Q: tl.constexpr, W: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """A piece as one step: its product of decays, and its last state from zero, in order taken."""
    piece, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * W + tl.arange(0, W)
    in_width = channel < C
    begin = piece * span
    stop = tl.minimum(begin + span, seq)
    a, b, starts, dfinal = (
        a + batch * a_b,
        b + batch * b_b,
        starts + batch * starts_b,
        dfinal + batch * C,
    )
    product, state = tl.full((W,), 1.0, tl.float32), tl.zeros((W,), tl.float32)
    for offset in range(0, stop - begin, Q):
        decay, update, _, _ = _tile(
            a, b, starts, dfinal, offset, begin, stop, seq, a_t, b_t, channel, in_width,
            Q, BACKWARDS,
        )  # fmt: skip
        through, own = tl.associative_scan((decay, update), 0, _compose)
        through = _last_row(through, Q)
        state = _last_row(own, Q) + through * state
        product *= through
    taken = pieces - 1 - piece if BACKWARDS else piece
    at = (batch * pieces + taken) * C + channel
    tl.store(decays + at, product, mask=in_width)
    tl.store(states + at, state, mask=in_width)


@triton.jit(do_not_specialize=VARYING)
def run_scan(
    a, b, starts, entering, h, final, seq, span, pieces, a_b, b_b, starts_b, a_t, b_t,
    C: tl.constexpr, Q: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """States h [B, T, C] from those that enter the pieces [B, pieces, C], and the last of a row."""
    piece, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * W + tl.arange(0, W)
    in_width = channel < C
    begin = piece * span
    stop = tl.minimum(begin + span, seq)
    a, b, starts, h = (
        a + batch * a_b,
        b + batch * b_b,
        starts + batch * starts_b,
        h + batch * seq * C,
    )
    state = tl.load(entering + (batch * pieces + piece) * C + channel, mask=in_width, other=0.0)
    for offset in range(0, stop - begin, Q):
        decay, update, token, exists = _tile(
            a, b, starts, a, offset, begin, stop, seq, a_t, b_t, channel, in_width, Q, False
        )
        through, own = tl.associative_scan((decay, update), 0, _compose)
        now = own + through * state[None, :]
        tl.store(h + token[:, None] * C + channel[None, :], now, mask=exists)
        state = _last_row(now, Q)
    if piece == pieces - 1:
        tl.store(final + batch * C + channel, state, mask=in_width)


@triton.jit(do_not_specialize=VARYING)
def run_gradients(
    a, dh, starts, dfinal, entering, h, initial, da, db, dinitial,
    seq, span, pieces, a_b, b_b, starts_b, a_t, b_t,
    C: tl.constexpr, Q: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """da, db [B, T, C] and dinitial [B, C] from the gradients that enter the pieces."""
    piece, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * W + tl.arange(0, W)
    in_width = channel < C
    begin = piece * span
    stop = tl.minimum(begin + span, seq)
    a, dh, starts, dfinal = (
        a + batch * a_b,
        dh + batch * b_b,
        starts + batch * starts_b,
        dfinal + batch * C,
    )
    h, da, db = h + batch * seq * C, da + batch * seq * C, db + batch * seq * C
    taken = pieces - 1 - piece
    state = tl.load(entering + (batch * pieces + taken) * C + channel, mask=in_width, other=0.0)
    first = tl.load(initial + batch * C + channel, mask=in_width, other=0.0)
    for offset in range(0, stop - begin, Q):
        decay, update, token, exists = _tile(
            a, dh, starts, dfinal, offset, begin, stop, seq, a_t, b_t, channel, in_width, Q, True
        )
        through, own = tl.associative_scan((decay, update), 0, _compose)
        g = own + through * state[None, :]
        at = token[:, None] * C + channel[None, :]
        tl.store(db + at, g, mask=exists)
        before = tl.load(h + at - C, mask=exists & (token > 0)[:, None], other=0.0).to(tl.float32)
        before += tl.where((token == 0)[:, None], first[None, :], 0.0)
        fresh = tl.load(starts + token, mask=(token >= begin) & (token < stop), other=1) != 0
        tl.store(da + at, tl.where(fresh[:, None], 0.0, g * before), mask=exists)
        state = _last_row(g, Q)
    if piece == 0:
        decay = tl.load(a + channel, mask=in_width, other=0.0).to(tl.float32)
        fresh = tl.load(starts) != 0
        tl.store(dinitial + batch * C + channel, tl.where(fresh, 0.0, decay * state), mask=in_width)
