"""Training at many P: the chunk size of each step, a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attamba.config import AttambaMixer
from attamba.models import Decoder
from attamba.modules.attamba import ChunkAttention

_STREAM = 0x5F3759DF
"""Keeps these draws apart from the order of the rows, which the same seed gives."""


def draw_size(sizes: Sequence[int], seed: int, step: int) -> int:
    """P of optimizer step `step`, each of `sizes` being as likely as the others.

    Philox's raw numbers, because numpy promises that those never change.
    """
    key = np.array([seed ^ _STREAM, step], dtype=np.uint64)
    return sizes[int(np.random.Philox(key=key).random_raw() % len(sizes))]


def set_chunk_size(model: Decoder, size: int | None) -> None:
    """Run every layer with chunks at P = `size`; None: at its config's. No weight is changed."""
    for mixer, layer in zip(model.config.layer_mixers(), model.layers):
        module = layer.mixer
        if isinstance(mixer, AttambaMixer) and isinstance(module, ChunkAttention):
            module.boundary.chunk_size = mixer.chunk_size if size is None else size
