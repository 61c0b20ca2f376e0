"""The decode step's attention in Triton. Lengths and counts are read on the device.

Shapes: B rows, H query heads, G key/value heads, M = H/G, D width of a head, R ring entries.
A P at the end: the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attamba.ops.thin_linear.kernels import let_successor_start, wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turned(x, stride, cos, sin, d, HALF: tl.constexpr, ROTARY: tl.constexpr, live):
    """x[d] with its rotary position applied, float32; the partner element is loaded again."""
    here = tl.load(x + d * stride, mask=live, other=0.0).to(tl.float32)
    if ROTARY:
        low = d < HALF
        other = tl.load(x + tl.where(low, d + HALF, d - HALF) * stride, mask=live, other=0.0)
        pair = tl.where(low, d, d - HALF)
        c = tl.load(cos + pair, mask=d < 2 * HALF, other=0.0)
        s = tl.load(sin + pair, mask=d < 2 * HALF, other=0.0)
        here = here * c + tl.where(low, -1.0, 1.0) * other.to(tl.float32) * s
    return here


@triton.jit
def _summed(x, x_stride, more, more_stride, d, HALF: tl.constexpr, MORE: tl.constexpr, live):
    """x[d] + more[d] and the same at d's rotary partner, float32."""
    low = d < HALF
    partner = tl.where(low, d + HALF, d - HALF)
    here = tl.load(x + d * x_stride, mask=live, other=0.0).to(tl.float32)
    other = tl.load(x + partner * x_stride, mask=live, other=0.0).to(tl.float32)
    if MORE:
        here += tl.load(more + d * more_stride, mask=live, other=0.0).to(tl.float32)
        other += tl.load(more + partner * more_stride, mask=live, other=0.0).to(tl.float32)
    return here, other


