"""Chunks: where they end, and who sees whom. The only place that knows.

Shapes: B batch, T tokens of this call, G key/value heads, P tokens per chunk, L leading tokens.

``ends`` is boolean and in general [B, G, T]: ``ends[b, g, t]`` says that for head g position t is
the last of its chunk. A 1 stands for B or G where rows or heads agree.

**Visibility.** Query t sees key s of its own document if and only if

    t - L <= s <= t                       (the window: L earlier tokens and t itself)
    or  s < t - L and s ends a chunk      (the past: one entry per chunk)
"""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attamba.ops.first_scores import highest
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
    tokens, doc_ids = (None if t is None else ranks.own(t) for t in (whole.tokens, whole.doc_ids))
    positions = ranks.own(whole.positions)
    return Span(positions, tokens, doc_ids, draw=whole.draw, ranks=ranks, whole=whole)


def document_starts(doc_ids: Tensor) -> Tensor:
    """For each position the index at which its document starts in the row. int64 [B, T] -> [B, T].

    A change of id starts a document, so an id that comes back later names another document.
    """
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    first = torch.ones_like(doc_ids, dtype=torch.bool)
    first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return torch.where(first, index, 0).cummax(1).values


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


def visible(
    ends: Tensor, leading_tokens: int | None, n_queries: int, doc_ids: Tensor | None = None
) -> Tensor:
    """The visibility rule as a dense mask, for references and pictures.

    ends: bool [B or 1, G or 1, Tk] of the keys. The queries are the last `n_queries` positions.
    doc_ids: int64 [B, Tk] or None. Returns bool [B or 1, G or 1, n_queries, Tk].
    """
    n_keys = ends.shape[-1]
    s = torch.arange(n_keys, device=ends.device)
    t = s[n_keys - n_queries :, None]
    causal = s <= t
    if leading_tokens is None:
        seen = causal[None, None].expand(ends.shape[0], ends.shape[1], -1, -1)
    else:
        seen = causal & ((s >= t - leading_tokens) | ends[..., None, :])
    if doc_ids is not None:
        start = document_starts(doc_ids)
        seen = seen & (start[:, None, n_keys - n_queries :, None] <= s)
    return seen


def normalize_ends(ends: Tensor, batch: int, heads: int, seq: int) -> Tensor:
    """[T], [B, T] or [B, G, T] -> [B or 1, G or 1, T]. Raises ValueError naming the shapes."""
    if ends.dtype != torch.bool:
        raise ValueError(f"ends must be boolean, not {ends.dtype}; use ends.bool()")
    shaped = {1: lambda: ends[None, None], 2: lambda: ends[:, None], 3: lambda: ends}
    out = shaped[ends.dim()]() if ends.dim() in shaped else None
    if (
        out is None
        or out.shape[0] not in (1, batch)
        or out.shape[1] not in (1, heads)
        or out.shape[2] != seq
    ):
        raise ValueError(
            f"ends has shape {list(ends.shape)}; it must be [T], [B, T] or [B, G, T] "
            f"with B={batch}, G={heads}, T={seq}"
        )
    return out


# --------------------------------------------------------------------------------------------
# Boundary policies
# --------------------------------------------------------------------------------------------

BOUNDARIES: dict[str, type[Boundary]] = {}

FIRST_SCORES = "scores of the first layer"
"""Key of a span's memo: float32 [B, T]; see FirstAttention."""


