"""The scores of a first layer, by which other layers' chunks end; see chunking.FirstAttention.

Shapes: B batch, T tokens, H query heads, G key/value heads, D width of a head. `start` is int64
[B, T]: the index at which each token's document starts in its row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def last_key_scores(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
    """Each token's query times the key of its document's last token, float32 [B, T], detached.

    q: [B, T, H, D], k: [B, T, G, D], positions applied; the first head alone counts.
    """
    last = (start + _lengths(start) - 1)[..., None].expand(-1, -1, k.shape[3])
    k_last = k[:, :, 0].detach().float().gather(1, last)
    return (q[:, :, 0].detach().float() * k_last).sum(-1) / math.sqrt(k.shape[3])


def highest(scores: Tensor, start: Tensor, chunk_size: int) -> Tensor:
    """Which tokens are among the length / P highest of their document: float [B, T] -> bool."""
    by_score = scores.argsort(stable=True, dim=1, descending=True)
    order = by_score.gather(1, start.gather(1, by_score).argsort(stable=True, dim=1))
    place = torch.arange(scores.shape[1], device=scores.device) - start.gather(1, order)
    rank = torch.empty_like(order).scatter(1, order, place)
    return rank < _lengths(start) // chunk_size


def _lengths(start: Tensor) -> Tensor:
    """Tokens of each token's document, int64 [B, T]."""
    counts = torch.zeros_like(start).scatter_add(1, start, torch.ones_like(start))
    return counts.gather(1, start)
