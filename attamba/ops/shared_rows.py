"""Attention and scans over rows whose tokens several ranks share.

Each function is the operator of its name where `span` is a whole row, and otherwise computes what
that operator gives for this rank's tokens of it:

    chunk_attention    keys and values are [chunk ends of earlier ranks | the last L tokens before
                       this rank's | its own]: the operator's own rule then sees what it should, as
                       all that lies before the window are ends.
    scans              states are linear in the state that enters: each rank scans from zero, states
                       and decays at the ends of spans are gathered, and what enters is added.

Shapes: B rows, T tokens of a whole row, R ranks, W = T/R tokens of a rank, G key/value heads,
D width of a head, M chunk ends of a rank (the most that one has), L tokens of the window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops.chunk_attention import chunk_attention
from attamba.ops.chunk_scan import chunk_scan
from attamba.ops.chunking import Span, document_starts
from attamba.ops.linear_scan import linear_scan
from attamba.ops.row_ranks import RowRanks

__all__ = ["carry_linear_scan", "carry_scan", "padded", "shared_attention", "with_open_chunk"]


def padded(x: Tensor, span: Span, reach: int) -> Tensor:
    """[B, W, C] -> [B, reach + W, C]: the `reach` inputs before the first token of a convolution
    that runs through documents, zero where they are of another document or none.
    """
    if span.ranks is None:
        return F.pad(x, (0, 0, reach, 0))
    before = span.ranks.before(x, reach)
    before = F.pad(before, (0, 0, reach - before.shape[1], 0))
    distance = torch.arange(reach, 0, -1, device=x.device)
    same = distance <= span.positions[:, :1]
    return torch.cat([before * same[..., None], x], 1)


def with_open_chunk(
    x: Tensor, starts: Tensor, span: Span, longest: int | None
) -> tuple[Tensor, Tensor, Span]:
    """x [B, n + W, d] after the n tokens of earlier ranks whose chunk may go on here.

    starts: bool [B or 1, T] of the whole rows. longest: the most tokens of a chunk, if known. Also
    returns the starts and the span of these tokens, which stand on their own.
    """
    if span.ranks is None:
        return x, starts, span
    if longest is None:
        return _after_longest_open(x, starts, span)
    return _after(longest - 1, x, starts, span)


@torch.compiler.disable  # the size depends on data
def _after_longest_open(x: Tensor, starts: Tensor, span: Span) -> tuple[Tensor, Tensor, Span]:
    assert span.ranks is not None
    return _after(_longest_open(starts, span.ranks.size), x, starts, span)


def _after(n: int, x: Tensor, starts: Tensor, span: Span) -> tuple[Tensor, Tensor, Span]:
    """This rank's tokens after the n before them, with starts and span of all these."""
    assert span.ranks is not None
    joined = torch.cat([span.ranks.before(x, n), x], 1)
    stop = (span.ranks.rank + 1) * x.shape[1]
    tokens = slice(stop - joined.shape[1], stop)
    return joined, starts[:, tokens], Span(span.rows.positions[:, tokens])


