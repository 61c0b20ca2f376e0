"""Chunk ends where there is no text to look at, and how many of them other ranks have."""

from __future__ import annotations

import dataclasses
import functools
import json

from attamba.config import AttambaMixer, ModelConfig, from_dict, to_dict
from attamba.mixers import Mixer, TransformerMixer
from attamba.models.accounting import countable, layer_ends
from attamba.ops.chunking import make_boundary
from attamba.plan.layout import Layout

HEAD_WIDTH = 64
"""Of the transformer's heads where the model that it stands beside has none."""


def told(config: ModelConfig) -> bool:
    """Does `countable` change anything?"""
    return countable(config) != config


def as_transformer(config: ModelConfig) -> ModelConfig:
    """The same sizes with full attention in every layer: width, layers, heads, feed-forward part.

    Layers without heads get those of the first layer that has some, or heads of 64.
    """
    heads = next(
        (m for m in _mixers(config) if isinstance(m, (AttambaMixer, TransformerMixer))), None
    )
    if heads is None:
        width = HEAD_WIDTH if config.dim % HEAD_WIDTH == 0 else config.dim
        heads = TransformerMixer(n_heads=config.dim // width)
    mixers: list[Mixer] = []
    for mixer in _mixers(config):
        like = mixer if isinstance(mixer, (AttambaMixer, TransformerMixer)) else heads
        mixers.append(
            TransformerMixer(
                n_heads=like.n_heads, n_kv_heads=like.n_kv_heads, head_dim=like.head_dim
            )
        )
    return _with_mixers(config, mixers)


def entries_of_others(config: ModelConfig, layer_idx: int, layout: Layout) -> float:
    """Keys that a rank needs from the ranks before it, of one row and head, at one layer.

        attamba               min(L, T - T/ranks) of the window, and the chunk ends of the others
        transformer           T - T/ranks
        sliding window        min(window - 1, T - T/ranks)

    Chunk ends, or all keys, are gathered at once, so each rank receives the same, the last as much
    as the first, and as many of each as the rank sends that has most.
    """
    if layout.context == 1:
        return 0.0
    mixer = config.layer_mixers()[layer_idx]
    others = layout.seq_len * (layout.context - 1) / layout.context
    if isinstance(mixer, TransformerMixer):
        return others if mixer.window is None else min(mixer.window - 1, others)
    if not isinstance(mixer, AttambaMixer):
        return 0.0
    if mixer.leading_tokens is None:
        return others
    ends = _most_ends(_key(config), layer_idx, layout.seq_len, layout.context)
    return min(mixer.leading_tokens, others) + ends * (layout.context - 1)


def longest_open(config: ModelConfig, layer_idx: int) -> int:
    """Tokens of earlier ranks that may belong to a rank's first chunk; the mean if unbounded."""
    mixer = countable(config).layer_mixers()[layer_idx]
    assert isinstance(mixer, AttambaMixer)
    boundary = make_boundary(
        mixer.boundary,
        chunk_size=mixer.chunk_size,
        layer_idx=layer_idx,
        n_layers=config.n_layers,
        n_kv_heads=mixer.n_kv_heads or mixer.n_heads,
        sink=mixer.sink,
    )
    return (boundary.longest or mixer.chunk_size) - 1


@functools.lru_cache(maxsize=1024)
def _most_ends(key: str, layer_idx: int, seq_len: int, ranks: int) -> int:
    """Chunk ends of one layer among the tokens of the rank and head that have most."""
    config = countable(from_dict(ModelConfig, json.loads(key)))
    ends = layer_ends(config, layer_idx, seq_len)
    return int(ends.unflatten(-1, (ranks, -1)).sum(-1).max())


def _key(config: ModelConfig) -> str:
    return json.dumps(to_dict(config))


def _mixers(config: ModelConfig) -> list[Mixer]:
    return config.mixer if isinstance(config.mixer, list) else [config.mixer]


def _with_mixers(config: ModelConfig, mixers: list[Mixer]) -> ModelConfig:
    return dataclasses.replace(
        config, mixer=mixers if isinstance(config.mixer, list) else mixers[0]
    )
