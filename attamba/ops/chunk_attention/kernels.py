"""Triton kernels of chunk attention; see triton.py, which launches them.

A tile of queries at positions [t0, t0 + BM) sees a prefix of the chunk ends (sorted by position)
and the keys from t0 - L on. So it walks over whole tiles of ends without a mask, one or two with
one, then over the window; one running maximum and sum serve them all, and no key is met twice.
Ends are gathered while they are loaded, by `index`: no copy of keys is made.

Backward, deterministic: one kernel for dq; one for what chunk ends get from queries beyond their
window, written to their rows of dk and dv; one for what every key gets from its window, which
adds the rows that the former wrote.

Shapes: B batch, H query heads, G key/value heads, R = H / G, Tq queries, Tk keys, D width of a
head, BD the power of two above it, BM queries and BN keys of a tile.

Arrays: q, out, d_out [B, Tq, H, D]; k, v [B, Tk, G, D], any strides with the last 1. lse (base 2)
and delta = sum(d_out * out): float32 [B, H, Tq]. before: int32 [b, g, Tk + 1], chunk ends before a
position; index: int32 [b, g, Tk], their positions. doc_start, doc_stop: int32 [B, Tk], where the
document of a position begins and where it is over.
"""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ("n_queries", "n_keys", "lead")  # one compiled kernel serves all of them
NEVER = tl.constexpr(-1.0e30)  # a running maximum below all scores, finite so that no NaN arises