def _longest_open(starts: Tensor, size: int) -> int:
    """The most tokens before a rank's first one that belong to its chunk."""
    index = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, index, 0).cummax(1).values
    return int((index - first)[:, :: starts.shape[1] // size].max())  # waits for the device


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor | None,
    span: Span,
    leading_tokens: int | None,
    backend: str,
) -> Tensor:
    """As chunk_attention, q [B, W, H, D], k and v [B, W, G, D]; ends are of whole rows."""
    if span.ranks is None:
        return chunk_attention(q, k, v, ends, leading_tokens, span.doc_ids, backend=backend)
    kv = torch.stack([k.to(q.dtype), v.to(q.dtype)], 2)
    return _attend_among_ranks(q, kv, ends, span, leading_tokens, backend)


@torch.compiler.disable  # sizes depend on data: how many chunks end among a rank's tokens
def _attend_among_ranks(
    q: Tensor, kv: Tensor, ends: Tensor | None, span: Span, lead: int | None, backend: str
) -> Tensor:
    if lead is None:
        keys, doc_ids, ends = *_all_before(kv, span), None
    else:
        keys, ends, doc_ids = _window_and_ends(kv, ends, span, lead)
    k, v = keys.unbind(2)
    return chunk_attention(q, k, v, ends, lead, doc_ids, backend=backend)


def _all_before(kv: Tensor, span: Span) -> tuple[Tensor, Tensor | None]:
    """Keys and values of all tokens up to this rank's last, and their documents."""
    ranks, docs = _place(span)
    earlier = ranks.gather(kv)[: ranks.rank]
    keys = torch.cat([earlier.transpose(0, 1).flatten(1, 2), kv], 1)
    return keys, None if docs is None else docs[:, : keys.shape[1]]


def _window_and_ends(
    kv: Tensor, ends: Tensor | None, span: Span, lead: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[chunk ends | window | own]: keys and values [B, Tk, 2, G, D], their ends and documents."""
    ranks, docs = _place(span)
    window = ranks.before(kv, lead)
    stop = (ranks.rank + 1) * kv.shape[1]
    begin = stop - kv.shape[1] - window.shape[1]
    parts, n_far = [window, kv], 0
    if ends is not None:
        far, is_end = _chunk_ends(kv, ends, span, begin)
        parts, n_far = [far, *parts], far.shape[1]
        near = ends[..., begin:stop]
        rows, heads = max(is_end.shape[0], near.shape[0]), near.shape[1]
        ends = torch.cat([is_end.expand(rows, heads, -1), near.expand(rows, -1, -1)], -1)
    if docs is not None:
        first = docs[:, stop - kv.shape[1], None]  # the one that can reach over: see _chunk_ends
        docs = torch.cat([first.expand(-1, n_far), docs[:, begin:stop]], 1)
    return torch.cat(parts, 1), ends, docs


def _chunk_ends(kv: Tensor, ends: Tensor, span: Span, begin: int) -> tuple[Tensor, Tensor]:
    """Entries at chunk ends of earlier ranks, [B, r M, 2, G, D], and which of them count.

    Those count that stand before token `begin`, where the window begins, in the document of this
    rank's first token: bool [B or 1, G or 1, r M].
    """
    ranks, docs = _place(span)
    width = kv.shape[1]
    index, is_end = _numbered(ends.unflatten(-1, (ranks.size, width)))
    own = index[:, :, ranks.rank].transpose(1, 2)[:, :, None, :, None]  # [b, M, 1, g, 1]
    entries = kv.gather(1, own.expand(kv.shape[0], -1, 2, kv.shape[3], kv.shape[4]))
    # Where the window begins with the row there is nothing before it. What is gathered is cut and
    # not passed over, for the other ranks wait for its gradient.
    earlier = ranks.rank if begin else 0
    far = ranks.gather(entries)[:earlier].transpose(0, 1).flatten(1, 2)
    position = index + width * torch.arange(ranks.size, device=index.device)[:, None]
    counts = is_end & (position < begin)
    if docs is not None:
        start = document_starts(docs)[:, ranks.rank * width]
        counts = counts & (position >= start[:, None, None, None])
    return far, counts[:, :, :earlier].flatten(2)


def _numbered(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The places of each rank's ends, in order, filled up with zeros; and which are ends.

    ends: bool [b, g, R, W] -> int64 and bool [b, g, R, M].
    """
    number = ends.long().cumsum(-1)
    most = int(number[..., -1].max())  # waits for the device
    slot = torch.where(ends, number - 1, most)  # the rest: cut off below
    index = torch.zeros(*ends.shape[:3], most + 1, dtype=torch.long, device=ends.device)
    place = torch.arange(ends.shape[-1], device=ends.device).expand_as(ends)
    index = index.scatter_(-1, slot, place)[..., :most]
    return index, torch.arange(most, device=ends.device) < number[..., -1:]


def carry_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
    ranks: RowRanks | None,
) -> tuple[Tensor, Tensor]:
    """As chunk_scan, y and the last state; B and C are [B, W, K, N].

    With ranks there is no initial_state, and the state is what this rank's tokens leave of zeros.
    """
    y, state = chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        starts,
        D=D,
        initial_state=initial_state,
        return_final_state=True,
        backend=backend,
    )
    if ranks is None:
        return y, state
    with torch.autocast(x.device.type, enabled=False):
        reached = (starts.long().cumsum(1) == 0)[..., None]
        reach = (dt.float() * A.float()).cumsum(1).exp() * reached  # [B, W, S]
        entering = _entering(state, reach[:, -1, :, None, None], ranks)
        groups = entering.unflatten(1, (C.shape[2], -1))  # [B, K, S/K, N, width]
        added = torch.einsum("btkn,bkrnw->btkrw", C.float(), groups).flatten(2, 3)
        return y + (added * reach[..., None]).to(y.dtype), state


def carry_linear_scan(
    a: Tensor,
    b: Tensor,
    starts: Tensor,
    initial_state: Tensor | None,
    backend: str,
    ranks: RowRanks | None,
) -> tuple[Tensor, Tensor]:
    """As linear_scan, states and the last one; see carry_scan."""
    h, state = linear_scan(a, b, starts, initial_state, True, backend)
    if ranks is None:
        return h, state
    ones = torch.ones_like(state)
    reach, all_of_it = linear_scan(a, torch.zeros_like(b), starts, ones, True, backend)
    entering = _entering(state, all_of_it, ranks)
    return h + (reach.float() * entering[:, None]).to(h.dtype), state


def _entering(state: Tensor, decay: Tensor, ranks: RowRanks) -> Tensor:
    """The state before this rank's first token, of what each rank's tokens leave of zeros.

    decay: what they leave of the state that enters, in shapes that broadcast.
    """
    decay = decay.expand(state.shape[0], state.shape[1], *decay.shape[2:])
    n = state.numel()
    sent = torch.cat([state.flatten(), decay.flatten()])
    gathered = ranks.gather(sent)
    entering = gathered[0, :n].view_as(state) * 0.0  # so that rank 0 has a gradient to send
    for r in range(ranks.rank):
        kept = gathered[r, n:].view_as(decay)
        entering = entering * kept + gathered[r, :n].view_as(state)
    return entering


def _place(span: Span) -> tuple[RowRanks, Tensor | None]:
    """The ranks, and the documents of whole rows."""
    assert span.ranks is not None and span.whole is not None
    return span.ranks, span.whole.doc_ids
