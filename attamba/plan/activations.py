"""What a layer keeps between its forward and its backward pass, in bytes per token.

Of eager PyTorch with the Triton kernels of a GPU (backend: auto); what torch.compile recomputes
instead makes it less. The norms are torch's own fused kernel, which keeps its input and one factor
per token; a CPU keeps its result besides, and SiLU and product of the feed-forward part.

Symbols: d model width, f inner width of SwiGLU, H query heads, G key/value heads, D width of a
head, E and N inner width and state of a compressor or Mamba-2, S its heads, C channels of a
recurrence, k taps of a convolution, c bytes of a number in matrix products (4, or 2 under
train.dtype=bfloat16). With tensor parallelism H, G, E, S, f and C are a rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass

from attamba.config import ModelConfig
from attamba.mixers import (
    AttambaMixer,
    HawkMixer,
    Mamba2Mixer,
    MinLSTMMixer,
    Mixer,
    TransformerMixer,
    attends,
)
from attamba.models.mixer_costs import head_dim, kv_width
from attamba.ops.chunking import make_boundary

FLOAT32 = 4
LARGEST_TILE = 16
"""Chunks up to this length are compressed by one kernel in 16 bits; see ops.compress.triton."""
TILE, LARGEST_SIDE = 64, 64
"""Where states pass in 16 bits: tokens for each state that is kept, and the most that N and a
head's width may be; see ops.compress.scan.triton."""


@dataclass(frozen=True)
class Kept:
    """Bytes per token of one layer."""

    everything: float
    """Kept without activation checkpointing, and for one layer at a time with it."""
    products: float
    """Results of matrix products and attention, which activation_checkpointing=selective keeps."""


def layer_keeps(config: ModelConfig, mixer: Mixer, c: int, tensor: int = 1) -> Kept:
    """What one layer keeps: its two norms, its mixer and its feed-forward part.

        norms          2 (4 d + 4)                  their float32 inputs, a factor each
        feed-forward   c d + 2 c f                  input; W1 x and W3 x
        mixer          see attention_keeps, compressor_keeps, recurrence_keeps

    c: bytes of a number in matrix products.
    """
    d, f = config.dim, (config.ffn_dim or 3 * config.dim) / tensor
    if attends(mixer):
        mixed = attention_keeps(mixer, d, c, tensor)
    else:
        mixed = recurrence_keeps(mixer, d, c, tensor)
    norms, feed_forward = 2 * (FLOAT32 * d + FLOAT32), c * d + 2 * c * f
    return Kept(
        everything=norms + feed_forward + mixed.everything,
        products=c * (2 * f + d) + mixed.products,
    )


def attention_keeps(
    mixer: AttambaMixer | TransformerMixer, d: int, c: int, tensor: int = 1
) -> Kept:
    """A mixer with queries, keys and values.

    queries, result, their log-sum-exp      c 2 H D + 4 H
    keys and values                         c 2 G D
    transformer: the projection of both     c G D more, as the values are a part of it
    attamba: numbers of the chunk ends      8 (two int32)
    attamba: compressors                    see compressor_keeps
    the layer's normed input                4 d; in 16 bits a copy for each of its n products,
                                            2 n d, with n = 2, or 3 for attamba with kv_proj
    """
    HD, GD, H = mixer.n_heads * head_dim(mixer, d), kv_width(mixer, d), mixer.n_heads
    HD, GD, H = HD // tensor, GD // tensor, H // tensor
    attention = c * (2 * HD + 2 * GD) + FLOAT32 * H
    results = c * (2 * HD - HD + d) + FLOAT32 * H + c * HD
    if isinstance(mixer, TransformerMixer):
        kept = attention + c * GD + _inputs(2, d, c)
        return Kept(kept, results + c * 2 * GD)
    n_inputs = 1 + (mixer.compressor != "mean") + mixer.kv_proj
    compressors = compressor_keeps(mixer, d, c, tensor)
    return Kept(
        attention + 8 + compressors.everything + _inputs(n_inputs, d, c),
        results + 8 + compressors.products + (c * 2 * GD if mixer.kv_proj else 0),
    )


