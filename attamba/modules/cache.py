"""The decode cache: ring, past and state.

Per layer:

    ring     keys and values of the last L+1 tokens (rotary positions applied at write)
    past     keys and values of chunk ends older than the window
    state    the compressors' h and their last convolution inputs

Ring and past: see kv_cache. A recurrent mixer has a state alone.

Shapes: B batch, T tokens of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attamba.modules.kv_cache import KVCache
from attamba.ops.chunking import Boundary, make_span

SLACK = 64
"""Steps that a cache has room for after it has asked the device how full it is."""


class State:
    """What a recurrence keeps of its past: attributes that are tensors with a row first, [B, ...].

    All are zero before the first token.
    """

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def update(self, **tensors: Tensor) -> None:
        """Take new values; on a GPU in their place, where a captured step looks."""
        for name, new in tensors.items():
            old = getattr(self, name)
            if old.is_cuda and not torch.is_grad_enabled():
                old.copy_(new)
            else:  # not a view that keeps more alive
                setattr(self, name, new.detach().to(old.dtype, copy=True))


class ScanState(State):
    """State of a scan behind a convolution.

    h: float32, [B, 2S, N, E/S] of the K and the V compressor, [B, S, N, E/S] of Mamba-2, [B, C] of
        a linear recurrence.
    conv: [B, width-1, channels], the last inputs of the convolution, zero where they belong to an
        earlier chunk.
    """

    def __init__(self, h: Tensor, conv: Tensor) -> None:
        self.h, self.conv = h, conv


@dataclass
class LayerCache:
    """What one layer keeps between calls: keys and values, a state, or both."""

    kv: KVCache | None = None
    state: State | None = None
    boundary: Boundary | None = None
    carry: Tensor | None = None
    """What the boundary policy must remember, int64 [B]."""
    stacked: Tensor | None = None
    """Weights of the mixer's projections in one matrix, where whoever takes many steps made it."""

    @property
    def by_kernel(self) -> bool:
        """Does a step of one token run on the device alone, so that it can be captured?"""
        if self.kv is not None:
            return self.kv.by_kernel
        assert self.state is not None
        return all(tensor.is_cuda for tensor in self.state.tensors().values())

    def keep(self, carry: Tensor | None) -> None:
        """What the boundary policy returned; on a GPU in its place, where a captured step looks."""
        if carry is not None and self.carry is not None and carry.is_cuda:
            self.carry.copy_(carry)
        else:
            self.carry = carry

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        if self.kv is not None:
            yield from self.kv.blocks.tensors()
        for part in (self.kv, self.state):
            if part is not None:
                yield from part.tensors().values()
        if self.carry is not None:
            yield self.carry

    def reset(self) -> None:
        """Forget everything. The memory of keys and values is given back."""
        if self.kv is not None:
            self.kv.reset()
        if self.state is not None:
            for tensor in self.state.tensors().values():
                tensor.zero_()
        self.carry = None

    def select(self, index: Tensor) -> None:
        """Row i becomes a copy of row index[i]."""
        if self.kv is not None:
            self.kv.select(index)
        if self.state is not None:
            for name, tensor in self.state.tensors().items():
                setattr(self.state, name, tensor.index_select(0, index))
        if self.carry is not None:
            self.carry = self.carry.index_select(0, index)


