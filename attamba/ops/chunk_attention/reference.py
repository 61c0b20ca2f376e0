"""Attention with a dense mask, in fp32."""

from __future__ import annotations

from torch import Tensor

from attamba.ops.chunking import visible


def chunk_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    leading_tokens: int | None,
    doc_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """See chunk_attention; ends is [B or 1, G or 1, Tk]."""
    repeats = q.shape[2] // k.shape[2]
    mask = visible(ends, leading_tokens, q.shape[1], doc_ids)
    mask = mask.expand(-1, k.shape[2], -1, -1).repeat_interleave(repeats, 1)
    qh, kh, vh = (t.float().transpose(1, 2) for t in (q, k, v))
    kh, vh = (t.repeat_interleave(repeats, 1) for t in (kh, vh))
    scores = (qh @ kh.transpose(-1, -2)) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ vh).transpose(1, 2).to(q.dtype)