class Boundary:
    """Says which positions end a chunk, for one layer.

    chunk_size P, layer_idx l, n_layers n, n_kv_heads G, sink: position 0 is a chunk of its own.
    A causal policy's answer for t depends on tokens up to t alone, so appending tokens never moves
    an earlier boundary; one that is not says ``causal = False`` and cannot decode.
    """

    name: ClassVar[str]
    causal: ClassVar[bool] = True
    per_head: ClassVar[bool] = False
    """Heads have ends of their own."""
    needs_tokens: ClassVar[bool] = False
    by_scores: ClassVar[bool] = False
    """The first layer must put its scores into the span's memo, at FIRST_SCORES."""
    periodic: ClassVar[bool] = False
    """A chunk ends where position + 1 + o is a multiple of P; o depends on layer and head alone."""
    options: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        BOUNDARIES[cls.name] = cls

    def __init__(
        self, chunk_size: int, layer_idx: int, n_layers: int, n_kv_heads: int, sink: bool
    ) -> None:
        self.chunk_size, self.layer_idx, self.n_layers = chunk_size, layer_idx, n_layers
        self.n_kv_heads, self.sink = n_kv_heads, sink

    @property
    def offset(self) -> int:
        """o_l = floor(l * P / n): how much earlier this layer's chunks end."""
        return self.layer_idx * self.chunk_size // self.n_layers

    @property
    def longest(self) -> int | None:
        """No chunk has more tokens than this; None where nothing is known beforehand.

        The sink and the starts of documents cut chunks shorter and never make one longer.
        """
        return None

    def __call__(
        self, span: Span, carry: Tensor | None = None, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Ends of chunks among the span's tokens, and what the next call must be told.

        carry: what the call before returned, None at the start of a sequence.
        given: bool [B or 1, G or 1, T], the caller's own ends (policy "given" alone).
        Returns bool [B or 1, G or 1, T] and the new carry (None where the policy needs none).
        """
        if self.needs_tokens and span.tokens is None:
            raise ValueError(
                f"boundary={self.name!r} looks at token ids, which inputs_embeds does not give; "
                f"pass ids, or use boundary='given'"
            )
        if given is not None and not isinstance(self, Given):
            raise ValueError(f"ends was passed, but boundary={self.name!r}; set boundary='given'")
        if self.periodic and span.positions.shape[1] == 1 and span.offsets is not None:
            return self._of_all_layers(span)[self.layer_idx], None
        ends, carry = self.rule(span, carry, given)
        if self.sink:
            ends = ends | (span.positions == 0)[:, None]
        if span.mask is not None:
            ends = ends & span.mask[:, None]
        return ends, carry

    def _of_all_layers(self, span: Span) -> Tensor:
        """Ends of a decode step in every layer, [n, B, G or 1, 1]: a few operations for them all.

        A step is made of many small operations, and each layer's own would be as many again.
        """
        place = (self.chunk_size, self.n_layers, self.n_kv_heads if self.per_head else 1)
        key = (*place, self.sink)
        if key not in span.memo:
            next_position = span.positions[..., None] + 1
            ends = (next_position + _phases(*place, span.positions.device)) % self.chunk_size == 0
            if self.sink:
                ends = ends | (next_position == 1)
            if span.mask is not None:
                ends = ends & span.mask[..., None]
            span.memo[key] = ends
        return span.memo[key]

    def rule(
        self, span: Span, carry: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As __call__, before sink and padding."""
        return self.at(span.positions, span.draw)[:, None], None

    def at(self, positions: Tensor, draw: Tensor | None) -> Tensor:
        """Ends as a function of positions alone: int64 [B, T] -> bool [B, T]."""
        raise NotImplementedError


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
        if not _whole(seed, 0):
            raise ValueError(f"boundary.seed={seed} must be a whole number, at least 0")
        self.seed = seed

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
        if not _whole(seed, 0):
            raise ValueError(f"boundary.seed={seed} must be a whole number, at least 0")
        self.seed = seed

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
        self.max_chunk = 2 * self.chunk_size if max_chunk is None else max_chunk
        if not _whole(self.max_chunk, 1):
            raise ValueError(
                f"boundary.max_chunk={self.max_chunk} must be a whole number, at least 1"
            )

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
        if not _whole(max_chunks, 2):
            raise ValueError(f"boundary.max_chunks={max_chunks} must be a whole number, at least 2")
        self.max_chunks = max_chunks

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


def cannot_decode(name: str) -> str:
    """What to tell whoever wants to decode with a policy that is not causal."""
    return (
        f"boundary={name!r} chooses chunk ends from later tokens, so it cannot decode; "
        f"load the model with a causal policy, e.g. mixer.boundary=cyclic"
    )


def row_starts(span: Span, batch: int) -> Tensor:
    """For each token the index at which its document starts in the row, int64 [B, T]."""
    if span.doc_ids is not None:
        return document_starts(span.doc_ids)
    seq, device = span.positions.shape[1], span.positions.device
    return torch.zeros(batch, seq, dtype=torch.long, device=device)


def make_boundary(
    spec: str | dict[str, Any],
    *,
    chunk_size: int,
    layer_idx: int,
    n_layers: int,
    n_kv_heads: int,
    sink: bool,
) -> Boundary:
    """The policy that a config names: "cyclic", or {"type": "budget", "max_chunks": 512}.

    Raises ValueError for an unknown name or option (naming the nearest) and for bad values.
    """
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("type", None)
    policy = policy_named(name)
    for option in options:
        if option not in policy.options:
            known = ", ".join(policy.options) or "none"
            raise ValueError(
                f"boundary.{option} is not an option of {name!r} (known: {known})"
                + _nearest(option, list(policy.options))
            )
    return policy(chunk_size, layer_idx, n_layers, n_kv_heads, sink, **options)


def policy_named(name: str | None) -> type[Boundary]:
    """The class of a policy. Raises ValueError for an unknown name, naming the nearest."""
    if name not in BOUNDARIES:
        raise ValueError(
            f"boundary={name!r} is not a policy (there are: {', '.join(BOUNDARIES)})"
            + _nearest(str(name), list(BOUNDARIES))
        )
    return BOUNDARIES[name]


@functools.lru_cache(maxsize=64)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on the device, sent there once: a captured step cannot read the host's memory."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


@functools.lru_cache(maxsize=64)
def _phases(chunk_size: int, n_layers: int, heads: int, device: torch.device) -> Tensor:
    """o_(l,g) = floor((l/n + g/G) P) mod P, int64 [n, 1, G, 1]; with one head o_l of "cyclic"."""
    with torch.inference_mode(False):
        layer = torch.arange(n_layers, device=device)[:, None]
        head = torch.arange(heads, device=device)
        offset = (layer * heads + head * n_layers) * chunk_size // (n_layers * heads) % chunk_size
        return offset[:, None, :, None]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


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
