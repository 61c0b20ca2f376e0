"""What every mixer over time offers to the decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attamba.modules.cache import LayerCache
from attamba.ops.chunking import Span


class AttentionInputs(NamedTuple):
    """What attention weights follow from; of this rank's tokens and heads, where ranks share."""

    q: Tensor
    """[B, T, H, D], positions applied."""
    k: Tensor
    """[B, T, G, D], positions applied."""
    ends: Tensor | None
    """bool [B or 1, G or 1, T]: keys that are seen beyond the window. None: no key is."""
    leading_tokens: int | None
    """Earlier tokens in the window, besides the query itself; None: all."""


class TimeMixer(nn.Module):
    """The part of a layer that mixes over time."""

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None = None, given: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, d] -> [B, T, d]; with a cache the tokens follow those that it has seen.

        given: bool [B or 1, G or 1, T], the caller's own chunk ends, for mixers that have chunks.
        """
        raise NotImplementedError

    def step(
        self, x: Tensor, norm: nn.Module, span: Span, cache: LayerCache, given: Tensor | None
    ) -> Tensor:
        """x + self(norm(x)) for one token per row, [B, 1, d], on a cache that steps in kernels.

        Mixers that can put the norm and the sum into their products do so here.
        """
        return x + self(norm(x), span, cache, given)

    def attention_inputs(
        self, x: Tensor, span: Span, given: Tensor | None = None
    ) -> AttentionInputs | None:
        """What attention over the tokens x, [B, T, d], would compare; None without attention."""
        return None

    def stacked_projections(self) -> Tensor | None:
        """A copy of the matrices that a decode step multiplies with its input, one on the other.

        Set as LayerCache.stacked it makes one product of several. None where that gains nothing.
        """
        return None

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """What this layer keeps between calls, empty, for `batch` rows."""
        raise NotImplementedError
