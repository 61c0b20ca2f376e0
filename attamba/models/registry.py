"""Mixer configs and the modules that they describe."""

from __future__ import annotations

from collections.abc import Callable

from attamba.config import ModelConfig
from attamba.mixers import (
    AttambaMixer,
    HawkMixer,
    Mamba2Mixer,
    MinGRUMixer,
    MinLSTMMixer,
    Mixer,
    TransformerMixer,
)
from attamba.modules.attamba import ChunkAttention
from attamba.modules.attention import Attention
from attamba.modules.mamba2 import Mamba2
from attamba.modules.mixer import TimeMixer
from attamba.modules.recurrent import Hawk, MinRNN
from attamba.ops.chunking import policy_named


def _attamba(mixer: AttambaMixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    return ChunkAttention(
        mixer, config.dim, config.rope_theta, config.norm_eps, layer_idx, config.n_layers
    )


def _transformer(mixer: TransformerMixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    return Attention(mixer, config.dim, config.rope_theta)


def _mamba2(mixer: Mamba2Mixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    return Mamba2(mixer, config.dim, config.norm_eps)


def _min_rnn(mixer: MinGRUMixer | MinLSTMMixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    return MinRNN(mixer, config.dim)


def _hawk(mixer: HawkMixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    return Hawk(mixer, config.dim)


BUILDERS: dict[type, Callable[..., TimeMixer]] = {
    AttambaMixer: _attamba,
    TransformerMixer: _transformer,
    Mamba2Mixer: _mamba2,
    MinGRUMixer: _min_rnn,
    MinLSTMMixer: _min_rnn,
    HawkMixer: _hawk,
}


def future_policy(config: ModelConfig) -> str | None:
    """The name of a boundary policy in use that looks at later tokens; None where all are causal.

    Raises ValueError for a name that is not a policy.
    """
    for mixer in config.layer_mixers():
        if isinstance(mixer, AttambaMixer) and not policy_named(mixer.policy).causal:
            return str(mixer.policy)
    return None


def build_mixer(mixer: Mixer, config: ModelConfig, layer_idx: int) -> TimeMixer:
    """The module of layer `layer_idx`; see TimeMixer."""
    return BUILDERS[type(mixer)](mixer, config, layer_idx)
