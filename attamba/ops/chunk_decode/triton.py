"""The decode step in Triton: custom operators around kernels.py and state/kernels.py.

All can be captured in a CUDA graph: what changes from step to step (lengths, counts, addresses
of pages) is read on the device. None has gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attamba.ops.backends import overlaps, starts_early
from attamba.ops.chunk_decode import kernels
from attamba.ops.chunk_decode.blocks import PAGE
from attamba.ops.chunk_decode.compress import CompressorWeights
from attamba.ops.chunk_decode.held import Held
from attamba.ops.chunk_decode.state.kernels import compress_step_kernel
from attamba.ops.chunk_decode.tiles import step_tile
from attamba.ops.layout import last_dense

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def attend_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    lengths: Tensor,
    ends: Tensor | None,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    more: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """See attend_step."""
    held.known_past = None
    cos, sin = (None, None) if rotary is None else rotary
    more_k, more_v = (None, None) if more is None else more
    return _attend_step(
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
        held.n_past,
        held.ring_ends,
        held.last_end,
        held.blocks.page_table(),
        held.arrivals,
        held.blocks.dtype,
        held.window or 0,
    )


@torch.library.custom_op(
    "attamba::attend_step", mutates_args=("n_past", "ring_ends", "last_end", "table", "arrivals")
)
def _attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    more_k: Tensor | None,
    more_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    ends: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor,
    n_past: Tensor,
    ring_ends: Tensor,
    last_end: Tensor,
    table: Tensor,
    arrivals: Tensor,
    dtype: torch.dtype,
    ring: int,
) -> Tensor:
    """The pages that `table` points to change too; `table` stands for them."""
    q, k, v = map(last_dense, (q, k, v))
    batch, heads, width = q.shape
    groups = k.shape[1]
    per_group = heads // groups
    more_k, more_v = (k if t is None else last_dense(t) for t in (more_k, more_v))
    lengths = lengths.contiguous()
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tile = step_tile(batch * groups, per_group, width, dtype, q.device)
    overlap = overlaps(q.device)
    padded = max(16, triton.next_power_of_2(width))
    partial = q.new_empty(batch * groups, tile.splits, per_group, padded + 2, dtype=torch.float32)
    rows = ends.stride(0) if ends is not None and ends.shape[0] > 1 else 0
    columns = ends.stride(1) if ends is not None and ends.shape[1] > 1 else 0
    kernels.attend_step_kernel[(batch * groups, tile.splits)](
        q,
        k,
        v,
        more_k,
        more_v,
        q if cos is None else cos,
        q if sin is None else sin,
        last_end if ends is None else ends,
        last_end if mask is None else mask,
        lengths,
        n_past,
        ring_ends,
        last_end,
        table,
        partial,
        arrivals,
        out,
        width**-0.5,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *more_k.stride()[:2],
        *more_v.stride()[:2],
        0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
        rows,
        columns,
        0 if mask is None else mask.stride(0),
        RING=ring,
        G=groups,
        M=per_group,
        MP=tile.queries,
        D=width,
        DP=padded,
        SPLITS=tile.splits,
        SPLITS_P=triton.next_power_of_2(tile.splits),
        BN=tile.entries,
        PAGE=PAGE,
        DTYPE=DTYPES[dtype],
        ALIGN=16 if width * dtype.itemsize % 16 == 0 else 1,
        ROTARY=cos is not None,
        MORE=more_k is not k,
        ENDS=ends is not None,
        MASK=mask is not None,
        DOT=tile.queries > 1,
        SHARE=tile.share,
        OVERLAP=overlap,
        EARLY=starts_early(batch),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out


@_attend_step.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def compress_step_triton(
    projected: Tensor,
    h: Tensor,
    conv: Tensor,
    weights: CompressorWeights,
    starts: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """See compress_step; h and conv are written over, so they must be contiguous."""
    for name, tensor in (("h", h), ("conv", conv)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} of strides {tensor.stride()} cannot be written over; make it contiguous "
                f"first, or use backend='torch'"
            )
    return _compress_step(projected, h, conv, *weights, starts, mask)


@torch.library.custom_op("attamba::compress_step", mutates_args=("h", "conv"))
def _compress_step(
    projected: Tensor,
    h: Tensor,
    conv: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    D_skip: Tensor,
    starts: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    projected = last_dense(projected)
    parameters = [t.contiguous() for t in (conv_weight, A_log, dt_bias, D_skip)]
    starts = None if starts is None else starts.contiguous()
    batch, heads, state, width = h.shape
    inner = heads // 2 * width
    y = projected.new_empty(batch, 2, inner)
    padded = triton.next_power_of_2(inner)
    # A tile of the state has at most 2**14 numbers; 32 of them to a thread.
    tile = min(triton.next_power_of_2(state), max(1, 2**14 // padded))
    overlap = overlaps(projected.device)
    compress_step_kernel[(batch, 2)](
        projected,
        h,
        conv,
        *parameters,
        projected if starts is None else starts,
        projected if mask is None else mask,
        y,
        projected.stride(0),
        0 if mask is None else mask.stride(0),
        E=inner,
        EP=padded,
        W=width,
        N=state,
        NB=tile,
        TAPS=conv_weight.shape[1],
        TAPS_P=triton.next_power_of_2(conv_weight.shape[1]),
        STARTS=starts is not None,
        MASK=mask is not None,
        OVERLAP=overlap,
        num_warps=max(4, min(16, padded * tile // 1024)),
        **({"launch_pdl": True} if overlap else {}),
    )
    return y


@_compress_step.register_fake
def _(projected, h, *_):
    return projected.new_empty(h.shape[0], 2, h.shape[1] // 2 * h.shape[3])
