"""Mixer configs and the modules that they describe."""

from __future__ import annotations

from collections.abc import Callable

from attamba.config import AttambaMixer, Mixer, ModelConfig, TransformerMixer
from attamba.modules.attamba import ChunkAttention
from attamba.modules.attention import Attention
from attamba.modules.mixer import TimeMixer


def _attamba(mixer: AttambaMixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    return ChunkAttention(
        mixer, config.dim, config.rope_theta, config.norm_eps, layer_idx, config.n_layers
    )


def _transformer(mixer: TransformerMixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    return Attention(mixer, config.dim, config.rope_theta)


BUILDERS: dict[type, Callable[..., TimeMixer]] = {
    AttambaMixer: _attamba,
    TransformerMixer: _transformer,
}


def build_mixer(mixer: Mixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    """The module of layer `layer_idx`; see TimeMixer."""
    return BUILDERS[type(mixer)](mixer, config, layer_idx)
