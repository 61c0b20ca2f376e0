"""What a model costs, by formula: parameters, FLOPs, attention-map entries, cache bytes.

All from the config alone; tests compare each with the model itself. Symbols as in
ARCHITECTURE: d width, T sequence, V vocabulary, H query heads, G key/value heads, D width of a
head, E and N inner width and state of a compressor, S its heads, L leading tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attamba.config import AttambaMixer, Mixer, ModelConfig, TransformerMixer
from attamba.ops.chunking import make_boundary, make_span


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token (a multiply-add counts as two)."""

    projections: float
    """All matrix products with weights, the head's included."""
    attention: float
    """q k^T and weights v over the visible entries alone."""
    scan: float
    """The compressors' convolution and recurrence."""

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.scan


def n_parameters(config: ModelConfig) -> int:
    """Trainable parameters; a tied head counts once."""
    d, layers = config.dim, config.layer_mixers()
    weights = sum(_mixer_matrices(m, d) + _ffn_matrices(config) for m in layers)
    vectors = sum(2 * d + _mixer_vectors(m, d) for m in layers)
    embeddings = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return weights + vectors + embeddings + d


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
    """FLOPs per token at length T: forward, or forward and backward (three times as many)."""
    return flops(config, seq_len).total * (3 if training else 1)


def flops(config: ModelConfig, seq_len: int) -> Flops:
    """Forward FLOPs per token, averaged over a sequence of T tokens, by part."""
    d, layers = config.dim, config.layer_mixers()
    matrices = sum(_mixer_matrices(m, d) + _ffn_matrices(config) for m in layers)
    attention = sum(
        4 * _head_dim(m, d) * m.n_heads * seen / seq_len
        for m, seen in zip(layers, _entries_per_head(config, seq_len))
    )
    scan = 0.0
    for mixer in layers:
        if isinstance(mixer, AttambaMixer):
            E, N = _ssm_dim(mixer, d), mixer.state_dim
            conv = 2 * mixer.conv_width * (E + 2 * N)
            # decay h, add dt B x^T, read C h; skip
            scan += 2 * (conv + 3 * E * N + 2 * E * N + 2 * E)
    return Flops(2.0 * (matrices + config.vocab_size * d), attention, scan)


def attention_entries(
    config: ModelConfig, seq_len: int, tokens: Tensor | None = None, ends: Tensor | None = None
) -> int:
    """Visible (query, key) pairs of one sequence, over all layers and query heads.

    tokens: int64 [1, T], for boundary "separator". ends: bool [n, g, T], for "given".
    """
    per_head = _entries_per_head(config, seq_len, tokens, ends)
    return sum(round(m.n_heads * e) for m, e in zip(config.layer_mixers(), per_head))


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
        groups = mixer.n_kv_heads or mixer.n_heads
        window = _window(mixer)
        ring = seq_len if window is None else min(seq_len, window)
        entries = float(groups * ring)
        if isinstance(mixer, AttambaMixer):
            if window is not None and seq_len > window:
                past = layer_ends(config, i, seq_len, tokens, ends)[:, : seq_len - window]
                entries += groups * past.sum().item() / past.shape[0]
            E, N = _ssm_dim(mixer, config.dim), mixer.state_dim
            total += 2 * (E * N * 4 + (mixer.conv_width - 1) * (E + 2 * N) * itemsize)
        total += 2 * _head_dim(mixer, config.dim) * itemsize * round(entries)
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
    """Visible pairs of one sequence, a head's mean, for each layer."""
    for i, mixer in enumerate(config.layer_mixers()):
        window = _window(mixer)
        full = seq_len if window is None else min(window, seq_len)
        seen = full * (full + 1) / 2 + (seq_len - full) * full
        if window is not None and seq_len > window and isinstance(mixer, AttambaMixer):
            # A chunk end at s is seen beyond the window by the queries after s + L.
            position = layer_ends(config, i, seq_len, tokens, ends)[:, : seq_len - window]
            later = seq_len - window - torch.arange(seq_len - window)
            seen += (position * later).sum().item() / position.shape[0]
        yield seen


def _mixer_matrices(mixer: Mixer, d: int) -> int:
    """Entries of the weight matrices that each token is multiplied with."""
    q_width = mixer.n_heads * _head_dim(mixer, d)
    kv_width = (mixer.n_kv_heads or mixer.n_heads) * _head_dim(mixer, d)
    count = 2 * d * q_width
    if isinstance(mixer, TransformerMixer) or mixer.kv_proj:
        count += 2 * d * kv_width
    if isinstance(mixer, AttambaMixer):
        E, N = _ssm_dim(mixer, d), mixer.state_dim
        count += 2 * (d * (2 * E + 2 * N + mixer.ssm_heads) + E * kv_width)
    return count


def _mixer_vectors(mixer: Mixer, d: int) -> int:
    """Entries of convolutions, rates, skips, biases and gains."""
    if not isinstance(mixer, AttambaMixer):
        return 0
    E, N = _ssm_dim(mixer, d), mixer.state_dim
    return 2 * ((E + 2 * N) * mixer.conv_width + 3 * mixer.ssm_heads + E)


def _ffn_matrices(config: ModelConfig) -> int:
    return 3 * config.dim * (config.ffn_dim or 3 * config.dim)


def _head_dim(mixer: Mixer, d: int) -> int:
    return mixer.head_dim or d // mixer.n_heads


def _ssm_dim(mixer: AttambaMixer, d: int) -> int:
    return mixer.ssm_dim or d // 2


def _window(mixer: Mixer) -> int | None:
    """Keys that a query sees one by one, itself included; None for all."""
    if isinstance(mixer, TransformerMixer):
        return mixer.window
    return None if mixer.leading_tokens is None else mixer.leading_tokens + 1
