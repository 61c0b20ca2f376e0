"""The tokens of one call: where each stands in its row, its document and its chunk.

Shapes: B batch, T tokens of this call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attamba.ops.row_ranks import RowRanks


@dataclass
class Span:
    """The tokens of one call and where each stands in its document.

    positions: int64 [B or 1, T], counted from 0 in each document; -1 on padding.
    tokens:    int64 [B, T] or None where only embeddings are known.
    doc_ids:   int64 [B, T] or None where every row is one document. Padding has an id of its own.
    mask:      bool [B, T], False on (left) padding, or None where there is none.
    offsets:   int64 [B], tokens of each row that came before this call, or None for none.
    draw:      int64 scalar that varies the random policies in training, or None to evaluate.
    memo:      what layers derive from positions alone and share.
    ranks:     those that share the tokens of the rows, of which this is one rank's part, or None.
    whole:     the span of the whole rows, where ranks share them.
    """

    positions: Tensor
    tokens: Tensor | None = None
    doc_ids: Tensor | None = None
    mask: Tensor | None = None
    offsets: Tensor | None = None
    draw: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    ranks: RowRanks | None = None
    whole: Span | None = None

    @property
    def rows(self) -> Span:
        """The span of the whole rows."""
        return self if self.whole is None else self.whole

    @property
    def n_new(self) -> Tensor | int:
        """Real tokens of this call, int64 [B] (or T where there is no padding)."""
        return self.positions.shape[1] if self.mask is None else self.mask.sum(1)

    @property
    def n_pad(self) -> Tensor | None:
        """Padding before the first real token of this call, int64 [B], or None for none."""
        return None if self.mask is None else (~self.mask).sum(1)


def make_span(
    seq: int,
    device: torch.device,
    *,
    tokens: Tensor | None = None,
    doc_ids: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    draw: Tensor | None = None,
) -> Span:
    """Positions of `seq` new tokens, from document ids, left padding and what a cache has seen."""
    index = torch.arange(seq, device=device)[None]
    if doc_ids is not None:
        positions = index - document_starts(doc_ids)
    elif mask is not None:
        doc_ids = mask.long() - 1  # padding: -1, the row's document: 0
        positions = mask.long().cumsum(1) - 1
    else:
        positions = index
    if offsets is not None:
        positions = positions + offsets[:, None]
    if mask is not None:
        positions = positions.masked_fill(~mask, -1)
    return Span(positions, tokens, doc_ids, mask, offsets, draw)


def part_of(whole: Span, ranks: RowRanks) -> Span:
    """This rank's part of a span that has neither padding nor a cache."""
    assert whole.mask is None and whole.offsets is None
    # Copies: as inputs of a compiled graph, views bring along the sizes of what they are views of.
    tokens, doc_ids = (
        None if t is None else ranks.own(t).clone() for t in (whole.tokens, whole.doc_ids)
    )
    positions = ranks.own(whole.positions).clone()
    return Span(positions, tokens, doc_ids, draw=whole.draw, ranks=ranks, whole=whole)


def document_starts(doc_ids: Tensor) -> Tensor:
    """For each position the index at which its document starts in the row. int64 [B, T] -> [B, T].

    A change of id starts a document, so an id that comes back later names another document.
    """
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    first = torch.ones_like(doc_ids, dtype=torch.bool)
    first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return torch.where(first, index, 0).cummax(1).values


def document_bounds(doc_ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each position where its document starts and where it is over, int32 [B, T] each."""
    start = document_starts(doc_ids)
    index = torch.arange(start.shape[1], device=start.device).expand_as(start)
    last = torch.ones_like(start, dtype=torch.bool)
    last[:, :-1] = start[:, 1:] != start[:, :-1]
    stop = torch.where(last, index + 1, start.shape[1]).flip(1).cummin(1).values.flip(1)
    return start.int(), stop.int()


def row_starts(span: Span, batch: int) -> Tensor:
    """For each token the index at which its document starts in the row, int64 [B, T]."""
    if span.doc_ids is not None:
        return document_starts(span.doc_ids)
    seq, device = span.positions.shape[1], span.positions.device
    return torch.zeros(batch, seq, dtype=torch.long, device=device)


def chunk_starts(ends: Tensor, span: Span, last_end: Tensor | None = None) -> Tensor:
    """Where chunks start: after an end, and at the start of a document.

    ends: bool [B or 1, 1, T]. last_end: bool [B], did the token before this call end a chunk?
    Returns bool [B or 1, T].
    """
    after_end = torch.zeros_like(ends[:, 0])
    after_end[:, 1:] = ends[:, 0, :-1]
    starts = after_end | (span.positions == 0)
    if last_end is not None and span.offsets is not None:
        starts = starts | ((span.positions == span.offsets[:, None]) & last_end[:, None])
    return starts if span.mask is None else starts & span.mask