@triton.jit
def _page(table, entry, bh, PAGE: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers to the first key and value of the page of `entry`, for row and head `bh`."""
    line = table + (entry // PAGE) * 3
    step = tl.load(line + 2) * bh
    k = tl.load(line).to(tl.pointer_type(DTYPE)) + step
    v = tl.load(line + 1).to(tl.pointer_type(DTYPE)) + step
    return k, v


@triton.jit(do_not_specialize=["rotary_stride_b", "ends_stride_b", "ends_stride_h", "mask_stride"])
def attend_step_kernel(
    q,
    k,
    v,
    more_k,
    more_v,
    cos,
    sin,
    ends,
    mask,
    lengths,
    n_past,
    ring_ends,
    last_end,
    table,
    partial,
    counter,
    out,
    scale,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    more_k_stride_b,
    more_k_stride_h,
    more_v_stride_b,
    more_v_stride_h,
    rotary_stride_b,
    ends_stride_b,
    ends_stride_h,
    mask_stride,
    RING: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY: tl.constexpr,
    MORE: tl.constexpr,
    ENDS: tl.constexpr,
    MASK: tl.constexpr,
    DOT: tl.constexpr,
    SHARE: tl.constexpr,
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One key/value head of one row, a share of the entries, SHARE or more. The last program to
    finish adds the new token and the entry that it pushes out, writes both, and reduces.

    Until then nothing of the cache changes, so no program sees half of a step: those that have no
    share are waited for as well. With MORE what is held is read beside the kernels that make it:
    queries must have been made before compress_step (which lets nobody start before all that
    precedes it has ended).
    """
    if EARLY:
        let_successor_start(OVERLAP)
    if not MORE:
        wait_for_predecessor(OVERLAP)
        if not EARLY:
            let_successor_start(OVERLAP)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    b = bh // G
    h = bh % G
    length = tl.load(lengths + b).to(tl.int32)
    past = tl.load(n_past + bh).to(tl.int32)
    takes = length >= 0
    if MASK:
        takes = tl.load(mask + b * mask_stride) != 0
    n = length
    slot = length
    pushed = -1  # the ring entry that the new token takes the place of
    if RING > 0:
        n = tl.minimum(length, RING) + past
        slot = length % RING
        pushed = tl.where(takes & (length >= RING), slot, -1)

    share = tl.maximum(tl.cdiv(tl.cdiv(n, SPLITS), BN) * BN, SHARE)
    n_splits = tl.maximum(tl.cdiv(n, share), 1)
    # The last one changes n_past, from which all know how many there are: so all must have read it.
    arrivals = SPLITS if RING > 0 else n_splits
    if split < arrivals:
        d = tl.arange(0, DP)
        m = tl.arange(0, MP)
        rotary_at = b * rotary_stride_b
        q_at = q + b * q_stride_b + h * M * q_stride_h
        top = tl.full([MP], float("-inf"), tl.float32)
        total = tl.zeros([MP], tl.float32)
        acc = tl.zeros([MP, DP], tl.float32)
        if split < n_splits:
            begin = split * share
            end = tl.minimum(begin + share, n)
            col = tl.arange(0, BN)
            in_head = (d < D)[None, :]
            live_q = (m < M)[:, None] & in_head
            query = _turned(
                q_at + m[:, None] * q_stride_h,
                1,
                cos + rotary_at,
                sin + rotary_at,
                d[None, :],
                D // 2,
                ROTARY,
                live_q,
            )
            query = query * (scale * LOG2E)
            for first in range(begin, end, BN):
                page_k, page_v = _page(table, first, bh, PAGE, DTYPE)
                row = first % PAGE + col
                where = row[:, None] * D + d[None, :]
                entry = first + col
                seen = (entry < end) & (entry != pushed)
                live = seen[:, None] & in_head
                keys = tl.load(tl.multiple_of(page_k + where, [1, ALIGN]), mask=live, other=0.0)
                values = tl.load(tl.multiple_of(page_v + where, [1, ALIGN]), mask=live, other=0.0)
                if DOT:
                    score = tl.dot(query.to(DTYPE), tl.trans(keys), input_precision="ieee")
                else:
                    score = tl.sum(query * keys.to(tl.float32), 1)[None, :]
                score = tl.where(seen[None, :], score, float("-inf"))
                high = tl.maximum(top, tl.max(score, 1))
                # a tile of nothing but the pushed entry leaves the maximum at minus infinity
                safe = tl.where(high == float("-inf"), 0.0, high)
                weight = tl.exp2(score - safe[:, None])
                shrink = tl.exp2(top - safe)
                total = total * shrink + tl.sum(weight, 1)
                if DOT:
                    added = tl.dot(weight.to(DTYPE), values, input_precision="ieee")
                else:
                    added = tl.sum(tl.trans(weight) * values.to(tl.float32), 0)[None, :]
                acc = acc * shrink[:, None] + added
                top = high

        if MORE:
            wait_for_predecessor(OVERLAP)
            if not EARLY:
                let_successor_start(OVERLAP)
        # partial: [B*G, SPLITS, M, DP + 2]
        width: tl.constexpr = DP + 2
        before = arrivals - 1
        if arrivals > 1:
            part = partial + (bh * SPLITS + split) * (M * width) + m * width
            found = m < tl.where(split < n_splits, M, 0)
            tl.store(part[:, None] + d[None, :], acc, mask=found[:, None])
            tl.store(part + DP, top, mask=found)
            tl.store(part + DP + 1, total, mask=found)
            tl.debug_barrier()
            before = tl.atomic_add(counter + bh, 1, sem="acq_rel")
        if before == arrivals - 1:
            tl.store(counter + bh, 0)
            _finish(
                q_at,
                k + b * k_stride_b + h * k_stride_h,
                v + b * v_stride_b + h * v_stride_h,
                more_k + b * more_k_stride_b + h * more_k_stride_h,
                more_v + b * more_v_stride_b + h * more_v_stride_h,
                cos + rotary_at,
                sin + rotary_at,
                ends + b * ends_stride_b + h * ends_stride_h,
                n_past + bh,
                ring_ends + bh * RING,
                last_end + b,
                table,
                partial + bh * SPLITS * M * width,
                out + bh * M * D,
                top,
                total,
                acc,
                scale,
                q_stride_h,
                bh,
                h,
                past,
                slot,
                pushed,
                takes,
                n_splits,
                (n_splits > 1) | (split > 0),
                RING,
                M,
                MP,
                D,
                DP,
                SPLITS_P,
                PAGE,
                DTYPE,
                ROTARY,
                MORE,
                ENDS,
            )


@triton.jit
def _finish(
    q,
    k,
    v,
    more_k,
    more_v,
    cos,
    sin,
    ends,
    n_past,
    ring_ends,
    last_end,
    table,
    partial,
    out,
    top,
    total,
    acc,
    scale,
    q_stride_h,
    bh,
    h,
    past,
    slot,
    pushed,
    takes,
    n_splits,
    by_others,
    RING: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS_P: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROTARY: tl.constexpr,
    MORE: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Move, write, reduce: pointers are those of one row and head. top, total [MP], acc [MP, DP]:
    what this program found, which is all unless others found something (by_others)."""
    d = tl.arange(0, DP)
    live = d < D
    new_k, partner = _summed(k, 1, more_k, 1, d, D // 2, MORE, live)
    new_v, _ = _summed(v, 1, more_v, 1, d, D // 2, MORE, live)
    if ROTARY:
        low = d < D // 2
        pair = tl.where(low, d, d - D // 2)
        c = tl.load(cos + pair, mask=live, other=0.0)
        s = tl.load(sin + pair, mask=live, other=0.0)
        new_k = new_k * c + tl.where(low, -1.0, 1.0) * partner * s
    # What is attended to now is what later steps will read: rounded to the cache's numbers.
    new_k = new_k.to(DTYPE)
    new_v = new_v.to(DTYPE)

    page_k, page_v = _page(table, slot, bh, PAGE, DTYPE)
    at = (slot % PAGE) * D + d
    moves = past < 0
    old_k = tl.zeros([DP], DTYPE)
    old_v = tl.zeros([DP], DTYPE)
    if RING > 0:
        moves = (pushed >= 0) & (tl.load(ring_ends + slot) != 0)
        moved = d < tl.where(moves, D, 0)
        old_k = tl.load(page_k + at, mask=moved, other=0.0)
        old_v = tl.load(page_v + at, mask=moved, other=0.0)
        past_k, past_v = _page(table, RING + past, bh, PAGE, DTYPE)
        to = ((RING + past) % PAGE) * D + d
        tl.store(past_k + to, old_k, mask=moved)
        tl.store(past_v + to, old_v, mask=moved)
        tl.store(n_past, past + 1, mask=moves)
        tl.debug_barrier()  # the old entry is read before the new one overwrites it
    taken = d < tl.where(takes, D, 0)
    tl.store(page_k + at, new_k, mask=taken)
    tl.store(page_v + at, new_v, mask=taken)
    if ENDS:
        is_end = tl.load(ends)
        if RING > 0:
            tl.store(ring_ends + slot, is_end, mask=takes)
        tl.store(last_end, is_end, mask=takes & (h == 0))

    width: tl.constexpr = DP + 2
    splits = tl.arange(0, SPLITS_P)
    there = splits < n_splits
    for m in range(M):
        query = _turned(q + m * q_stride_h, 1, cos, sin, d, D // 2, ROTARY, live)
        query = query * (scale * LOG2E)
        this = tl.arange(0, MP) == m
        high = tl.max(tl.where(this, top, float("-inf")), 0)
        found = tl.sum(tl.where(this, total, 0.0), 0)
        values = tl.sum(tl.where(this[:, None], acc, 0.0), 0)
        if by_others:
            parts = partial + splits * (M * width) + m * width
            high, found, values = _reduced(parts, there, d, DP)
        score_new = tl.where(takes, tl.sum(query * new_k.to(tl.float32), 0), float("-inf"))
        score_old = tl.where(moves, tl.sum(query * old_k.to(tl.float32), 0), float("-inf"))
        highest = tl.maximum(high, tl.maximum(score_new, score_old))
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(high - highest)
        weight_new = tl.exp2(score_new - highest)
        weight_old = tl.exp2(score_old - highest)
        found = weight * found + weight_new + weight_old
        values = weight * values
        values += weight_new * new_v.to(tl.float32) + weight_old * old_v.to(tl.float32)
        result = values / tl.where(found == 0.0, 1.0, found)
        tl.store(out + m * D + d, result.to(out.dtype.element_ty), mask=live)


@triton.jit
def _reduced(parts, there, d, DP: tl.constexpr):
    """Maximum, total and sum [DP] of one query from those of all programs."""
    tops = tl.load(parts + DP, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(parts + DP + 1, mask=there, other=0.0, cache_modifier=".cg")
    accs = tl.load(
        parts[:, None] + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg"
    )
    high = tl.max(tops, 0)
    weights = tl.exp2(tops - tl.where(high == float("-inf"), 0.0, high))
    return high, tl.sum(weights * totals, 0), tl.sum(weights[:, None] * accs, 0)
