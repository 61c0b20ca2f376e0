"""Masks and positions as transformers passes them, as the decoder takes them.

Shapes: B batch, T tokens of a call, S tokens with those in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.hf.cache import AttambaCache


def padding(mask: Tensor | None, seq: int, cached: bool) -> Tensor | None:
    """The mask of this call's tokens, bool [B, T]; None where all are real.

    mask: [B, S] or [B, T], 1 on tokens. cached: a cache is used; the decoder then refuses padding
    to the right. Without one it is harmless, for no token sees what follows: it is let through as
    if it were real. Raises ValueError for padding between tokens and for masks that are not 2-D.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] < seq:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; it must be [B, T] with T={seq}, or "
            f"longer by what the cache has seen"
        )
    mask = mask[:, -seq:].bool()
    if cached:
        # generate() goes on with ones; to look is cheap on a CPU, on a GPU it would wait for it.
        real = mask.is_cpu and not torch.compiler.is_compiling() and bool(mask.all())
        return None if real else mask
    started = mask.cumsum(1) > 0
    if not torch.compiler.is_compiling():
        goes_on = mask.flip(1).cumsum(1).flip(1) > 0
        if bool((started & goes_on & ~mask).any()):
            raise ValueError(
                "attention_mask has padding between tokens; pad a row on its left or on its right"
            )
        if bool(started.all()):
            return None
    return started


def packed_documents(positions: Tensor) -> Tensor | None:
    """Document ids [B, T] of rows whose positions [B, T] begin again at 0; None for one each.

    Raises ValueError for positions that do not count 0, 1, 2, ... from each beginning.
    """
    starts = positions == 0
    column = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    begin = torch.where(starts, column, 0).cummax(1).values
    if not torch.compiler.is_compiling():
        if not torch.equal(column - begin, positions):
            _not_ours()
        if not bool(starts[:, 1:].any()):
            return None
    return starts.cumsum(1)


def check_positions(
    positions: Tensor, mask: Tensor | None, cache: AttambaCache | None, doc_ids: Tensor | None
) -> None:
    """Raises ValueError unless positions [B or 1, T] are those that the decoder counts itself."""
    if doc_ids is not None:
        raise ValueError("pass either doc_ids or position_ids: both say where documents begin")
    seen = 0 if cache is None or cache.decode is None else cache.decode.lengths[:, None]
    if mask is None:
        counted = seen + torch.arange(positions.shape[1], device=positions.device)
        wrong = positions != counted
    else:
        wrong = (positions != seen + mask.cumsum(1) - 1) & mask
    if bool(wrong.any()):
        _not_ours()


def _not_ours() -> None:
    raise ValueError(
        "position_ids are not those that the model counts from its tokens (0, 1, 2, ... for each "
        "document, padding left out, after those in the cache); leave position_ids out"
    )
