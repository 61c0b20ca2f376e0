"""Triton kernels of the compressors where every chunk fits a tile: one each way.

A program owns the chunks that start in its span of one row, for one compressor, and walks over
them in tiles of at most Q tokens that are whole chunks. So no state passes between tiles, and each
token is read once. A chunk's recurrence is a masked product, as in Mamba-2's "state-space duality"
(arXiv 2405.21060, section 6):

    y_t = sum over s <= t of t's chunk of (C_t . B_s) exp(cum_t - cum_s) dt_s x_s

where cum is the running sum of A dt. The head is a loop inside, so that C B^T is made once.

Shapes: T tokens, E inner width, S heads, N state, W = E/S width of a head, Q tokens of a tile;
NP, WP and TP are N, W and the convolution's taps filled up to what a matrix product takes. Rows of
an array are tokens, but for the backward kernel's tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attamba.ops.chunk_scan.kernels import chunk_begin, columns, exp2, sigmoid

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def one_of(kv, of_k, of_v):
    """One compressor's array."""
    array = of_k
    if kv == 1:
        array = of_v
    return array


@triton.jit
def _first_start(starts, begin, seq, Q: tl.constexpr):
    """The first start at or after `begin`; row 0 is one, and so is the end of the sequence."""
    token = begin + tl.arange(0, Q)
    flag = tl.load(starts + token, mask=token < seq, other=1)
    return tl.min(tl.where((flag != 0) | (token == 0), tl.minimum(token, seq), seq), 0)


@triton.jit
def _tile_end(starts, begin, stop, seq, Q: tl.constexpr):
    """The last start that is at most Q tokens after `begin`, and at most `stop`."""
    token = begin + 1 + tl.arange(0, Q)
    flag = tl.load(starts + token, mask=token < seq, other=1)
    end = tl.max(tl.where((flag != 0) & (token <= stop), token, begin), 0)
    # A chunk that does not fit breaks the caller's promise; it must not be an endless loop.
    return tl.where(end == begin, tl.minimum(begin + Q, stop), end)


@triton.jit
def _shift(row, first, lag: tl.constexpr):
    """[Q, Q], true where column s is `lag` tokens before row t and of its chunk.

    Products with it move tokens in time. They are exact, cost next to nothing on tensor cores and
    leave all that follows in the layout of the other products.
    """
    return (row[None, :] == row[:, None] - lag) & (row[None, :] >= first[:, None])


@triton.jit
def _ones(flags, DTYPE: tl.constexpr):
    """1 where a flag is set, else 0. A cast would convert integers, sixteen of them a cycle."""
    return tl.where(flags, 1.0, 0.0).to(DTYPE)


@triton.jit
def _exist(ok, column, width: tl.constexpr, padded: tl.constexpr):
    """Which elements of a [padded, Q] tile exist."""
    exists = ok[None, :]
    if width != padded:
        exists = exists & (column < width)[:, None]
    return exists


@triton.jit
def _conv(
    inputs, weight, weight_ok, row, first,
    TAPS: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The convolution of a tile, float32. weight: at the columns' first taps.

    inputs and what comes out are [Q, columns] or, TURNED, [columns, Q]: the forward kernel is
    faster with the one, the backward kernel with the other.
    """
    out = tl.zeros(inputs.shape, tl.float32)
    for lag in tl.static_range(TAPS):
        w = tl.load(weight + TAPS - 1 - lag, mask=weight_ok, other=0.0).to(tl.float32)
        shift = _shift(row, first, lag)
        if TURNED:
            shift = _ones(tl.trans(shift), inputs.dtype)
            out += tl.dot(inputs, shift, input_precision=PRECISION) * w[:, None]
        else:
            shift = _ones(shift, inputs.dtype)
            out += tl.dot(shift, inputs, input_precision=PRECISION) * w[None, :]
    return out


@triton.jit
def _softplus(raw):
    """log(1 + exp(raw)), exact for very negative arguments too."""
    small = tl.exp(-tl.abs(raw))
    series = small * (1.0 - small * (0.5 - small * 0.33333333))
    return tl.maximum(raw, 0.0) + tl.where(small < 1e-2, series, tl.log(1.0 + small))


@triton.jit
def head_steps(raw, A, dt_bias, ok, head, S: tl.constexpr):
    """Of all heads, float32 [Q, SP]: dt's argument, dt, and the running sum of log2 a_t."""
    exists = ok[:, None] & (head < S)[None, :]
    bias = tl.load(dt_bias + head, mask=head < S, other=0.0).to(tl.float32)
    rate = tl.load(A + head, mask=head < S, other=0.0).to(tl.float32)
    raw = tl.load(raw, mask=exists, other=0.0).to(tl.float32) + bias[None, :]
    dt = tl.where(exists, _softplus(raw), 0.0)
    return raw, dt, tl.cumsum(dt * (rate * LOG2_E)[None, :], 0)


@triton.jit
def _of(head, values, heads):
    """One head's column of [Q, SP]."""
    return tl.sum(tl.where(heads[None, :] == head, values, 0.0), 1)


@triton.jit
def _reach(dt, cum, PTX: tl.constexpr):
    """dt_s times the decay from token s to a later token t, [Q, Q] (t, s); finite elsewhere."""
    return exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0), PTX) * dt[None, :]


