"""The decode cache: ring, past and state.

Per layer:

    ring     keys and values of the last L+1 tokens (rotary positions applied at write)
    past     keys and values of chunk ends older than the window
    state    the compressors' h and their last convolution inputs

One rule keeps it exact: when a position leaves the ring it moves to the past if it ends a chunk,
and is forgotten otherwise. Ring and past share one buffer, the ring first. The past is empty until
the ring is full, so what is held is always a prefix of the buffer: a step attends to that prefix,
with no mask. Heads may have ends of their own; the rule then holds head by head.

Shapes: B batch, T tokens of a call, G key/value heads, D width of a head, R = L+1 ring slots,
g = G where heads have ends of their own, else 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops import chunk_attention
from attamba.ops.chunking import Boundary, Span, make_span

BLOCK = 256
"""Entries by which a buffer grows."""


class KVCache:
    """Keys and values of one layer, for B sequences of lengths of their own.

    window: ring slots R = L+1, or None for an unbounded ring (plain per-token cache).
    per_head: heads have chunk ends of their own.
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
    ) -> None:
        self.window = window
        self.k = torch.empty(batch, n_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        heads = n_kv_heads if per_head else 1
        self.n_past = torch.zeros(batch, heads, dtype=torch.long, device=device)
        self.ring_ends = torch.zeros(batch, heads, window or 0, dtype=torch.bool, device=device)
        self.last_end = torch.zeros(batch, dtype=torch.bool, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("k", "v", "n_past", "ring_ends", "last_end")}

    def used_bytes(self, lengths: Tensor) -> int:
        """Bytes of the keys and values that are held."""
        entries = self._ring_used(lengths)[:, None] + self.n_past
        entries = entries.expand(-1, self.k.shape[1])
        return 2 * int(entries.sum()) * self.k.shape[3] * self.k.element_size()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ends: Tensor,
        span: Span,
        lead: int | None,
        backend: str,
    ) -> Tensor:
        """Attention of new tokens to what is held and to each other; holds them afterwards.

        q: [B, T, H, D], k, v: [B, T, G, D], ends: bool [B or 1, g, T]. Returns [B, T, H, D].
        """
        assert span.offsets is not None
        if k.shape[1] == 1:
            self.append(k, v, ends, span)
            return self._attend_held(q, span.offsets + span.n_new)
        keys, values, all_ends, doc_ids = self._context(k, v, ends, span)
        out = chunk_attention(q, keys, values, all_ends, lead, doc_ids, backend=backend)
        self.append(k, v, ends, span)
        return out

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, ends: Tensor, span: Span) -> None:
        """The rule: write new tokens to the ring, move leaving chunk ends to the past."""
        batch, seq = k.shape[:2]
        assert span.offsets is not None
        positions = span.positions.expand(batch, -1)
        ends = ends.expand(batch, self.n_past.shape[1], -1)
        lengths = span.offsets + span.n_new
        if self.window is not None:
            self._evict(k, v, ends, positions, span.offsets)
        self._reserve(int(self._ring_used(lengths).max()))
        keep = positions >= 0
        if self.window is not None and seq > self.window:
            keep = keep & (positions >= (lengths - self.window)[:, None])
        rows, tokens = keep.nonzero(as_tuple=True)
        slots = positions[rows, tokens]
        if self.window is not None:
            slots = slots % self.window
            self.ring_ends[rows, :, slots] = ends[rows, :, tokens]
        self.k[rows, :, slots] = k[rows, tokens].to(self.k.dtype)
        self.v[rows, :, slots] = v[rows, tokens].to(self.v.dtype)
        # Only the last token can start the next call's chunk; an all-padding row keeps its flag.
        self.last_end = torch.where(positions[:, -1] >= 0, ends[:, 0, -1], self.last_end)

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
        held_end = self.ring_ends.gather(2, slot[:, None].expand(-1, ends.shape[1], -1))
        new_end = ends.index_select(2, token.clamp(min=0))
        is_end = torch.where(was_held[:, None], held_end, new_end) & (leaving >= 0)[:, None]
        if not is_end.any():
            return
        rank = is_end.long().cumsum(2) - 1 + self.n_past[..., None]
        self.n_past = self.n_past + is_end.sum(2)
        self._reserve(self.window + int(self.n_past.max()))
        rows, heads, tokens = is_end.expand(-1, k.shape[2], -1).nonzero(as_tuple=True)
        target = self.window + rank.expand(-1, k.shape[2], -1)[rows, heads, tokens]
        source, held = slot[rows, tokens], was_held[rows, tokens][:, None]
        from_call = token.clamp(min=0)[tokens]
        for buffer, new in ((self.k, k), (self.v, v)):
            moved = torch.where(
                held, buffer[rows, heads, source], new[rows, from_call, heads].to(buffer.dtype)
            )
            buffer[rows, heads, target] = moved

    def _attend_held(self, q: Tensor, lengths: Tensor) -> Tensor:
        """One query a row against the prefix that is held."""
        batch, _, n_heads, width = q.shape
        held = self._ring_used(lengths)[:, None] + self.n_past  # [B, g]
        most = int(held.max())
        if most == 0:  # every row is padding
            return torch.zeros_like(q)
        mask = None
        if int(held.min()) != most:
            held = held.clamp(min=1)  # a row of padding alone looks at nothing of use
            mask = (torch.arange(most, device=q.device) < held[..., None])[:, :, None]
        # The query heads of one key/value head stand where a sequence of queries would.
        qg = q.view(batch, self.k.shape[1], -1, width).to(self.k.dtype)
        out = F.scaled_dot_product_attention(
            qg, self.k[:, :, :most], self.v[:, :, :most], attn_mask=mask
        )
        return out.reshape(batch, 1, n_heads, width).to(q.dtype)

    def _context(
        self, k: Tensor, v: Tensor, ends: Tensor, span: Span
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What new tokens can see, in order of position: [past | ring | new tokens].

        Returns keys and values [B, Tk, G, D], ends [B, g, Tk] and document ids [B, Tk] or None.
        A row with a shorter ring, or with padding, has nothing (document -1) at its left.
        """
        assert span.offsets is not None
        batch, seq = k.shape[:2]
        ends = ends.expand(batch, self.n_past.shape[1], -1)
        offsets = span.offsets
        ring_used = self._ring_used(offsets)
        n_ring, n_past = int(ring_used.max()), int(self.n_past.max())
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

        def merge(buffer: Tensor, new: Tensor) -> Tensor:
            past = buffer[:, :, self._ring_slots :][:, :, :n_past].transpose(1, 2)
            index = slot[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            ring = buffer.gather(2, index).transpose(1, 2)
            index = token[..., None, None].expand(-1, -1, *new.shape[2:])
            recent = torch.where(is_new[..., None, None], new.gather(1, index).to(ring), ring)
            return torch.cat([past, recent], 1)

        recent_ends = torch.where(
            is_new[:, None], ends.gather(2, token[:, None].expand(-1, ends.shape[1], -1)), False
        )
        if self.window is not None:
            ring_ends = self.ring_ends.gather(2, slot[:, None].expand(-1, ends.shape[1], -1))
            recent_ends = recent_ends | (ring_ends & held[:, None])
        past_ends = torch.arange(n_past, device=k.device) < self.n_past[..., None]
        doc_ids = None
        if span.mask is not None or int(ring_used.min()) != n_ring:
            # What lies left of a full ring is out of the window's reach; a partial ring has no
            # past either, so that all to its left can be another document.
            nothing = ~is_new & ~held
            if self.window is not None:
                nothing = nothing & (ring_used < self.window)[:, None]
            doc_ids = F.pad(nothing.long().neg(), (n_past, 0))
        all_ends = torch.cat([past_ends, recent_ends], 2)
        return merge(self.k, k), merge(self.v, v), all_ends, doc_ids

    @property
    def _ring_slots(self) -> int:
        return self.k.shape[2] if self.window is None else self.window

    def _ring_used(self, lengths: Tensor) -> Tensor:
        return lengths if self.window is None else lengths.clamp(max=self.window)

    def _reserve(self, entries: int) -> None:
        """Grow both buffers in blocks until they hold `entries`."""
        missing = entries - self.k.shape[2]
        if missing > 0:
            grow = (0, 0, 0, -(-missing // BLOCK) * BLOCK)
            self.k, self.v = F.pad(self.k, grow), F.pad(self.v, grow)


class CompressorState:
    """State of the K and the V compressor of one layer.

    h: float32 [B, 2S, N, E/S].
    conv: [B, width-1, 2(E+2N)], the last inputs of the convolution, zero where they belong to an
        earlier chunk.
    """

    def __init__(self, h: Tensor, conv: Tensor) -> None:
        self.h, self.conv = h, conv

    def tensors(self) -> dict[str, Tensor]:
        return {"h": self.h, "conv": self.conv}


@dataclass
class LayerCache:
    """What one layer keeps between calls."""

    kv: KVCache
    state: CompressorState | None = None
    boundary: Boundary | None = None
    carry: Tensor | None = None
    """What the boundary policy must remember, int64 [B]."""

    def parts(self) -> Iterator[tuple[KVCache | CompressorState, str, Tensor]]:
        for owner in (self.kv, self.state):
            if owner is not None:
                for name, tensor in owner.tensors().items():
                    yield owner, name, tensor


class DecodeCache:
    """The cache of a whole model, for B sequences of lengths of their own.

    lengths: int64 [B], real tokens seen by each row. Made by ``model.new_cache``.
    """

    def __init__(self, layers: list[LayerCache], lengths: Tensor, vocab_size: int) -> None:
        self.layers, self.lengths, self.vocab_size = layers, lengths, vocab_size

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    def nbytes(self, used: bool = False) -> int:
        """Bytes of the cache.

        used=False: all memory allocated, bookkeeping and spare room included.
        used=True: keys, values and states that are held, by the formula
        2 G D itemsize (min(T, L+1) + chunk ends older than the window)
        + 2 (S (E/S) N 4 + 3 (E + 2N) itemsize), summed over rows and layers.
        """
        total = 0 if used else _bytes(self.lengths)
        for layer in self.layers:
            if used:
                total += layer.kv.used_bytes(self.lengths)
                if layer.state is not None:
                    total += sum(map(_bytes, layer.state.tensors().values()))
            else:
                total += sum(_bytes(tensor) for _, _, tensor in layer.parts())
                total += 0 if layer.carry is None else _bytes(layer.carry)
        return total

    def reset(self) -> None:
        """Forget everything, rows and dtype stay. Memory is given back."""
        for layer in self.layers:
            kv = layer.kv
            kv.k, kv.v = kv.k[:, :, :0].clone(), kv.v[:, :, :0].clone()
            for _, name, tensor in layer.parts():
                if name not in ("k", "v"):
                    tensor.zero_()
            layer.carry = None
        self.lengths.zero_()

    def reorder(self, index: Tensor) -> None:
        """Row i becomes a copy of row index[i]; rows may be forked, dropped, reordered.

        index: int64 [B'], each in [0, B). Raises ValueError for any other.
        """
        if index.dim() != 1 or index.dtype != torch.long:
            raise ValueError(f"index must be int64 [B'], not {index.dtype} {list(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise ValueError(f"index={index.tolist()} must name rows 0..{self.batch_size - 1}")
        for layer in self.layers:
            for owner, name, tensor in list(layer.parts()):
                setattr(owner, name, tensor.index_select(0, index))
            if layer.carry is not None:
                layer.carry = layer.carry.index_select(0, index)
        self.lengths = self.lengths.index_select(0, index)

    def fill(self, n_tokens: int, generator: torch.Generator | None = None) -> None:
        """Append synthetic tokens to every layer by its own rule, without running the model.

        For measurements: counts, bytes and evictions are those of a real sequence of n_tokens,
        keys and values are random. Raises ValueError where boundary is "given".
        """
        device = self.lengths.device
        for begin in range(0, n_tokens, 4096):
            seq = min(4096, n_tokens - begin)
            tokens = torch.randint(self.vocab_size, (self.batch_size, seq), generator=generator)
            span = make_span(seq, device, tokens=tokens.to(device), offsets=self.lengths)
            for layer in self.layers:
                batch, heads, _, width = layer.kv.k.shape
                shape = (batch, seq, heads, width)
                k, v = (torch.randn(shape, generator=generator).to(layer.kv.k) for _ in range(2))
                ends = torch.zeros(1, 1, seq, dtype=torch.bool, device=device)
                if layer.boundary is not None:
                    ends, layer.carry = layer.boundary(span, layer.carry)
                layer.kv.append(k, v, ends, span)
            self.lengths = self.lengths + seq


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
