"""Chunk attention in Triton: two custom operators, forward and backward, around kernels.py.

No wait for the device, no copy of keys, no [T, T] anything: beside its results the operator keeps
one float32 per query and head and two int32 per position that can end a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from attamba.ops.chunk_attention import kernels
from attamba.ops.chunk_attention.tiles import tiles
from attamba.ops.chunking import document_bounds
from attamba.ops.layout import last_dense

UNBOUNDED = -1  # leading_tokens=None inside the operator, which takes plain integers
MAX_WIDTH = 256


def chunk_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor | None,
    leading_tokens: int | None,
    doc_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """See chunk_attention; ends is [B or 1, G or 1, Tk], or None for a sliding window."""
    if q.shape[3] > MAX_WIDTH:
        raise ValueError(
            f"heads of width {q.shape[3]} are wider than {MAX_WIDTH}, the most that the Triton "
            f"kernels take; use backend='torch'"
        )
    if not scale > 0:
        raise ValueError(f"scale={scale} must be above 0 for backend='triton'")
    k, v = k.to(q.dtype), v.to(q.dtype)
    lead = UNBOUNDED if leading_tokens is None else leading_tokens
    ends = None if lead == UNBOUNDED else ends
    # Outside the operator: layers that are compiled together share it, as does the backward pass.
    documents = (None, None) if doc_ids is None else document_bounds(doc_ids)
    return _forward(q, k, v, ends, *documents, lead, scale)[0]


@torch.library.custom_op("attamba::chunk_attention_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor | None,
    doc_start: Tensor | None,
    doc_stop: Tensor | None,
    lead: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """doc_start, doc_stop: int32 [B, Tk], see document_bounds.

    Returns out [B, Tq, H, D], lse float32 [B, H, Tq] (base 2), before, index; see kernels.py.
    """
    q, k, v = map(last_dense, (q, k, v))
    batch, n_queries, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, n_queries, dtype=torch.float32)
    before, index = _number(ends, k)
    if out.numel():
        launch = Launch(q, k, v, before, doc_start, doc_stop, lead, scale)
        launch.forward(out, lse, index)
    return out, lse, before, index


@torch.library.custom_op("attamba::chunk_attention_triton_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    before: Tensor,
    index: Tensor,
    doc_start: Tensor | None,
    doc_stop: Tensor | None,
    lead: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, d_out = map(last_dense, (q, k, v, d_out))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if dk.numel() and not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    if dq.numel():
        launch = Launch(q, k, v, before, doc_start, doc_stop, lead, scale)
        launch.backward(out, d_out, lse, index, dq, dk, dv)
    return dq, dk, dv


@_forward.register_fake
def _(q, k, v, ends, doc_start, doc_stop, lead, scale):
    batch, n_queries, heads, _ = q.shape
    rows = (0, 0) if ends is None else ends.shape[:2]
    before, index = (q.new_empty(*rows, n, dtype=torch.int32) for n in (k.shape[1] + 1, k.shape[1]))
    lse = q.new_empty(batch, heads, n_queries, dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, before, index


@_backward.register_fake
def _(d_out, q, k, v, out, lse, before, index, doc_start, doc_stop, lead, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, _, doc_start, doc_stop, ctx.lead, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, doc_start, doc_stop, *output)


def _grad(ctx, d_out, *_):
    saved = ctx.saved_tensors
    q, k, v, *documents = saved[:5]
    results = saved[5:]
    dq, dk, dv = _backward(d_out, q, k, v, *results, *documents, ctx.lead, ctx.scale)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


def _number(ends: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor]:
    """`before` and `index` of ends [B or 1, G or 1, Tk]; without rows where there are no ends."""
    n_keys = k.shape[1]
    rows = (0, 0) if ends is None else ends.shape[:2]
    before = k.new_empty(*rows, n_keys + 1, dtype=torch.int32)
    index = k.new_empty(*rows, n_keys, dtype=torch.int32)
    if ends is not None and before.numel():
        flat = ends.flatten(0, 1)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        block = min(4096, triton.next_power_of_2(max(n_keys, 16)))
        kernels.index_kernel[(flat.shape[0],)](
            flat.view(torch.uint8), before, index, flat.stride(0), n_keys, BLOCK=block, num_warps=8
        )
    return before, index


class Launch:
    """The arguments that all kernels share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before: Tensor,
        doc_start: Tensor | None,
        doc_stop: Tensor | None,
        lead: int,
        scale: float,
    ) -> None:
        self.q, self.k, self.v, self.before = q, k, v, before
        self.batch, self.n_queries, self.heads, self.width = q.shape
        self.n_keys, self.groups = k.shape[1:3]
        rows_b = before.shape[1] if before.shape[0] > 1 else 0
        rows_g = 1 if before.shape[1] > 1 else 0
        self.strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.rows = rows_b, rows_g
        lead = self.n_keys if lead == UNBOUNDED else min(lead, self.n_keys)
        self.numbers = self.n_queries, self.n_keys, self.heads, lead, scale * math.log2(math.e)
        self.scale = scale
        self.past = before.numel() > 0 and lead < self.n_keys
        self.docs = doc_start is not None
        self.doc_start = before if doc_start is None else doc_start
        self.doc_stop = before if doc_stop is None else doc_stop
        self.shape: dict[str, Any] = {
            "R": self.heads // self.groups,
            "D": self.width,
            "BD": max(16, triton.next_power_of_2(self.width)),
            "DOCS": self.docs,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }

    def forward(self, out: Tensor, lse: Tensor, index: Tensor) -> None:
        grid, tile = self._query_tiles("forward")
        kernels.forward_kernel[grid](
            self.q, self.k, self.v, out, lse, self.before, index, self.doc_start,
            *self.strides, *self.rows, *self.numbers, **self.shape, **tile,
        )  # fmt: skip

    def backward(
        self, out: Tensor, d_out: Tensor, lse: Tensor, index: Tensor, *grads: Tensor
    ) -> None:
        dq, dk, dv = grads
        delta = torch.empty_like(lse)
        self.dq(out, d_out, lse, delta, index, dq)
        if self.past:
            self.past_keys(d_out, lse, delta, index, dk, dv)
        self.window_keys(d_out, lse, delta, dk, dv)

    def dq(
        self, out: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, index: Tensor, dq: Tensor
    ) -> None:
        grid, tile = self._query_tiles("dq")
        kernels.dq_kernel[grid](
            self.q, self.k, self.v, out, d_out, dq, lse, delta, self.before, index,
            self.doc_start, *self.strides, *d_out.stride()[:3], *self.rows, *self.numbers,
            self.scale, **self.shape, **tile,
        )  # fmt: skip

    def past_keys(
        self, d_out: Tensor, lse: Tensor, delta: Tensor, index: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        grid, tile = self._key_tiles("past")
        kernels.past_kernel[grid](
            self.q, self.k, self.v, d_out, dk, dv, lse, delta, self.before, index,
            self.doc_start, self.doc_stop, *self.strides, *d_out.stride()[:3], *self.rows,
            *self.numbers, self.scale, **self.shape, **tile,
        )  # fmt: skip

    def window_keys(
        self, d_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        grid, tile = self._key_tiles("window")
        kernels.window_kernel[grid](
            self.q, self.k, self.v, d_out, dk, dv, lse, delta, self.before,
            self.doc_start, self.doc_stop, *self.strides, *d_out.stride()[:3], *self.rows,
            *self.numbers, self.scale, PAST=self.past, **self.shape, **tile,
        )  # fmt: skip

    def _query_tiles(self, kernel: str) -> tuple[tuple[int], dict[str, Any]]:
        tile = tiles(kernel, self.width, self.n_keys, self.q.dtype, self.q.device)
        reach = self.n_keys * max(self.k.stride(1), self.v.stride(1))
        return (triton.cdiv(self.n_queries, tile.block_m) * self.batch * self.heads,), {
            "BM": tile.block_m, "BN": tile.block_n, "WN": tile.window_n,
            "PAST": self.past, "WIDE": reach >= 2**31,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    def _key_tiles(self, kernel: str) -> tuple[tuple[int], dict[str, Any]]:
        tile = tiles(kernel, self.width, self.n_keys, self.q.dtype, self.q.device)
        return (triton.cdiv(self.n_keys, tile.block_n) * self.batch * self.groups,), {
            "BM": tile.block_m, "BN": tile.block_n,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