@triton.jit(do_not_specialize=["seq", "span", "starts_stride"])
def compress_forward_kernel(
    proj, conv_weight, A, dt_bias, D, starts, y_k, y_v, rstd,
    seq, span, starts_stride, stride, eps,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
    SP: tl.constexpr, PTX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y_k and y_v [B*T, E], the norm's factors rstd [B*T, 2]. See compress for the inputs."""
    kv = tl.program_id(0)
    y = one_of(kv, y_k, y_v)
    batch = tl.program_id(2)
    starts += batch.to(tl.int64) * starts_stride
    begin = _first_start(starts, tl.program_id(1) * span, seq, Q)
    stop = _first_start(starts, (tl.program_id(1) + 1) * span, seq, Q)
    row = tl.arange(0, Q)
    n = tl.arange(0, NP)
    w = tl.arange(0, WP)
    heads = tl.arange(0, SP)
    DTYPE: tl.constexpr = proj.dtype.element_ty
    while begin < stop:
        end = _tile_end(starts, begin, stop, seq, Q)
        ok = begin + row < end
        first = tl.maximum(chunk_begin(starts, begin, ok, Q), 0)
        own = _ones(_shift(row, first, 0), DTYPE)
        same = (row[None, :] >= first[:, None]) & (row[None, :] <= row[:, None])
        token = batch.to(tl.int64) * seq + begin
        here = proj + token * stride
        at = row[:, None] * stride

        exists = columns(ok, n, N, NP)
        b_at = here + (4 * E + kv * N) + (at + n[None, :])
        b_weight = conv_weight + (2 * E + kv * N + n) * TAPS
        c_weight = b_weight + 2 * N * TAPS
        b_in = tl.load(b_at, mask=exists, other=0.0)
        c_in = tl.load(b_at + 2 * N, mask=exists, other=0.0)
        write = _conv(b_in, b_weight, n < N, row, first, TAPS, PRECISION, TURNED=False)
        read = _conv(c_in, c_weight, n < N, row, first, TAPS, PRECISION, TURNED=False)
        write = (write * sigmoid(write, PTX)).to(DTYPE)
        read = (read * sigmoid(read, PTX)).to(DTYPE)
        scores = tl.dot(read, tl.trans(write), input_precision=PRECISION)
        scores = tl.where(same, scores, 0.0)

        exists = columns(ok, w, W, WP)
        raw = here + (4 * E + 4 * N + kv * S) + (at + heads[None, :])
        _, dts, cums = head_steps(raw, A + kv * S, dt_bias + kv * S, ok, heads, S)
        squares = tl.zeros([Q, 8], tl.float32)
        out = y + token * E + (row[:, None] * E + w[None, :])
        z_at = here + kv * E + (at + w[None, :])
        for head in tl.range(S, num_stages=STAGES):
            z_in = tl.load(z_at + head * W, mask=exists, other=0.0)
            x_in = tl.load(z_at + 2 * E + head * W, mask=exists, other=0.0)
            weight = conv_weight + (kv * E + head * W + w) * TAPS
            x = _conv(x_in, weight, w < W, row, first, TAPS, PRECISION, TURNED=False)
            z = tl.dot(own, z_in, input_precision=PRECISION)
            mixing = scores * _reach(_of(head, dts, heads), _of(head, cums, heads), PTX)
            x *= sigmoid(x, PTX)
            out_h = tl.dot(mixing.to(DTYPE), x.to(DTYPE), input_precision=PRECISION)
            out_h += tl.load(D + kv * S + head).to(tl.float32) * x
            out_h *= z * sigmoid(z, PTX)
            squares += tl.sum(tl.reshape(out_h * out_h, [Q, WP // 8, 8]), 1)
            tl.store(out + head * W, out_h.to(DTYPE), mask=exists)
        factor = 1.0 / tl.sqrt(tl.sum(squares, 1) / E + eps)
        tl.store(rstd + token * 2 + kv + row * 2, factor, mask=ok)
        tl.debug_barrier()  # what the program has written it now reads
        for head in tl.range(S, num_stages=STAGES):
            normed = tl.load(out + head * W, mask=exists, other=0.0).to(tl.float32)
            tl.store(out + head * W, (normed * factor[:, None]).to(DTYPE), mask=exists)
        begin = end


@triton.jit
def _conv_backward(
    dout, inputs, weight, weight_ok, dweight, row, first,
    PER_TAP: tl.constexpr, TAPS: tl.constexpr, TP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of the convolution's output [columns, Q] to that of its inputs.

    Adds the weights' gradient to the program's own sums at dweight [columns].
    """
    low = dout.to(inputs.dtype)
    own = tl.dot(inputs, _ones(_shift(row, first, 0), low.dtype), input_precision=PRECISION)
    grad = tl.zeros(inputs.shape, tl.float32)
    taps = tl.arange(0, TP)
    sums = tl.zeros([inputs.shape[0], TP], tl.float32)  # column `lag`: that lag's weights
    for lag in tl.static_range(TAPS):
        w = tl.load(weight + TAPS - 1 - lag, mask=weight_ok, other=0.0).to(tl.float32)
        later = dout
        if lag > 0:
            shift = _ones(_shift(row, first, lag), low.dtype)
            later = tl.dot(low, shift, input_precision=PRECISION)
        grad += later * w[:, None]
        to = _ones((taps[None, :] == lag) & (row[:, None] >= 0), low.dtype)  # [Q, TP]
        sums = tl.dot((own * later).to(low.dtype), to, sums, input_precision=PRECISION)
    # One thread alone adds to an element, tile after tile, so the order is always the same.
    at = dweight[:, None] + (TAPS - 1 - taps)[None, :] * PER_TAP
    tl.atomic_add(at, sums, mask=(taps < TAPS)[None, :] & weight_ok[:, None], sem="relaxed")
    return grad


@triton.jit(do_not_specialize=["seq", "span", "starts_stride"])
def compress_backward_kernel(
    proj, conv_weight, A, dt_bias, D, starts, y_k, y_v, rstd, dy_k, dy_v,
    dproj, sums,
    seq, span, starts_stride, stride, dstride,
    E: tl.constexpr, S: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, PRECISION: tl.constexpr,
    SP: tl.constexpr, TP: tl.constexpr, PTX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dproj [B*T, width] and each span's share of the parameters' gradients.

    sums: float32 [spans, TAPS (2E + 4N) + 3 * 2 * S], zeros; of a span, that of the taps, columns
    as in proj, then those of A, dt_bias and D, of both compressors. stride, dstride: from token to
    token of proj and of dproj.

    Columns are rows here: what a product over tokens takes from another one then lies in the same
    threads already, and only dmixing, a product over columns, has to move its operands.
    """
    kv = tl.program_id(0)
    y, dy = one_of(kv, y_k, y_v), one_of(kv, dy_k, dy_v)
    batch = tl.program_id(2)
    PER_TAP: tl.constexpr = 2 * E + 4 * N
    own_span = batch * tl.num_programs(1) + tl.program_id(1)
    dweight = sums + own_span.to(tl.int64) * (TAPS * PER_TAP + 6 * S)
    dscalars = dweight + TAPS * PER_TAP + kv * S
    starts += batch.to(tl.int64) * starts_stride
    begin = _first_start(starts, tl.program_id(1) * span, seq, Q)
    stop = _first_start(starts, (tl.program_id(1) + 1) * span, seq, Q)
    row = tl.arange(0, Q)
    n = tl.arange(0, NP)
    w = tl.arange(0, WP)
    heads = tl.arange(0, SP)
    DTYPE: tl.constexpr = proj.dtype.element_ty
    rate = tl.load(A + kv * S + heads, mask=heads < S, other=0.0).to(tl.float32)
    drate = tl.zeros([SP], tl.float32)
    dbias = tl.zeros([SP], tl.float32)
    dskip = tl.zeros([SP], tl.float32)
    while begin < stop:
        end = _tile_end(starts, begin, stop, seq, Q)
        ok = begin + row < end
        first = tl.maximum(chunk_begin(starts, begin, ok, Q), 0)
        own = _ones(_shift(row, first, 0), DTYPE)
        same = (row[None, :] >= first[:, None]) & (row[None, :] <= row[:, None])
        token = batch.to(tl.int64) * seq + begin
        here, dhere = proj + token * stride, dproj + token * dstride
        at, to = row[None, :] * stride, row[None, :] * dstride
        half = row[None, :] * E + w[:, None]
        y_here, dy_here = y + token * E, dy + token * E
        steps = (4 * E + 4 * N + kv * S) + heads[None, :]

        n_exists = _exist(ok, n, N, NP)
        b_at = at + (4 * E + kv * N) + n[:, None]
        b_to = to + (4 * E + kv * N) + n[:, None]
        b_weight = conv_weight + (2 * E + kv * N + n) * TAPS
        c_weight = b_weight + 2 * N * TAPS
        b_in = tl.load(here + b_at, mask=n_exists, other=0.0)
        c_in = tl.load(here + b_at + 2 * N, mask=n_exists, other=0.0)
        raw_at = here + (row[:, None] * stride + steps)
        raw, dts, cums = head_steps(raw_at, A + kv * S, dt_bias + kv * S, ok, heads, S)
        factor = tl.load(rstd + token * 2 + kv + row * 2, mask=ok, other=0.0)

        w_exists = _exist(ok, w, W, WP)
        along = tl.zeros([WP, Q], tl.float32)
        for head in tl.static_range(S):  # unrolled, so that all loads are on their way
            normed = tl.load(y_here + head * W + half, mask=w_exists, other=0.0).to(tl.float32)
            along += normed * tl.load(dy_here + head * W + half, mask=w_exists, other=0.0)
        along = tl.sum(along, 0) / E

        write = _conv(b_in, b_weight, n < N, row, first, TAPS, PRECISION, TURNED=True)
        read = _conv(c_in, c_weight, n < N, row, first, TAPS, PRECISION, TURNED=True)
        write = (write * sigmoid(write, PTX)).to(DTYPE)
        read = (read * sigmoid(read, PTX)).to(DTYPE)
        scores = tl.dot(tl.trans(read), write, input_precision=PRECISION)
        scores = tl.where(same, scores, 0.0)
        dscores = tl.zeros([Q, Q], tl.float32)

        dsteps = tl.zeros([SP, Q], tl.float32)
        dcums = tl.zeros([Q, SP], tl.float32)
        z_at = at + kv * E + w[:, None]
        z_to = to + kv * E + w[:, None]
        for head in tl.range(S, num_stages=STAGES):
            z_in = tl.load(here + head * W + z_at, mask=w_exists, other=0.0)
            x_in = tl.load(here + 2 * E + head * W + z_at, mask=w_exists, other=0.0)
            y_in = tl.load(y_here + head * W + half, mask=w_exists, other=0.0)
            dy_in = tl.load(dy_here + head * W + half, mask=w_exists, other=0.0)
            weight = conv_weight + (kv * E + head * W + w) * TAPS
            x_conv = _conv(x_in, weight, w < W, row, first, TAPS, PRECISION, TURNED=True)
            z = tl.dot(z_in, own, input_precision=PRECISION)
            grad = tl.dot(dy_in, own, input_precision=PRECISION)
            grad -= tl.dot(y_in, own, input_precision=PRECISION) * along[None, :]
            grad *= factor[None, :]

            skip = tl.load(D + kv * S + head).to(tl.float32)
            reach = _reach(_of(head, dts, heads), _of(head, cums, heads), PTX)
            mixing = scores * reach
            x_gate = sigmoid(x_conv, PTX)
            x = x_conv * x_gate
            low_x = x.to(DTYPE)
            # Turned before it is rounded: so Triton sees that each thread holds what it needs.
            turned = tl.trans(mixing).to(DTYPE)
            scanned = tl.dot(low_x, turned, input_precision=PRECISION) + skip * x
            z_gate = sigmoid(z, PTX)
            z *= z_gate
            dz = grad * scanned * (z_gate + z * (1.0 - z_gate))
            tl.store(dhere + head * W + z_to, dz.to(DTYPE), mask=w_exists)

            grad *= z
            low = grad.to(DTYPE)
            dx = tl.dot(low, mixing.to(DTYPE), input_precision=PRECISION) + skip * grad
            dmixing = tl.dot(tl.trans(low), low_x, input_precision=PRECISION)
            dscores += dmixing * reach
            pulled = dmixing * mixing
            this = heads == head
            dsteps += tl.where(this[:, None], tl.sum(pulled, 0)[None, :], 0.0)
            dcums += tl.where(this[None, :], tl.sum(pulled, 1)[:, None], 0.0)
            skipped = tl.where(row[None, :] == row[:, None], dmixing, 0.0)  # grad_t . x_t
            dskip += tl.where(this, tl.sum(tl.sum(skipped, 1), 0), 0.0)

            dx *= x_gate + x * (1.0 - x_gate)
            dx = _conv_backward(
                dx, x_in, weight, w < W, dweight + kv * E + head * W + w, row, first,
                PER_TAP, TAPS, TP, PRECISION,
            )  # fmt: skip
            tl.store(dhere + 2 * E + head * W + z_to, dx.to(DTYPE), mask=w_exists)

        # Made anew, since registers that are held through the loop cost more.
        b_in = tl.load(here + b_at, mask=n_exists, other=0.0)
        c_in = tl.load(here + b_at + 2 * N, mask=n_exists, other=0.0)
        # dsteps is the gradient of log dt_s where dt_s stands alone. dt and the sigmoid vanish
        # together; their ratio does not. log a_t moves all later running sums.
        dsteps = tl.trans(dsteps)
        dcums -= dsteps
        slope = sigmoid(raw, PTX)
        ratio = tl.where(dts > 1e-30, slope / tl.maximum(dts, 1e-30), 1.0)
        dlog = tl.sum(dcums, 0)[None, :] - tl.cumsum(dcums, 0) + dcums
        draw = dsteps * ratio + dlog * rate[None, :] * slope
        raw_to = dhere + (row[:, None] * dstride + steps)
        tl.store(raw_to, draw.to(DTYPE), mask=ok[:, None] & (heads < S)[None, :])
        drate += tl.sum(dlog * dts, 0)
        dbias += tl.sum(tl.where(ok[:, None], draw, 0.0), 0)

        write = _conv(b_in, b_weight, n < N, row, first, TAPS, PRECISION, TURNED=True)
        read = _conv(c_in, c_weight, n < N, row, first, TAPS, PRECISION, TURNED=True)
        b_gate = sigmoid(write, PTX)
        c_gate = sigmoid(read, PTX)
        write *= b_gate
        read *= c_gate
        dscores = tl.where(same, dscores, 0.0).to(DTYPE)
        dread = tl.dot(write.to(DTYPE), tl.trans(dscores), input_precision=PRECISION)
        dread = _conv_backward(
            dread * (c_gate + read * (1.0 - c_gate)), c_in, c_weight, n < N,
            dweight + 2 * E + (2 + kv) * N + n, row, first, PER_TAP, TAPS, TP, PRECISION,
        )  # fmt: skip
        tl.store(dhere + b_to + 2 * N, dread.to(DTYPE), mask=n_exists)
        dwrite = tl.dot(read.to(DTYPE), dscores, input_precision=PRECISION)
        dwrite = _conv_backward(
            dwrite * (b_gate + write * (1.0 - b_gate)), b_in, b_weight, n < N,
            dweight + 2 * E + kv * N + n, row, first, PER_TAP, TAPS, TP, PRECISION,
        )  # fmt: skip
        tl.store(dhere + b_to, dwrite.to(DTYPE), mask=n_exists)
        begin = end
    tl.store(dscalars + heads, drate, mask=heads < S)
    tl.store(dscalars + 2 * S + heads, dbias, mask=heads < S)
    tl.store(dscalars + 4 * S + heads, dskip, mask=heads < S)
