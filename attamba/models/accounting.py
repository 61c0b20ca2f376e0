"""What a model costs, by formula: parameters, FLOPs, attention-map entries, cache bytes.

All from the config alone; tests compare each with the model itself. Symbols: d width, T sequence,
V vocabulary, H query heads, G key/value heads, D width of a head, E and N inner width and state of
a compressor, S its heads, L leading tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attamba.config import AttambaMixer, ModelConfig, TransformerMixer
from attamba.mixers import Mixer, attends
from attamba.models.mixer_costs import head_dim, mixer_costs
from attamba.ops.chunking import BOUNDARIES, make_boundary, make_span


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token (a multiply-add counts as two)."""

    projections: float
    """All matrix products with weights, the head's included."""
    attention: float
    """q k^T and weights v over the visible entries alone."""
    scan: float
    """Convolution and recurrence, of compressors or of a mixer without attention."""

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.scan


def n_parameters(config: ModelConfig) -> int:
    """Trainable parameters; a tied head counts once."""
    d, costs = config.dim, [mixer_costs(m, config.dim) for m in config.layer_mixers()]
    weights = sum(c.matrices + _ffn_matrices(config) for c in costs)
    vectors = sum(2 * d + c.vectors for c in costs)
    embeddings = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return weights + vectors + embeddings + d


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
    """FLOPs per token at length T: forward, or forward and backward (three times as many)."""
    return flops(config, seq_len).total * (3 if training else 1)


def flops(config: ModelConfig, seq_len: int) -> Flops:
    """Forward FLOPs per token, averaged over a sequence of T tokens, by part."""
    d, layers = config.dim, config.layer_mixers()
    costs = [mixer_costs(m, d) for m in layers]
    matrices = sum(c.matrices + _ffn_matrices(config) for c in costs)
    attention = sum(
        4 * head_dim(m, d) * m.n_heads * seen / seq_len
        for m, seen in zip(layers, _entries_per_head(config, seq_len))
        if attends(m)
    )
    scan = float(sum(c.scan for c in costs))
    return Flops(2.0 * (matrices + config.vocab_size * d), attention, scan)


def attention_flops_by_length(config: ModelConfig, seq_len: int) -> Tensor:
    """Forward FLOPs of attention in a document of l tokens, for l from 0 to T: float64 [T + 1].

    Chunk ends are causal, so those of a shorter document are the first of a longer one's. Raises
    ValueError where they cannot be told from positions alone; see countable.
    """
    total = torch.zeros(seq_len, dtype=torch.float64)
    position = torch.arange(seq_len)
    for i, mixer in enumerate(config.layer_mixers()):
        if not attends(mixer):
            continue
        window = _window(mixer) or seq_len
        seen = (position + 1).clamp(max=window).double()
        if isinstance(mixer, AttambaMixer) and window < seq_len:
            ends = layer_ends(config, i, seq_len).double().mean(0)
            seen[window:] += ends.cumsum(0)[: seq_len - window]
        total += 4 * head_dim(mixer, config.dim) * mixer.n_heads * seen
    return torch.cat([torch.zeros(1, dtype=torch.float64), total.cumsum(0)])


def countable(config: ModelConfig) -> ModelConfig:
    """`config` with chunks that can be counted without a text.

    Policies that look at tokens or scores, or are told, become `cyclic` with chunks of chunk_size
    tokens, which is their mean.
    """
    mixer = config.mixer
    mixers = [_countable(m) for m in mixer] if isinstance(mixer, list) else _countable(mixer)
    return dataclasses.replace(config, mixer=mixers)


def attention_entries(
    config: ModelConfig, seq_len: int, tokens: Tensor | None = None, ends: Tensor | None = None
) -> int:
    """Visible (query, key) pairs of one sequence, over all layers and query heads.

    tokens: int64 [1, T], for boundary "separator". ends: bool [n, g, T], for "given".
    """
    per_head = _entries_per_head(config, seq_len, tokens, ends)
    return sum(round(m.n_heads * e) for m, e in zip(config.layer_mixers(), per_head) if attends(m))