@triton.jit(do_not_specialize=["stride_row", "n_keys"])
def index_kernel(ends, before, index, stride_row, n_keys, BLOCK: tl.constexpr):
    """Numbers the chunk ends of one row of flags. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, n_keys, BLOCK):
        t = start + tl.arange(0, BLOCK)
        is_end = tl.load(ends + row * stride_row + t, mask=t < n_keys, other=0).to(tl.int32)
        rank = count + tl.cumsum(is_end, 0) - is_end
        tl.store(before + row * (n_keys + 1) + t, rank, mask=t < n_keys)
        tl.store(index + row * n_keys + rank, t, mask=is_end != 0)
        count += tl.sum(is_end, 0)
    tl.store(before + row * (n_keys + 1) + n_keys, count)


@triton.jit
def _rows(base, position, stride, valid, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Rows `position` of a matrix of width D, [rows, BD]; zeros where they are not valid."""
    d = tl.arange(0, BD)
    pointers = base + position[:, None] * stride + d[None, :]
    if MASKED:
        if D == BD:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if D == BD:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _put(base, position, stride, valid, value, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    mask = valid[:, None] & (d < D)[None, :]
    pointers = base + position[:, None] * stride + d[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _absorb(
    acc, total, top, q, k, v, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile of keys and values into the running softmax (maximum `top` in base 2)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _slope(
    dq, q, k, v, d_out, lse, delta, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds to dq what one tile of keys gives, the factor `scale` of the scores left out."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - lse[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _place(n_tiles, n_heads, R: tl.constexpr):
    """Tile, row, query head, key/value head of this program; late tiles, the longest, first.

    All but the tile are int64: rows, and heads where they lie before tokens, may be far apart.
    """
    program = tl.program_id(0)
    tile = n_tiles - 1 - program % n_tiles
    both = program // n_tiles
    head = (both % n_heads).to(tl.int64)
    return tile, (both // n_heads).to(tl.int64), head, head // R


@triton.jit
def _reach(
    before_row, doc_row, t, first, lead, n_keys, BM: tl.constexpr, DOCS: tl.constexpr,
    PAST: tl.constexpr
):  # fmt: skip
    """What the queries at positions t = first.. see.

    Slots [low, whole) are seen by all of them, [whole, high) by some. Query by query: slots
    [t_low, t_high), keys [t_first, t]. The window of the tile begins at `begin`.
    """
    last = tl.minimum(first + BM, n_keys) - 1
    t_first = tl.maximum(t - lead, 0)
    begin = tl.maximum(first - lead, 0)
    t_low, low, whole, high = tl.zeros_like(t), 0, 0, 0
    t_high = t_low
    if PAST:
        t_high = tl.load(before_row + tl.minimum(t_first, n_keys))
        whole = tl.load(before_row + begin)
        high = tl.load(before_row + tl.maximum(last - lead, 0))
    if DOCS:
        start = tl.load(doc_row + t, mask=t < n_keys, other=0)
        t_first = tl.maximum(t_first, start)
        own = tl.load(doc_row + first)
        begin = tl.maximum(begin, own)
        if PAST:
            t_low = tl.load(before_row + start)
            low = tl.load(before_row + own)
            whole = low  # a later document may begin in the tile: all its tiles are masked
    return low, whole, high, t_low, t_high, t_first, begin


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, out, lse, before, index, doc_start,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, rows_b, rows_g,
    n_queries, n_keys, n_heads, lead, scale,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WN: tl.constexpr, PAST: tl.constexpr, DOCS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of queries x B x H. rows_b, rows_g: strides of `before` in rows, 0 for shared."""
    tile, row, head, group = _place(tl.cdiv(n_queries, BM), n_heads, R)
    i = tile * BM + tl.arange(0, BM)
    shift = n_keys - n_queries
    t, first = i + shift, tile * BM + shift
    before_row = before + (row * rows_b + group * rows_g) * (n_keys + 1)
    index_row = index + (row * rows_b + group * rows_g) * n_keys
    k_base, v_base = k + row * k_b + group * k_h, v + row * v_b + group * v_h
    low, whole, high, t_low, t_high, t_first, begin = _reach(
        before_row, doc_start + row * n_keys, t, first, lead, n_keys, BM, DOCS, PAST
    )
    queries = _rows(q + row * q_b + head * q_h, i.to(tl.int64), q_t, i < n_queries, D, BD, True)
    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], NEVER, tl.float32)
    if PAST:
        whole = low + (whole - low) // BN * BN
        for n in tl.range(low, whole, BN):
            position = tl.load(index_row + n + tl.arange(0, BN))
            if WIDE:
                position = position.to(tl.int64)
            keys = _rows(k_base, position, k_t, position, D, BD, False)
            values = _rows(v_base, position, v_t, position, D, BD, False)
            acc, total, top = _absorb(
                acc, total, top, queries, keys, values, t, scale, False, PRECISION
            )
        for n in tl.range(whole, high, BN):
            slot = n + tl.arange(0, BN)
            position = tl.load(index_row + slot, mask=slot < high, other=0)
            if WIDE:
                position = position.to(tl.int64)
            keys = _rows(k_base, position, k_t, slot < high, D, BD, True)
            values = _rows(v_base, position, v_t, slot < high, D, BD, True)
            seen = (slot[None, :] < t_high[:, None]) & (slot[None, :] >= t_low[:, None])
            acc, total, top = _absorb(
                acc, total, top, queries, keys, values, seen, scale, True, PRECISION
            )
    stop = tl.minimum(first + BM, n_keys)
    for n in tl.range(begin, stop, WN):
        s = n + tl.arange(0, WN)
        position = s.to(tl.int64) if WIDE else s
        keys = _rows(k_base, position, k_t, s < n_keys, D, BD, True)
        values = _rows(v_base, position, v_t, s < n_keys, D, BD, True)
        seen = (s[None, :] <= t[:, None]) & (s[None, :] >= t_first[:, None])
        acc, total, top = _absorb(
            acc, total, top, queries, keys, values, seen, scale, True, PRECISION
        )
    total = tl.where(total > 0, total, 1.0)  # rows beyond the last query saw nothing
    width = n_heads * D
    base = out + row * n_queries * width + head * D
    _put(base, i.to(tl.int64), width, i < n_queries, acc / total[:, None], D, BD)
    lse_row = lse + (row * n_heads + head) * n_queries
    tl.store(lse_row + i, top + tl.log2(total), mask=i < n_queries)


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q, k, v, out, d_out, dq, lse, delta, before, index, doc_start,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, rows_b, rows_g,
    n_queries, n_keys, n_heads, lead, scale, factor,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WN: tl.constexpr, PAST: tl.constexpr, DOCS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta. y_*: strides of d_out. factor: the scores' scale. Grid as forward_kernel."""
    tile, row, head, group = _place(tl.cdiv(n_queries, BM), n_heads, R)
    i = tile * BM + tl.arange(0, BM)
    shift = n_keys - n_queries
    t, first = i + shift, tile * BM + shift
    before_row = before + (row * rows_b + group * rows_g) * (n_keys + 1)
    index_row = index + (row * rows_b + group * rows_g) * n_keys
    k_base, v_base = k + row * k_b + group * k_h, v + row * v_b + group * v_h
    low, whole, high, t_low, t_high, t_first, begin = _reach(
        before_row, doc_start + row * n_keys, t, first, lead, n_keys, BM, DOCS, PAST
    )
    far, valid = i.to(tl.int64), i < n_queries
    queries = _rows(q + row * q_b + head * q_h, far, q_t, valid, D, BD, True)
    dy = _rows(d_out + row * y_b + head * y_h, far, y_t, valid, D, BD, True)
    width = n_heads * D
    y_base = row * n_queries * width + head * D
    y = _rows(out + y_base, far, width, valid, D, BD, True)
    bias = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    line = (row * n_heads + head) * n_queries + i
    tl.store(delta + line, bias, mask=valid)
    norm = tl.load(lse + line, mask=valid, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    if PAST:
        whole = low + (whole - low) // BN * BN
        for n in tl.range(low, whole, BN):
            position = tl.load(index_row + n + tl.arange(0, BN))
            if WIDE:
                position = position.to(tl.int64)
            keys = _rows(k_base, position, k_t, position, D, BD, False)
            values = _rows(v_base, position, v_t, position, D, BD, False)
            acc = _slope(acc, queries, keys, values, dy, norm, bias, t, scale, False, PRECISION)
        for n in tl.range(whole, high, BN):
            slot = n + tl.arange(0, BN)
            position = tl.load(index_row + slot, mask=slot < high, other=0)
            if WIDE:
                position = position.to(tl.int64)
            keys = _rows(k_base, position, k_t, slot < high, D, BD, True)
            values = _rows(v_base, position, v_t, slot < high, D, BD, True)
            seen = (slot[None, :] < t_high[:, None]) & (slot[None, :] >= t_low[:, None])
            acc = _slope(acc, queries, keys, values, dy, norm, bias, seen, scale, True, PRECISION)
    for n in tl.range(begin, tl.minimum(first + BM, n_keys), WN):
        s = n + tl.arange(0, WN)
        position = s.to(tl.int64) if WIDE else s
        keys = _rows(k_base, position, k_t, s < n_keys, D, BD, True)
        values = _rows(v_base, position, v_t, s < n_keys, D, BD, True)
        seen = (s[None, :] <= t[:, None]) & (s[None, :] >= t_first[:, None])
        acc = _slope(acc, queries, keys, values, dy, norm, bias, seen, scale, True, PRECISION)
    _put(dq + y_base, far, width, valid, acc * factor, D, BD)


@triton.jit
def _gather_slope(
    dk, dv, k, v, q_base, y_base, lse_row, delta_row, q_t, y_t, i, n_queries, visible, scale,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv of one tile of keys what one tile of queries gives. visible: [BN, BM]."""
    far, valid = i.to(tl.int64), i < n_queries
    queries = _rows(q_base, far, q_t, valid, D, BD, True)
    dy = _rows(y_base, far, y_t, valid, D, BD, True)
    norm = tl.load(lse_row + i, mask=valid, other=float("inf"))  # weights 0 beyond the last
    bias = tl.load(delta_row + i, mask=valid, other=0.0)
    scores = tl.dot(k, tl.trans(queries), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - norm[None, :])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
    d_scores = weights * (d_weights - bias[None, :])
    dk = tl.dot(d_scores.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def past_kernel(
    q, k, v, d_out, dk, dv, lse, delta, before, index, doc_start, doc_stop,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, rows_b, rows_g,
    n_queries, n_keys, n_heads, lead, scale, factor,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What chunk ends get from queries beyond their window, into their rows of dk and dv.

    Grid: tiles of as many ends as there could be x B x G. Early tiles, the longest, come first.
    """
    n_tiles, groups = tl.cdiv(n_keys, BN), n_heads // R
    both = tl.program_id(0) // n_tiles
    row, group = (both // groups).to(tl.int64), (both % groups).to(tl.int64)
    first_slot = tl.program_id(0) % n_tiles * BN
    before_row = before + (row * rows_b + group * rows_g) * (n_keys + 1)
    index_row = index + (row * rows_b + group * rows_g) * n_keys
    count = tl.load(before_row + n_keys)
    if first_slot < count:
        slot = first_slot + tl.arange(0, BN)
        valid = slot < count
        position = tl.load(index_row + slot, mask=valid, other=0)
        far = position.to(tl.int64)
        keys = _rows(k + row * k_b + group * k_h, far, k_t, valid, D, BD, True)
        values = _rows(v + row * v_b + group * v_h, far, v_t, valid, D, BD, True)
        shift = n_keys - n_queries
        last = tl.load(index_row + tl.minimum(first_slot + BN, count) - 1)
        begin = tl.maximum(tl.load(index_row + first_slot) + lead + 1 - shift, 0)
        whole = tl.maximum(last + lead + 1 - shift, begin)  # from here on all ends are seen
        stop = n_queries
        doc_row = doc_start + row * n_keys
        if DOCS:
            stop = tl.load(doc_stop + row * n_keys + last) - shift
            whole = stop
        acc_k = tl.zeros([BN, BD], tl.float32)
        acc_v = tl.zeros([BN, BD], tl.float32)
        masked_stop = tl.minimum(begin + tl.cdiv(whole - begin, BM) * BM, n_queries)
        for r in range(R):
            head = group * R + r
            q_base, y_base = q + row * q_b + head * q_h, d_out + row * y_b + head * y_h
            line = (row * n_heads + head) * n_queries
            for n in tl.range(begin, masked_stop, BM):
                i = n + tl.arange(0, BM)
                seen = position[:, None] < (i + shift - lead)[None, :]
                if DOCS:
                    start = tl.load(doc_row + i + shift, mask=i < n_queries, other=n_keys)
                    seen = seen & (position[:, None] >= start[None, :])
                acc_k, acc_v = _gather_slope(
                    acc_k, acc_v, keys, values, q_base, y_base, lse + line, delta + line,
                    q_t, y_t, i, n_queries, seen, scale, D, BD, True, PRECISION,
                )  # fmt: skip
            for n in tl.range(masked_stop, stop, BM):
                i = n + tl.arange(0, BM)
                acc_k, acc_v = _gather_slope(
                    acc_k, acc_v, keys, values, q_base, y_base, lse + line, delta + line,
                    q_t, y_t, i, n_queries, i, scale, D, BD, False, PRECISION,
                )  # fmt: skip
        width = groups * D
        base = row * n_keys * width + group * D
        _put(dk + base, far, width, valid, acc_k * factor, D, BD)
        _put(dv + base, far, width, valid, acc_v, D, BD)


@triton.jit(do_not_specialize=LENGTHS)
def window_kernel(
    q, k, v, d_out, dk, dv, lse, delta, before, doc_start, doc_stop,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, rows_b, rows_g,
    n_queries, n_keys, n_heads, lead, scale, factor,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAST: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of all keys: from the queries of their window, and what past_kernel left there.

    Grid: tiles of keys x B x G.
    """
    n_tiles, groups = tl.cdiv(n_keys, BN), n_heads // R
    both = tl.program_id(0) // n_tiles
    row, group = (both // groups).to(tl.int64), (both % groups).to(tl.int64)
    first = tl.program_id(0) % n_tiles * BN
    s = first + tl.arange(0, BN)
    far, valid = s.to(tl.int64), s < n_keys
    keys = _rows(k + row * k_b + group * k_h, far, k_t, valid, D, BD, True)
    values = _rows(v + row * v_b + group * v_h, far, v_t, valid, D, BD, True)
    shift = n_keys - n_queries
    begin = tl.maximum(first - shift, 0)
    last = tl.minimum(first + BN, n_keys) - 1
    stop = tl.minimum(last + lead + 1, n_keys) - shift
    doc_row = doc_start + row * n_keys
    if DOCS:
        stop = tl.minimum(stop, tl.load(doc_stop + row * n_keys + last) - shift)
    acc_k = tl.zeros([BN, BD], tl.float32)
    acc_v = tl.zeros([BN, BD], tl.float32)
    for r in range(R):
        head = group * R + r
        q_base, y_base = q + row * q_b + head * q_h, d_out + row * y_b + head * y_h
        line = (row * n_heads + head) * n_queries
        for n in tl.range(begin, stop, BM):
            i = n + tl.arange(0, BM)
            t = i + shift
            seen = (s[:, None] <= t[None, :]) & (s[:, None] >= (t - lead)[None, :])
            if DOCS:
                start = tl.load(doc_row + t, mask=i < n_queries, other=n_keys)
                seen = seen & (s[:, None] >= start[None, :])
            acc_k, acc_v = _gather_slope(
                acc_k, acc_v, keys, values, q_base, y_base, lse + line, delta + line,
                q_t, y_t, i, n_queries, seen, scale, D, BD, True, PRECISION,
            )  # fmt: skip
    acc_k *= factor
    width = groups * D
    base = row * n_keys * width + group * D
    if PAST:
        before_row = before + (row * rows_b + group * rows_g) * (n_keys + 1)
        rank = tl.load(before_row + s, mask=valid, other=0)
        is_end = valid & (tl.load(before_row + s + 1, mask=valid, other=0) > rank)
        acc_k += _rows(dk + base, far, width, is_end, D, BD, True).to(tl.float32)
        acc_v += _rows(dv + base, far, width, is_end, D, BD, True).to(tl.float32)
    _put(dk + base, far, width, valid, acc_k, D, BD)
    _put(dv + base, far, width, valid, acc_v, D, BD)
