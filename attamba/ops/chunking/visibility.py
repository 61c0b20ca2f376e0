"""Who sees whom, and in which shapes the caller says where chunks end.

Shapes: B batch, T tokens, Tk keys, G key/value heads, L leading tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.ops.chunking.spans import document_starts


def visible(
    ends: Tensor, leading_tokens: int | None, n_queries: int, doc_ids: Tensor | None = None
) -> Tensor:
    """The visibility rule as a dense mask, for references and pictures.

    ends: bool [B or 1, G or 1, Tk] of the keys. The queries are the last `n_queries` positions.
    doc_ids: int64 [B, Tk] or None. Returns bool [B or 1, G or 1, n_queries, Tk].
    """
    n_keys = ends.shape[-1]
    s = torch.arange(n_keys, device=ends.device)
    t = s[n_keys - n_queries :, None]
    causal = s <= t
    if leading_tokens is None:
        seen = causal[None, None].expand(ends.shape[0], ends.shape[1], -1, -1)
    else:
        seen = causal & ((s >= t - leading_tokens) | ends[..., None, :])
    if doc_ids is not None:
        start = document_starts(doc_ids)
        seen = seen & (start[:, None, n_keys - n_queries :, None] <= s)
    return seen


def normalize_ends(ends: Tensor, batch: int, heads: int, seq: int) -> Tensor:
    """[T], [B, T] or [B, G, T] -> [B or 1, G or 1, T]. Raises ValueError naming the shapes."""
    if ends.dtype != torch.bool:
        raise ValueError(f"ends must be boolean, not {ends.dtype}; use ends.bool()")
    shaped = {1: lambda: ends[None, None], 2: lambda: ends[:, None], 3: lambda: ends}
    out = shaped[ends.dim()]() if ends.dim() in shaped else None
    if (
        out is None
        or out.shape[0] not in (1, batch)
        or out.shape[1] not in (1, heads)
        or out.shape[2] != seq
    ):
        raise ValueError(
            f"ends has shape {list(ends.shape)}; it must be [T], [B, T] or [B, G, T] "
            f"with B={batch}, G={heads}, T={seq}"
        )
    return out
