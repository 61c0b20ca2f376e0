"""Chunks: where they end, and who sees whom. The only place that knows.

Shapes: B batch, T tokens of this call, G key/value heads, P tokens per chunk, L leading tokens.

``ends`` is boolean and in general [B, G, T]: ``ends[b, g, t]`` says that for head g position t is
the last of its chunk. A 1 stands for B or G where rows or heads agree.

**Visibility.** Query t sees key s of its own document if and only if

    t - L <= s <= t                       (the window: L earlier tokens and t itself)
    or  s < t - L and s ends a chunk      (the past: one entry per chunk)
"""

from attamba.ops.chunking.boundary import (
    BOUNDARIES,
    FIRST_SCORES,
    Boundary,
    cannot_decode,
    make_boundary,
    policy_named,
)
from attamba.ops.chunking.policies import (
    Budget,
    Cyclic,
    FirstAttention,
    FirstSSM,
    Given,
    HeadCyclic,
    Jitter,
    Random,
    Separator,
    Uniform,
)
from attamba.ops.chunking.spans import (
    Span,
    chunk_starts,
    document_bounds,
    document_starts,
    make_span,
    part_of,
    row_starts,
)
from attamba.ops.chunking.visibility import normalize_ends, visible

__all__ = [
    "BOUNDARIES",
    "FIRST_SCORES",
    "Boundary",
    "Budget",
    "Cyclic",
    "FirstAttention",
    "FirstSSM",
    "Given",
    "HeadCyclic",
    "Jitter",
    "Random",
    "Separator",
    "Span",
    "Uniform",
    "cannot_decode",
    "chunk_starts",
    "document_bounds",
    "document_starts",
    "make_boundary",
    "make_span",
    "normalize_ends",
    "part_of",
    "policy_named",
    "row_starts",
    "visible",
]
