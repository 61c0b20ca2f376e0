"""Keys and values of one layer in the decode cache: a ring of recent tokens, and the past.

When a position leaves the ring it moves to the past if it ends a chunk, and is forgotten otherwise,
head by head. How entries lie in memory is told in ops.chunk_decode, which also takes the step of
one token; here is what several tokens at once do.

Shapes: B batch, T tokens of a call, G key/value heads, D width of a head, R = L+1 ring slots,
g = G where heads have ends of their own, else 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops import chunk_attention
from attamba.ops.backends import choose
from attamba.ops.chunk_decode import Held, attend_step
from attamba.ops.chunk_decode.torch import hold_token
from attamba.ops.chunking import Span


class KVCache(Held):
    """Keys and values of one layer, for B sequences of lengths of their own.

    window: ring slots R = L+1, or None for an unbounded ring (plain per-token cache).
    per_head: heads have chunk ends of their own.
    backend: see attamba.ops.
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        window: int | None,
        per_head: bool,
        dtype: torch.dtype,
        device: torch.device,
        backend: str = "auto",
    ) -> None:
        super().__init__(batch, n_kv_heads, head_dim, window, dtype, device)
        self.per_head, self.backend = per_head, backend

    @property
    def by_kernel(self) -> bool:
        """Does a step of one token run in kernels, which cannot make room for themselves?"""
        return choose(self.backend, self.blocks.device, self.blocks.dtype) == "triton"

    @property
    def k(self) -> Tensor:
        """All entries' keys [B, G, entries, D], the unused among them; maybe a copy."""
        return self.blocks.joined(self.blocks.capacity)[0]

    @property
    def v(self) -> Tensor:
        """All entries' values, as k."""
        return self.blocks.joined(self.blocks.capacity)[1]

    def used_bytes(self, lengths: Tensor) -> int:
        """Bytes of the keys and values that are held."""
        entries = self.ring_used(lengths)[:, None] + self.n_past
        return 2 * int(entries.sum()) * self.blocks.shape[2] * self.blocks.dtype.itemsize

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ends: Tensor | None,
        span: Span,
        lead: int | None,
    ) -> Tensor:
        """Attention of several new tokens to what is held and to each other; holds them then.

        q: [B, T, H, D], k, v: [B, T, G, D], ends: bool [B or 1, G or 1, T], None for nowhere.
        Returns [B, T, H, D]. One token alone: see attend_step.
        """
        keys, values, all_ends, doc_ids = self._context(k, v, ends, span)
        out = chunk_attention(q, keys, values, all_ends, lead, doc_ids, backend=self.backend)
        self.append(k, v, ends, span)
        return out

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, ends: Tensor | None, span: Span) -> None:
        """The rule: write new tokens to the ring, move leaving chunk ends to the past."""
        batch, seq = k.shape[:2]
        assert span.offsets is not None
        if seq == 1:
            mask = None if span.mask is None else span.mask[:, 0]
            last = None if ends is None else ends[..., 0]
            hold_token(k[:, 0], v[:, 0], self, span.offsets, last, mask)
            return
        positions = span.positions.expand(batch, -1)
        lengths = span.offsets + span.n_new
        if ends is not None and self.window is not None:
            self._evict(k, v, ends, positions, span.offsets)
        self.reserve(int(self.ring_used(lengths).max()))
        keep = positions >= 0
        if self.window is not None and seq > self.window:
            keep = keep & (positions >= (lengths - self.window)[:, None])
        rows, tokens = keep.nonzero(as_tuple=True)
        slots = positions[rows, tokens]
        if self.window is not None:
            slots = slots % self.window
        self.blocks.put(rows, slice(None), slots, k[rows, tokens], v[rows, tokens])
        if ends is None:
            return
        ends = ends.expand(batch, self.heads, -1)
        if self.window is not None:
            self.ring_ends[rows, :, slots] = ends[rows, :, tokens]
        # Only the last token can start the next call's chunk; an all-padding row keeps its flag.
        last_end = torch.where(positions[:, -1] >= 0, ends[:, 0, -1], self.last_end)
        self.last_end.copy_(last_end)

    def _evict(
        self, k: Tensor, v: Tensor, ends: Tensor, positions: Tensor, offsets: Tensor
    ) -> None:
        """Each new token pushes out the one R before it, from the ring or from this very call."""
        assert self.window is not None
        seq = positions.shape[1]
        leaving = positions - self.window
        was_held = leaving < offsets[:, None]
        token = torch.arange(seq, device=k.device) - self.window  # of a leaver from this call
        slot = leaving.clamp(min=0) % self.window
        held_end = self.ring_ends.gather(2, slot[:, None].expand(-1, self.heads, -1))
        new_end = ends.index_select(2, token.clamp(min=0))
        is_end = torch.where(was_held[:, None], held_end, new_end) & (leaving >= 0)[:, None]
        rank = is_end.long().cumsum(2) - 1 + self.n_past[..., None]
        rows, heads, tokens = is_end.nonzero(as_tuple=True)
        if not rows.numel():
            return
        self.n_past += is_end.sum(2)
        self.known_past = None
        self.reserve(self.window + self.past_range()[1])
        target = self.window + rank[rows, heads, tokens]
        source, held = slot[rows, tokens], was_held[rows, tokens][:, None]
        from_call = token.clamp(min=0)[tokens]
        moved = [
            torch.where(held, first[rows, heads, source], new[rows, from_call, heads].to(first))
            for first, new in ((self.blocks.k[0], k), (self.blocks.v[0], v))
        ]
        self.blocks.put(rows, heads, target, *moved)

    def _context(
        self, k: Tensor, v: Tensor, ends: Tensor | None, span: Span
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What new tokens can see, in order of position: [past | ring | new tokens].

        Returns keys and values [B, Tk, G, D], ends [B, g, Tk] or None for nowhere, and document ids
        [B, Tk] or None. A row with a shorter ring, or with padding, has nothing (document -1) at
        its left.
        """
        assert span.offsets is not None
        batch, seq = k.shape[:2]
        offsets = span.offsets
        ring_used = self.ring_used(offsets)
        n_ring, n_past = int(ring_used.max()), self.past_range()[1]
        if n_ring == 0:
            return k, v, ends, span.doc_ids
        lengths = offsets + span.n_new
        column = torch.arange(n_ring + seq, device=k.device)
        position = lengths[:, None] - (n_ring + seq) + column
        is_new = position >= offsets[:, None]
        held = ~is_new & (position >= (offsets - ring_used)[:, None])
        slot = position.clamp(min=0)
        if self.window is not None:
            slot = slot % self.window
        slot = torch.where(held, slot, 0)
        token = (column - n_ring).clamp(min=0).expand(batch, -1)

        def merge(held: Tensor, new: Tensor) -> Tensor:
            index = slot[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            ring = held.gather(2, index).transpose(1, 2)
            index = token[..., None, None].expand(-1, -1, *new.shape[2:])
            recent = torch.where(is_new[..., None, None], new.gather(1, index).to(ring), ring)
            past = held[:, :, self.window or held.shape[2] :].transpose(1, 2)
            return torch.cat([past, recent], 1)

        if ends is not None:
            g = self.heads if self.per_head else 1
            index = token[:, None].expand(-1, g, -1)
            recent_ends = ends.expand(batch, g, -1).gather(2, index) & is_new[:, None]
            if self.window is not None:
                ring_ends = self.ring_ends[:, :g].gather(2, slot[:, None].expand(-1, g, -1))
                recent_ends = recent_ends | (ring_ends & held[:, None])
            past_ends = torch.arange(n_past, device=k.device) < self.n_past[:, :g, None]
            ends = torch.cat([past_ends, recent_ends], 2)
        doc_ids = None
        if span.mask is not None or int(ring_used.min()) != n_ring:
            # What lies left of a full ring is out of the window's reach; a partial ring has no
            # past either, so that all to its left can be another document.
            nothing = ~is_new & ~held
            if self.window is not None:
                nothing = nothing & (ring_used < self.window)[:, None]
            doc_ids = F.pad(nothing.long().neg(), (n_past, 0))
        entries = n_ring if self.window is None else self.window + n_past
        held_k, held_v = self.blocks.joined(entries)
        return merge(held_k, k), merge(held_v, v), ends, doc_ids


def attend_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    span: Span,
    kv: KVCache,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A decode step: q [B, 1, H, D], k and v [B, 1, G, D] before positions -> [B, 1, H * D].

    ends: bool [B or 1, G or 1, 1]. more: two tensors [B, G, D] to add to k and v.
    """
    assert span.offsets is not None
    out = attend_step(
        q[:, 0],
        k[:, 0],
        v[:, 0],
        kv,
        span.offsets,
        ends=None if ends is None else ends[..., 0],
        mask=None if span.mask is None else span.mask[:, 0],
        rotary=(rotary[0][:, 0], rotary[1][:, 0]),
        more=more,
        backend=kv.backend,
    )
    return out.flatten(1)[:, None]
