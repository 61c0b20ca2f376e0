"""What a run's model costs by formula, for tables: FLOPs, attention entries, cache bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attamba.config import AttambaMixer, ModelConfig, RunConfig
from attamba.models.accounting import attention_entries, cache_bytes, flops_per_token
from attamba.ops.chunking import BOUNDARIES, Boundary

LONG = 65_536
"""The length at which a cache is told besides the training length."""
ITEMSIZE = 2
"""Bytes of a number in the cache: bfloat16."""


def policies(config: ModelConfig) -> list[type[Boundary]]:
    """The boundary policies of the layers that have chunks."""
    mixers = [mixer for mixer in config.layer_mixers() if isinstance(mixer, AttambaMixer)]
    return [BOUNDARIES[mixer.policy] for mixer in mixers]


def costs(config: RunConfig, tokens: Tensor | None) -> dict[str, Any]:
    """By T, for the training length and LONG: flops (forward, per token; null where chunks follow
    the text), entries (keys that a
    query sees, the mean over layers, heads and positions) and cache_bytes (bfloat16).

    tokens: int64 [1, n] of real text for policies that look at it, repeated where n is too small.
    Empty for a model that cannot decode.
    """
    used = policies(config.model)
    if not all(policy.causal for policy in used):
        return {}
    if not any(policy.needs_tokens for policy in used):
        tokens = None
    by_length = {}
    for seq_len in sorted({config.data.seq_len, LONG}):
        text = None
        if tokens is not None:
            text = tokens.repeat(1, -(-seq_len // tokens.shape[1]))[:, :seq_len]
        by_length[str(seq_len)] = _at(config.model, seq_len, text)
    return by_length


def _at(model: ModelConfig, seq_len: int, tokens: Tensor | None) -> dict[str, Any]:
    heads = sum(getattr(mixer, "n_heads", 0) for mixer in model.layer_mixers())
    entries = attention_entries(model, seq_len, tokens)
    return {
        "flops": flops_per_token(model, seq_len, training=False) if tokens is None else None,
        "entries": entries / heads / seq_len if heads else 0.0,
        "cache_bytes": cache_bytes(model, seq_len, ITEMSIZE, tokens=tokens),
    }