def compressor_keeps(mixer: AttambaMixer, d: int, c: int, tensor: int = 1) -> Kept:
    """The compressors of keys and values, by kind.

        ssm, one kernel      c (4E + 4N + 2S + 2E) + 8 + 1     its input, results, norm, starts
        ssm, states pass     the above, and c 2 E N / 64       a state for each tile of 64 tokens
        ssm, in steps        the first, and c (k + 2) X + 2 * 8S + 2 c 2E + 4 * 2E + (k - 1)
                             of X = 2E + 4N channels: the convolution's input, its k - 1 taps times
                             weights, its result and SiLU of it; steps before and after softplus;
                             y, SiLU(z) and their product in float32
        gated                4 * 20 G D + 16                   all in float32
        mean                 4 (2 (d + 1) + 2)                 sum and count, float32

    One kernel takes chunks of up to 64 tokens in 16 bits; where they are longer or run through,
    states pass between tiles. float32, states of more than 4096 numbers a head, and heads on
    several ranks go in steps.
    """
    GD = kv_width(mixer, d) / tensor
    if mixer.compressor == "mean":
        return Kept(FLOAT32 * (2 * (d + 1) + 2), 0)
    if mixer.compressor == "gated":
        return Kept(FLOAT32 * 20 * GD + 16, c * 4 * GD)
    E, N = (mixer.ssm_dim or d // 2) / tensor, mixer.state_dim
    S, k, X = mixer.ssm_heads / tensor, mixer.conv_width, 2 * E + 4 * N
    projected = c * (4 * E + 4 * N + 2 * S)
    kept = projected + c * 2 * E + 8 + 1
    narrow = tensor == 1 and c < FLOAT32
    if narrow and _fits_a_tile(mixer):
        pass
    elif narrow and max(N, E / S) <= LARGEST_SIDE:
        kept += c * 2 * E * N / TILE
    else:
        kept += c * (k + 2) * X + 2 * 8 * S + 2 * c * 2 * E + FLOAT32 * 2 * E + (k - 1)
    return Kept(kept, projected + c * 2 * GD)


def recurrence_keeps(mixer: Mixer, d: int, c: int, tensor: int = 1) -> Kept:
    """A mixer without attention.

        mamba2   c (2E + 2N + S) + c (k + 2) X + 8S + 3 c E + 4 E + 4     X = E + 2N channels
        mingru   4 k d + c d + (5 * 4 + 1) C                              gates, float32
        minlstm  as mingru, and 8 C more
        hawk     c (k + 6) C + 4 * 10 C                                   gates, float32;
                 in float32 two copies less

    and the projection's input: c d, but for mingru and minlstm.
    """
    k = mixer.conv_width  # type: ignore[union-attr]
    if isinstance(mixer, Mamba2Mixer):
        E, N = mixer.inner(d) / tensor, mixer.state_dim
        S, X = E / mixer.head_dim, E + 2 * N
        projected = c * (2 * E + 2 * N + S)
        kept = projected + c * (k + 2) * X + 8 * S + 3 * c * E + FLOAT32 * E + FLOAT32
        return Kept(kept + c * d, projected + c * d)
    C = mixer.inner(d) / tensor  # type: ignore[union-attr]
    if isinstance(mixer, HawkMixer):
        copies = k + 6 if c < FLOAT32 else k + 4
        return Kept(c * copies * C + FLOAT32 * 10 * C + c * d, c * 4 * C + c * d)
    parts = 3 if isinstance(mixer, MinLSTMMixer) else 2
    kept = FLOAT32 * k * d + c * d + (5 * FLOAT32 + 1) * C + (8 * C if parts == 3 else 0)
    return Kept(kept + (c * C if c < FLOAT32 else 0), c * parts * C + c * d)


def _inputs(n: int, d: int, c: int) -> int:
    """One float32 tensor serves all products; in 16 bits autocast makes a copy for each."""
    return FLOAT32 * d if c == FLOAT32 else n * c * d


def _fits_a_tile(mixer: AttambaMixer) -> bool:
    longest = make_boundary(
        mixer.boundary,
        chunk_size=mixer.chunk_size,
        layer_idx=0,
        n_layers=1,
        n_kv_heads=mixer.n_kv_heads or mixer.n_heads,
        sink=mixer.sink,
    ).longest
    return mixer.ssm_scope == "chunk" and longest is not None and longest <= LARGEST_TILE
