"""Softmax attention over chunk ends and a window of recent tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attamba.ops.backends import choose
from attamba.ops.chunking import normalize_ends


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor | None,
    leading_tokens: int | None,
    doc_ids: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention to the last L tokens and to earlier chunk ends (arXiv 2411.17685, section 3).

    Query t sees key s of its document if t - L <= s <= t, or if s < t - L and s ends a chunk.

    Args:
        q: [B, Tq, H, D]. The queries stand at the last Tq of the Tk key positions.
        k, v: [B, Tk, G, D] with Tk >= Tq and H a multiple of G (grouped-query heads).
        ends: bool [Tk], [B, Tk] or [B, G, Tk], the positions that end a chunk; None for nowhere
            (a sliding window).
        leading_tokens: L >= 0, EARLIER tokens seen besides the query's own; None for all of them.
        doc_ids: int [B, Tk], packed documents: a change of id starts a new one. None for one.
        scale: factor of the scores. Default: D ** -0.5.
        backend: see attamba.ops. Scores and softmax are float32 in all of them.

    Returns [B, Tq, H, D] in q's dtype. Raises ValueError where shapes disagree or L < 0.
    """
    whole = leading_tokens is None and doc_ids is None and q.shape[1] == k.shape[1]
    # Plain causal attention has kernels of the libraries' own, which the torch backend calls.
    backend = "torch" if whole and backend == "auto" else choose(backend, q.device, q.dtype)
    if leading_tokens is not None and leading_tokens < 0:
        raise ValueError(f"leading_tokens={leading_tokens} must be at least 0, or None for all")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must be [B, T, heads, D]")
    batch, n_queries, heads, width = q.shape
    n_keys, kv_heads = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must both be [B, Tk, G, D] "
            f"with B={batch}, D={width}"
        )
    if n_keys < n_queries:
        raise ValueError(
            f"q {list(q.shape)} has more positions than k {list(k.shape)}; queries are the last "
            f"Tq positions of the keys, so pass the keys of all of them"
        )
    if heads % kv_heads:
        raise ValueError(
            f"q {list(q.shape)} has {heads} heads, which {kv_heads} key/value heads do not divide; "
            f"fit H or G"
        )
    if doc_ids is not None and tuple(doc_ids.shape) != (batch, n_keys):
        raise ValueError(f"doc_ids has shape {list(doc_ids.shape)}, expected {[batch, n_keys]}")
    if ends is not None:
        ends = normalize_ends(ends, batch, kv_heads, n_keys)
    elif backend != "triton":  # the kernels leave the past out
        ends = q.new_zeros(1, 1, n_keys).bool()
    scale = width**-0.5 if scale is None else scale
    return _implementation(backend)(q, k, v, ends, leading_tokens, doc_ids, scale)


def _implementation(backend: str) -> Callable[..., Tensor]:
    """Imported where it is used: triton is not needed elsewhere."""
    if backend == "triton":
        from attamba.ops.chunk_attention.triton import chunk_attention_triton

        return chunk_attention_triton
    if backend == "reference":
        from attamba.ops.chunk_attention.reference import chunk_attention_reference

        return chunk_attention_reference
    from attamba.ops.chunk_attention.torch import chunk_attention_torch

    return chunk_attention_torch
