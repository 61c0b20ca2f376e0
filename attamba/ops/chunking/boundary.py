"""What a boundary policy is, and how one is found by its name.

Shapes: B batch, T tokens of this call, G key/value heads, P tokens per chunk, l layer, n layers.
"""

from __future__ import annotations

import difflib
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from attamba.ops.chunking.spans import Span

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
    takes_ends: ClassVar[bool] = False
    """The caller gives the ends."""
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
        if given is not None and not self.takes_ends:
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


def policy_named(name: Any) -> type[Boundary]:
    """The class of a policy. Raises ValueError for an unknown name, naming the nearest."""
    if not isinstance(name, str) or name not in BOUNDARIES:
        raise ValueError(
            f"boundary={name!r} is not a policy (there are: {', '.join(BOUNDARIES)})"
            + _nearest(str(name), list(BOUNDARIES))
        )
    return BOUNDARIES[name]


def cannot_decode(name: str) -> str:
    """What to tell whoever wants to decode with a policy that is not causal."""
    return (
        f"boundary={name!r} chooses chunk ends from later tokens, so it cannot decode; "
        f"load the model with a causal policy, e.g. mixer.boundary=cyclic"
    )


@functools.lru_cache(maxsize=64)
def _phases(chunk_size: int, n_layers: int, heads: int, device: torch.device) -> Tensor:
    """o_(l,g) = floor((l/n + g/G) P) mod P, int64 [n, 1, G, 1]; with one head o_l of "cyclic"."""
    with torch.inference_mode(False):
        layer = torch.arange(n_layers, device=device)[:, None]
        head = torch.arange(heads, device=device)
        offset = (layer * heads + head * n_layers) * chunk_size // (n_layers * heads) % chunk_size
        return offset[:, None, :, None]


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