def cache_bytes(
    config: ModelConfig,
    seq_len: int,
    itemsize: int = 4,
    batch_size: int = 1,
    tokens: Tensor | None = None,
    ends: Tensor | None = None,
) -> int:
    """Bytes of the decode cache after T tokens: what DecodeCache.nbytes(used=True) measures.

    itemsize: bytes of a number in the cache (4 for float32, 2 for bfloat16).
    """
    total = 0
    for i, mixer in enumerate(config.layer_mixers()):
        total += mixer_costs(mixer, config.dim).state_bytes(itemsize)
        if not attends(mixer):
            continue
        groups = mixer.n_kv_heads or mixer.n_heads
        window = _window(mixer)
        ring = seq_len if window is None else min(seq_len, window)
        entries = float(groups * ring)
        if isinstance(mixer, AttambaMixer) and window is not None and seq_len > window:
            past = layer_ends(config, i, seq_len, tokens, ends)[:, : seq_len - window]
            entries += groups * past.sum().item() / past.shape[0]
        total += 2 * head_dim(mixer, config.dim) * itemsize * round(entries)
    return total * batch_size


def layer_ends(
    config: ModelConfig,
    layer_idx: int,
    seq_len: int,
    tokens: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Chunk ends of one layer in a sequence of T tokens, bool [G or 1, T].

    Raises ValueError where the policy needs tokens or given ends and has none.
    """
    mixer = config.layer_mixers()[layer_idx]
    if not isinstance(mixer, AttambaMixer):
        return torch.zeros(1, seq_len, dtype=torch.bool)
    boundary = make_boundary(
        mixer.boundary,
        chunk_size=mixer.chunk_size,
        layer_idx=layer_idx,
        n_layers=config.n_layers,
        n_kv_heads=mixer.n_kv_heads or mixer.n_heads,
        sink=mixer.sink,
    )
    span = make_span(seq_len, torch.device("cpu"), tokens=tokens)
    given = None if ends is None else ends[layer_idx][None]
    return boundary(span, None, given)[0][0]


def _entries_per_head(
    config: ModelConfig, seq_len: int, tokens: Tensor | None = None, ends: Tensor | None = None
) -> Iterator[float]:
    """Visible pairs of one sequence, a head's mean, for each layer; none without attention."""
    for i, mixer in enumerate(config.layer_mixers()):
        if not attends(mixer):
            yield 0.0
            continue
        window = _window(mixer)
        full = seq_len if window is None else min(window, seq_len)
        seen = full * (full + 1) / 2 + (seq_len - full) * full
        if window is not None and seq_len > window and isinstance(mixer, AttambaMixer):
            # A chunk end at s is seen beyond the window by the queries after s + L.
            position = layer_ends(config, i, seq_len, tokens, ends)[:, : seq_len - window]
            later = seq_len - window - torch.arange(seq_len - window)
            seen += (position * later).sum().item() / position.shape[0]
        yield seen


def _countable(mixer: Mixer) -> Mixer:
    if not isinstance(mixer, AttambaMixer):
        return mixer
    policy = BOUNDARIES.get(mixer.policy)
    if policy is None or not (policy.needs_tokens or policy.takes_ends or not policy.causal):
        return mixer
    return dataclasses.replace(mixer, boundary="cyclic")


def _ffn_matrices(config: ModelConfig) -> int:
    return 3 * config.dim * (config.ffn_dim or 3 * config.dim)


def _window(mixer: AttambaMixer | TransformerMixer) -> int | None:
    """Keys that a query sees one by one, itself included; None for all."""
    if isinstance(mixer, TransformerMixer):
        return mixer.window
    return None if mixer.leading_tokens is None else mixer.leading_tokens + 1
