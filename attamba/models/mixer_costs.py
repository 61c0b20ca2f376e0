"""What one layer's mixer costs, by formula; accounting sums it over layers.

Symbols as in ARCHITECTURE and accounting; C channels of a recurrence, W width of a head of Mamba-2.
"""

from __future__ import annotations

from dataclasses import dataclass

from attamba.mixers import (
    AttambaMixer,
    HawkMixer,
    Mamba2Mixer,
    MinGRUMixer,
    MinLSTMMixer,
    Mixer,
    TransformerMixer,
)
from attamba.ops.chunking import make_boundary

FLOAT32 = 4


@dataclass(frozen=True)
class MixerCosts:
    """Of one layer."""

    matrices: int
    """Entries of the weight matrices that each token is multiplied with."""
    vectors: int
    """Entries of convolutions, rates, skips, biases and gains."""
    scan: float = 0.0
    """FLOPs per token of convolution and recurrence; exponentials, gates and norms not counted."""
    float32: int = 0
    """Numbers of the decode state that are float32 whatever the cache's type."""
    others: int = 0
    """Numbers of the decode state in the cache's type: inputs of the convolution."""

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of a row's decode state, keys and values aside."""
        return self.float32 * FLOAT32 + self.others * itemsize


def mixer_costs(mixer: Mixer, d: int) -> MixerCosts:
    """Costs of a mixer in a model of width d."""
    if isinstance(mixer, AttambaMixer):
        return _attamba(mixer, d)
    if isinstance(mixer, TransformerMixer):
        return MixerCosts(_attention_matrices(mixer, d) + 2 * d * kv_width(mixer, d), 0)
    if isinstance(mixer, Mamba2Mixer):
        return _mamba2(mixer, d)
    if isinstance(mixer, HawkMixer):
        return _hawk(mixer, d)
    return _min_rnn(mixer, d)


def head_dim(mixer: AttambaMixer | TransformerMixer, d: int) -> int:
    """D."""
    return mixer.head_dim or d // mixer.n_heads


def kv_width(mixer: AttambaMixer | TransformerMixer, d: int) -> int:
    """G * D."""
    return (mixer.n_kv_heads or mixer.n_heads) * head_dim(mixer, d)


def _attention_matrices(mixer: AttambaMixer | TransformerMixer, d: int) -> int:
    """Of queries and outputs."""
    return 2 * d * mixer.n_heads * head_dim(mixer, d)


def _attamba(mixer: AttambaMixer, d: int) -> MixerCosts:
    width = kv_width(mixer, d)
    matrices = _attention_matrices(mixer, d) + (2 * d * width if mixer.kv_proj else 0)
    if mixer.compressor == "mean":
        return MixerCosts(matrices, 0, scan=2 * d, float32=d + 1)  # sum, divide
    if mixer.compressor == "gated":
        # bias; weight c; decay and add, of sum and weights; divide
        scan = 2 * width * (1 + 1 + 2 * 2 + 1)
        vectors = 2 * width * (mixer.gate_positions + 1)
        return MixerCosts(matrices + 4 * d * width, vectors, scan, float32=3 * 2 * width + 1)
    E, N, S, taps = mixer.ssm_dim or d // 2, mixer.state_dim, mixer.ssm_heads, mixer.conv_width
    matrices += 2 * (d * (2 * E + 2 * N + S) + E * width)
    vectors = 2 * ((E + 2 * N) * taps + 3 * S + E)
    if mixer.ssm_scope == "strided":  # a state for each place; the convolution sees one token
        state = 2 * E * N * _longest(mixer) + 1
        return MixerCosts(matrices, vectors, scan=2 * _ssm_flops(E, N, 1), float32=state)
    return MixerCosts(
        matrices,
        vectors,
        scan=2 * _ssm_flops(E, N, taps),
        float32=2 * E * N,
        others=2 * (taps - 1) * (E + 2 * N),
    )


def _longest(mixer: AttambaMixer) -> int:
    """Tokens of the longest chunk that the boundary policy makes."""
    longest = make_boundary(
        mixer.boundary,
        chunk_size=mixer.chunk_size,
        layer_idx=0,
        n_layers=1,
        n_kv_heads=1,
        sink=mixer.sink,
    ).longest
    assert longest is not None, "no model with this config can be built"
    return longest


def _mamba2(mixer: Mamba2Mixer, d: int) -> MixerCosts:
    E, N, taps = mixer.inner(d), mixer.state_dim, mixer.conv_width
    S = E // mixer.head_dim
    return MixerCosts(
        d * (2 * E + 2 * N + S) + E * d,
        (E + 2 * N) * (taps + 1) + 3 * S + E,
        scan=_ssm_flops(E, N, taps),
        float32=E * N,
        others=(taps - 1) * (E + 2 * N),
    )


def _ssm_flops(E: int, N: int, taps: int) -> int:
    """Convolution; decay h, add dt B x^T, read C h; skip."""
    return 2 * taps * (E + 2 * N) + 3 * E * N + 2 * E * N + 2 * E


def _hawk(mixer: HawkMixer, d: int) -> MixerCosts:
    C, taps = mixer.inner(d), mixer.conv_width
    return MixerCosts(
        3 * d * C + 2 * C * (C // mixer.n_blocks),
        C * (taps + 1) + 2 * C + C,
        scan=2 * taps * C + 4 * C,  # scale, gate the input; decay, add
        float32=C,
        others=(taps - 1) * C,
    )


def _min_rnn(mixer: MinGRUMixer | MinLSTMMixer, d: int) -> MixerCosts:
    C, taps = mixer.inner(d), mixer.conv_width
    parts = 3 if isinstance(mixer, MinLSTMMixer) else 2
    return MixerCosts(
        (parts + 1) * d * C,
        d * (taps + 1) + parts * C,
        scan=2 * taps * d + 3 * C,  # gate the input; decay, add
        float32=C,
        others=(taps - 1) * d,
    )
