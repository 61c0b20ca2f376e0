"""The decode step in plain PyTorch. The host reads lengths and counts, which on a CPU is free.

Shapes: B rows, H query heads, G key/value heads, D width of a head, R ring entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops.chunk_decode.held import Held


def attend_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    lengths: Tensor,
    ends: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """See attend_step; rotary positions are applied and `more` is added."""
    length = hold_token(k, v, held, lengths, ends, mask)
    if length is not None:  # all rows hold as many, but for their past
        used = length if held.window is None else min(length, held.window)
        least, most = (used + past for past in held.past_range())
        n_held = used + held.n_past if least != most else None
    else:
        new = 1 if mask is None else mask.long()
        n_held = held.ring_used(lengths + new)[:, None] + held.n_past
        least, most = torch.stack(n_held.aminmax()).tolist()
    return _attend(q, held, n_held, least, most)


@torch.no_grad()
def hold_token(
    k: Tensor, v: Tensor, held: Held, lengths: Tensor, ends: Tensor | None, mask: Tensor | None
) -> int | None:
    """Write one token's key and value [B, G, D] by the rule; what it pushes out goes or stays.

    Returns the tokens that every row has then, or None where rows differ.
    """
    seen = lengths.tolist()
    if mask is None and min(seen) == max(seen):
        _hold_alike(k, v, held, seen[0], ends)
        return seen[0] + 1
    _hold_rows(k, v, held, lengths, ends, mask)
    return None


def _hold_alike(k: Tensor, v: Tensor, held: Held, length: int, ends: Tensor | None) -> None:
    """Rows of one length: the ring entry is the same for all."""
    entry = length
    if held.window is not None:
        entry = length % held.window
        if length >= held.window:
            leaving = held.ring_ends[:, :, entry]
            if leaving.any():
                _to_past(leaving.nonzero(as_tuple=True), entry, held)
    held.reserve(entry + 1)
    block, at = held.blocks.locate(entry)
    held.blocks.k[block][:, :, at] = k
    held.blocks.v[block][:, :, at] = v
    if ends is not None:
        if held.window is not None:
            held.ring_ends[:, :, entry] = ends
        held.last_end.copy_(ends[:, 0])


def _to_past(leaving: tuple[Tensor, ...], entry: int | Tensor, held: Held) -> None:
    """Move an entry of rows and heads leaving = (rows, heads) from the ring to the past."""
    assert held.window is not None
    rows, heads = leaving
    target = held.window + held.n_past[rows, heads]
    held.n_past[rows, heads] += 1
    held.known_past = None
    held.reserve(held.window + held.past_range()[1])
    k, v = held.blocks.k[0][rows, heads, entry], held.blocks.v[0][rows, heads, entry]
    held.blocks.put(rows, heads, target, k, v)


def _hold_rows(
    k: Tensor, v: Tensor, held: Held, lengths: Tensor, ends: Tensor | None, mask: Tensor | None
) -> None:
    """Rows of lengths of their own, some of which may be frozen."""
    new = torch.ones_like(lengths, dtype=torch.bool) if mask is None else mask
    entries = lengths
    if held.window is not None:
        entries = lengths % held.window
        full = new & (lengths >= held.window)
        index = entries[:, None, None].expand(-1, held.heads, -1)
        leaving = held.ring_ends.gather(2, index)[..., 0] & full[:, None]
        rows, heads = leaving.nonzero(as_tuple=True)
        _to_past((rows, heads), entries[rows], held)
    used = held.ring_used(lengths + new.long()).max()
    held.reserve(int(used))
    (rows,) = new.nonzero(as_tuple=True)
    held.blocks.put(rows, slice(None), entries[rows], k[rows], v[rows])
    if ends is not None:
        ends = ends.expand(held.batch, -1)
        if held.window is not None:
            ring = ends.expand(-1, held.heads) if ends.shape[1] == 1 else ends
            held.ring_ends[rows, :, entries[rows]] = ring[rows]
        held.last_end.copy_(torch.where(new, ends[:, 0], held.last_end))


def _attend(q: Tensor, held: Held, n_held: Tensor | None, least: int, most: int) -> Tensor:
    """One query a row, [B, H, D], against the entries that are held.

    n_held: int64 [B, G], between least and most; None where they are the same.
    """
    if most == 0:  # every row is padding
        return torch.zeros_like(q)
    batch, heads, width = q.shape
    # The query heads of one key/value head stand where a sequence of queries would.
    grouped = q.reshape(batch * held.heads, -1, width)
    dtype = held.blocks.dtype
    ragged = None
    if n_held is not None and least != most:
        column = torch.arange(least, most, device=q.device)
        # a row of padding alone looks at nothing of use
        ragged = (column >= n_held.flatten().clamp(min=1)[:, None])[:, None]
    if len(held.blocks.k) == 1 and dtype != torch.float32:
        mask = None if ragged is None else F.pad(~ragged, (least, 0), value=True)
        k, v = (t.flatten(0, 1) for t in held.blocks.joined(most))
        out = F.scaled_dot_product_attention(grouped.to(dtype), k, v, attn_mask=mask)
    else:
        out = _attend_blocks(grouped.float(), held, most, ragged)
    return out.reshape(batch, heads, width).to(q.dtype)


def _attend_blocks(q: Tensor, held: Held, most: int, ragged: Tensor | None) -> Tensor:
    """Products block by block, one softmax. q: float32 [B*G, H/G, D]; ragged: see _attend."""
    spans, left = [], most
    for k, v in zip(held.blocks.k, held.blocks.v):
        here = min(left, k.shape[2])
        if here:
            spans.append((k.flatten(0, 1)[:, :here].float(), v.flatten(0, 1)[:, :here].float()))
        left -= here
    q = q * q.shape[-1] ** -0.5
    scores = [torch.bmm(q, k.transpose(1, 2)) for k, _ in spans]
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    if ragged is not None:
        joined[..., most - ragged.shape[-1] :].masked_fill_(ragged, float("-inf"))
    weights = joined.softmax(-1).split([k.shape[1] for k, _ in spans], -1)
    out = torch.bmm(weights[0], spans[0][1])
    for weight, (_, v) in zip(weights[1:], spans[1:]):
        out = torch.baddbmm(out, weight, v)
    return out
