"""The boundary policies: which positions end a chunk.

Shapes: B batch, T tokens of this call, G key/value heads, P tokens per chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from attamba.ops.chunking.boundary import FIRST_SCORES, Boundary
from attamba.ops.chunking.spans import Span, row_starts
from attamba.ops.first_scores import highest


class Uniform(Boundary):
    """t = P-1 (mod P) in every layer."""

    name = "uniform"

    @property
    def longest(self) -> int:
        return self.chunk_size

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        return (positions + 1) % self.chunk_size == 0


class Cyclic(Boundary):
    """t = P-1-o_l (mod P): layers take turns."""

    name = "cyclic"
    periodic = True

    @property
    def longest(self) -> int:
        return self.chunk_size

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        return (positions + 1 + self.offset) % self.chunk_size == 0


class HeadCyclic(Boundary):
    """Layers and heads take turns: o_(l,g) = floor((l/n + g/G) * P) mod P."""

    name = "head_cyclic"
    per_head = True
    periodic = True

    @property
    def longest(self) -> int:
        return self.chunk_size

    def rule(
        self, span: Span, carry: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        g = torch.arange(self.n_kv_heads, device=span.positions.device)
        phase = self.layer_idx * self.n_kv_heads + g * self.n_layers
        offset = phase * self.chunk_size // (self.n_layers * self.n_kv_heads) % self.chunk_size
        return (span.positions[:, None] + 1 + offset[:, None]) % self.chunk_size == 0, None


class Jitter(Boundary):
    """Cyclic, each end moved at random by less than P/2 in training. Option: seed (0)."""

    name = "jitter"
    options = ("seed",)

    def __init__(self, *place: Any, seed: int = 0) -> None:
        super().__init__(*place)
        self.seed = _whole_number("seed", seed, 0)

    @property
    def reach(self) -> int:
        """The farthest that an end moves."""
        return (self.chunk_size - 1) // 2

    @property
    def longest(self) -> int:
        return self.chunk_size + 2 * self.reach

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        reach = self.reach if draw is not None else 0
        from_first = positions + 1 + self.offset - self.chunk_size
        chunk = (from_first + reach).div(self.chunk_size, rounding_mode="floor")
        if draw is None:
            return from_first == chunk * self.chunk_size
        move = _hash(chunk + 1, self.seed, self.layer_idx, draw) % (2 * reach + 1) - reach
        return from_first - chunk * self.chunk_size == move


class Random(Boundary):
    """Each position ends a chunk with probability 1/P. Option: seed (0).

    Drawn anew at every training step; in evaluation one fixed draw, a function of position.
    """

    name = "random"
    options = ("seed",)

    def __init__(self, *place: Any, seed: int = 0) -> None:
        super().__init__(*place)
        self.seed = _whole_number("seed", seed, 0)

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        number = _hash(positions.clamp(min=0), self.seed, self.layer_idx, draw)
        return number < math.ceil(2**32 / self.chunk_size)


class Separator(Boundary):
    """At given tokens, never longer than a maximum: chunks follow the text.

    Options: tokens (ids that end a chunk), max_chunk (2 * P). The carry is int64 [B]: tokens since
    the last separator (or since the sink, or the start).
    """

    name = "separator"
    options = ("tokens", "max_chunk")
    needs_tokens = True

    def __init__(
        self, *place: Any, tokens: list[int] | None = None, max_chunk: int | None = None
    ) -> None:
        super().__init__(*place)
        if not isinstance(tokens, list) or not tokens or not all(_whole(t, 0) for t in tokens):
            raise ValueError(
                f"boundary.tokens={tokens} must be a list of token ids that end a chunk, "
                f"e.g. [10, 32] for newline and space in bytes"
            )
        self.tokens = list(tokens)
        longest = 2 * self.chunk_size if max_chunk is None else max_chunk
        self.max_chunk = _whole_number("max_chunk", longest, 1)

    @property
    def longest(self) -> int:
        return self.max_chunk

    def rule(
        self, span: Span, carry: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert span.tokens is not None
        batch, seq = span.tokens.shape
        index = torch.arange(seq, device=span.tokens.device)
        if seq == 1:
            wanted = _constant(tuple(self.tokens), span.tokens.device)
        else:
            wanted = torch.tensor(self.tokens, device=span.tokens.device)
        first = (span.positions == 0).expand(batch, seq)
        hard = torch.isin(span.tokens, wanted) | (first & self.sink)
        # Chunks are cut every max_chunk tokens after an anchor: a separator, the sink, or the
        # place before a document's first token.
        anchor = torch.where(hard, index, torch.where(first, index - 1, -seq - 2**40))
        if span.mask is not None:
            hard, anchor = hard & span.mask, anchor.masked_fill(~span.mask, -(2**40))
        before = torch.zeros(batch, dtype=torch.long, device=index.device)
        if carry is not None:
            before = before - carry
        if span.n_pad is not None:
            before = before + span.n_pad
        anchor = torch.cat([(before - 1)[:, None], anchor], 1).cummax(1).values
        since = index - anchor[:, 1:]
        ends = hard | ((since % self.max_chunk == 0) & (since > 0))
        return ends[:, None], seq - 1 - anchor[:, -1]


class Budget(Boundary):
    """P grows with position, so that there are always fewer than max_chunks chunks.

    After s tokens floor(M s / (s + M P)) chunks have ended: one per P tokens at first, and never
    M of them. Attention turns smoothly from quadratic to linear. Option: max_chunks (1024).
    """

    name = "budget"
    options = ("max_chunks",)

    def __init__(self, *place: Any, max_chunks: int = 1024) -> None:
        super().__init__(*place)
        self.max_chunks = _whole_number("max_chunks", max_chunks, 2)

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        limit = self.max_chunks - self.sink
        tokens = positions.clamp(min=0) + self.offset  # before this one

        def ended(tokens: Tensor) -> Tensor:
            return limit * tokens // (tokens + limit * self.chunk_size)

        return ended(tokens + 1) > ended(tokens)


class Given(Boundary):
    """The caller passes `ends`, for any segmentation of its own."""

    name = "given"
    per_head = True
    takes_ends = True

    def rule(
        self, span: Span, carry: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if given is None:
            raise ValueError("boundary='given' needs ends=..., bool [B, T] or [n_layers, B, T]")
        return given, None


class FirstAttention(Boundary):
    """The tokens that the first layer scores highest, one in P of each document; sees the future.

    An ablation of arXiv 2411.17685, for studies. The score of a token is its query times the key of
    its document's last token, in the first head of the first layer, so that tokens move the ends
    before them and nothing can be decoded. In the first layer every token ends a chunk: full
    attention. (The paper's code draws among the 2T/P highest at random, and gives the ends of the
    first row to all rows.)
    """

    name = "first_attention"
    causal = False
    by_scores = True

    def rule(
        self, span: Span, carry: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.layer_idx == 0:
            return self.at(span.positions, span.draw)[:, None], None
        if FIRST_SCORES not in span.memo:
            raise ValueError(
                f"boundary={self.name!r} follows the scores of the first layer, which gave none; "
                f"set it in all layers, and ask for ends where the model runs"
            )
        scores = span.memo[FIRST_SCORES]
        start = row_starts(span, scores.shape[0])
        return highest(scores, start, self.chunk_size)[:, None], None

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        return torch.ones_like(positions, dtype=torch.bool)


class FirstSSM(FirstAttention):
    """As first_attention, but the first layer has chunks itself, as with uniform, and its keys are
    their states; sees the future. (The paper's code scores the keys that the last query sees.)
    """

    name = "first_ssm"

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        return (positions + 1) % self.chunk_size == 0


@functools.lru_cache(maxsize=64)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on the device, sent there once: a captured step cannot read the host's memory."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _whole_number(option: str, value: int, least: int) -> int:
    """The option's value. Raises ValueError for one that is not whole, or below `least`."""
    if not _whole(value, least):
        raise ValueError(f"boundary.{option}={value} must be a whole number, at least {least}")
    return value


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _hash(values: Tensor, seed: int, layer_idx: int, draw: Tensor | None) -> Tensor:
    """A well-mixed 32-bit number for each int64 value, the same on every device."""
    key = _mix(torch.full_like(values[:1, :1], (seed * 1_000_003 + layer_idx) & 0xFFFFFFFF))
    if draw is not None:
        key = _mix(key ^ ((draw + 1) & 0xFFFFFFFF))
    return _mix(_mix((values + key) & 0xFFFFFFFF) ^ key)


def _mix(x: Tensor) -> Tensor:
    """Integer finalizer on 32 bits held in int64; factors below 2**31 cannot overflow."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)