class DecodeCache:
    """The cache of a whole model, for B sequences of lengths of their own.

    lengths: int64 [B], real tokens seen by each row. Made by ``model.new_cache``.
    """

    def __init__(self, layers: list[LayerCache], lengths: Tensor, vocab_size: int) -> None:
        self.layers, self.lengths, self.vocab_size = layers, lengths, vocab_size
        self._steps_with_room, self._room_is_made = 0, False

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def by_kernel(self) -> bool:
        """Does every layer step on the device alone?"""
        return all(layer.by_kernel for layer in self.layers)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        yield self.lengths
        for layer in self.layers:
            yield from layer.tensors()

    def before(self, n_tokens: int) -> None:
        """Call before a forward pass over n_tokens: kernels, which cannot grow it, need room.

        While single tokens come, the device is asked for its counts once in SLACK steps.
        """
        if n_tokens > 1:  # afterwards nothing is known of the room that is left
            self._steps_with_room = 0
            return
        if self._room_is_made:
            return
        layers = [layer.kv for layer in self.layers if layer.kv is not None and layer.by_kernel]
        if not layers:
            return
        if self._steps_with_room == 0:
            counts = [self.lengths.max(), *(kv.n_past.max() for kv in layers)]
            longest, *most_past = torch.stack(counts).tolist()
            for kv, past in zip(layers, most_past):
                kv.reserve((longest if kv.window is None else kv.window + past) + SLACK)
            self._steps_with_room = SLACK
        self._steps_with_room -= 1

    @contextmanager
    def room_is_made(self) -> Iterator[None]:
        """A forward pass inside must not wait for the device: `before` has been called."""
        self._room_is_made = True
        try:
            yield
        finally:
            self._room_is_made = False

    def steady(self) -> Iterator[Tensor]:
        """What a captured step reaches by address: all but the blocks of keys and values."""
        yield self.lengths
        for layer in self.layers:
            if layer.kv is not None:
                yield layer.kv.blocks.page_table()
                yield from layer.kv.tensors().values()
            if layer.state is not None:
                yield from layer.state.tensors().values()
            if layer.carry is not None:
                yield layer.carry

    def nbytes(self, used: bool = False) -> int:
        """Bytes of the cache.

        used=False: all memory allocated, bookkeeping and spare room included.
        used=True: keys, values and states that are held, by the formula below, summed over rows
            and layers. (Layers without attention, other compressors: accounting.cache_bytes.)

            2 G D itemsize (min(T, L+1) + chunk ends older than the window)
            + 2 (S (E/S) N 4 + 3 (E + 2N) itemsize)
        """
        if not used:
            return sum(map(_bytes, self.tensors()))
        total = 0
        for layer in self.layers:
            if layer.kv is not None:
                total += layer.kv.used_bytes(self.lengths)
            if layer.state is not None:
                total += sum(map(_bytes, layer.state.tensors().values()))
        return total

    def reset(self) -> None:
        """Forget everything, rows and dtype stay. Memory is given back."""
        for layer in self.layers:
            layer.reset()
        self.lengths.zero_()
        self._steps_with_room = 0

    def reorder(self, index: Tensor) -> None:
        """Row i becomes a copy of row index[i]; rows may be forked, dropped, reordered.

        index: int64 [B'], each in [0, B). Raises ValueError for any other.
        """
        if index.dim() != 1 or index.dtype != torch.long:
            raise ValueError(f"index must be int64 [B'], not {index.dtype} {list(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise ValueError(f"index={index.tolist()} must name rows 0..{self.batch_size - 1}")
        for layer in self.layers:
            layer.select(index)
        self.lengths = self.lengths.index_select(0, index)
        self._steps_with_room = 0

    def fill(self, n_tokens: int, generator: torch.Generator | None = None) -> None:
        """Append synthetic tokens to every layer by its own rule, without running the model.

        For measurements: counts, bytes and evictions are those of a real sequence of n_tokens,
        keys and values are random, states stay as they are. generator: of the CPU, seeds the draw.
        Raises ValueError where boundary is "given".
        """
        device = self.lengths.device
        size = (self.batch_size, n_tokens)
        tokens = torch.randint(self.vocab_size, size, generator=generator).to(device)
        noise = torch.Generator(device)
        noise.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for layer in self.layers:
            if layer.kv is not None:
                _fill_layer(layer, layer.kv, tokens, self.lengths, noise)
        self.count(n_tokens)
        self._steps_with_room = 0

    def count(self, n_new: Tensor | int) -> None:
        """Tokens that every layer has taken. In place: a captured step counts there too."""
        with torch.no_grad():
            self.lengths += n_new


def _fill_layer(
    layer: LayerCache,
    kv: KVCache,
    tokens: Tensor,
    lengths: Tensor,
    noise: torch.Generator,
    piece: int = 4096,
) -> None:
    seq = tokens.shape[1]
    spans, ends = [], []
    for begin in range(0, seq, piece):
        part = tokens[:, begin : begin + piece]
        span = make_span(part.shape[1], tokens.device, tokens=part, offsets=lengths + begin)
        spans.append(span)
        if layer.boundary is not None:
            now, layer.carry = layer.boundary(span, layer.carry)
            ends.append(now)
    if kv.window is None:  # all the room at once, as when a prompt is read
        kv.reserve(int(lengths.max()) + seq)
    elif ends:
        older = torch.cat(ends, 2)[..., : max(0, seq - kv.window)].sum(2)
        kv.reserve(kv.window + kv.past_range()[1] + int(older.max()))
    for i, span in enumerate(spans):
        shape = (kv.batch, span.positions.shape[1], kv.heads, kv.blocks.shape[2])
        k, v = (
            torch.randn(shape, generator=noise, device=noise.device, dtype=kv.blocks.dtype)
            for _ in range(2)
        )
        kv.append(k, v, ends[i] if ends else None, span)


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
