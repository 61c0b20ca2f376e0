"""How parameters are divided: among ranks that share a layer, and then among those that hold it.

Ranks that share a layer each compute some of its heads, or of its inner widths. A matrix is divided
along the dimension of those, and a rank holds an equal run of it. Where one matrix makes several
things (keys and values; gate and input), a rank needs a run of each, which are not what it holds:
see train.tensor for the exchange. Gains, rates and taps are small, and whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from attamba.models.decoder import Block, Decoder
from attamba.modules.attamba import ChunkAttention
from attamba.modules.attention import Attention
from attamba.modules.compressor import Compressors
from attamba.modules.mamba2 import Mamba2
from attamba.modules.mixer import TimeMixer
from attamba.modules.pooling import GatedPooling
from attamba.modules.recurrent import Hawk, MinRNN

__all__ = ["Placement", "Split", "placements", "splits"]


@dataclass(frozen=True)
class Split:
    """What of a parameter a rank among those that share its layer uses."""

    dim: int | None = None
    """The dimension along which it is divided; None: all of it."""
    segments: tuple[tuple[int, bool], ...] = ()
    """Sizes of what lies along `dim`, and whether each is divided (or used by all ranks)."""
    small: bool = False
    """Is it held whole on every rank, whatever that rank uses?"""

    def used(self, rank: int, tensor: int) -> list[tuple[int, int]]:
        """Runs of `dim` that rank uses, [begin, end), in order."""
        runs, begin = [], 0
        for size, divided in self.segments:
            width = size // tensor if divided else size
            first = begin + (rank * width if divided else 0)
            runs.append((first, first + width))
            begin += size
        return runs

    def missing(self, rank: int, tensor: int) -> int:
        """How much of `dim` a rank uses and does not hold, where it holds an equal run of it."""
        held = sum(size for size, _ in self.segments) // tensor
        low, high = rank * held, (rank + 1) * held
        runs = self.used(rank, tensor)
        return sum(b - a - max(0, min(b, high) - max(a, low)) for a, b in runs)


@dataclass(frozen=True)
class Placement:
    """Where the numbers of a parameter lie."""

    tensor_dim: int | None
    """Divided along it among ranks that share a layer; None: whole on each."""
    shard_dim: int
    """What is left is divided along it among ranks that hold a copy of the model."""
    held: int
    """Entries on the rank that holds most."""
    whole: int
    """Entries of a rank's part before it is sharded."""


WHOLE = Split()


def placements(
    model: Decoder, uses: dict[str, Split], tensor: int, holders: int
) -> dict[str, Placement]:
    """Of every parameter, by name; uses: from splits."""
    return {
        name: place(uses[name], tuple(parameter.shape), tensor, holders)
        for name, parameter in model.named_parameters()
    }


def place(split: Split, shape: tuple[int, ...], tensor: int, holders: int) -> Placement:
    """Where a parameter of this shape lies.

    Sharding is along the first dimension, where the last ranks may have less; along another where
    the first is too short to go round. What tensor ranks have divided along a dimension must divide
    evenly again, so a matrix that does not is whole on each of them.
    """
    divided = split.dim if tensor > 1 and not split.small else None
    if divided is not None and shape[divided] % tensor:
        divided = None
    local = list(shape)
    if divided is not None:
        local[divided] //= tensor
    even = [dim for dim, size in enumerate(local) if size % holders == 0]
    if local[0] >= holders and divided != 0:
        shard_dim = 0
    elif even:
        shard_dim = even[0]
    elif divided == 0:
        return place(Split(small=True), shape, tensor, holders)
    else:
        shard_dim = 0
    whole = math.prod(local)
    held = -(-local[shard_dim] // holders) * (whole // local[shard_dim])
    return Placement(divided, shard_dim, held, whole)


def splits(model: Decoder) -> dict[str, Split]:
    """Of every parameter, by name."""
    found = {name: WHOLE for name, _ in model.named_parameters()}
    vocab = Split(0, ((model.config.vocab_size, True),))
    found |= {name: vocab for name in ("embed.weight", "head.weight") if name in found}
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        inside = {f"mixer.{name}": split for name, split in _of_mixer(layer.mixer)}
        hidden = layer.ffn.w2.in_features
        inside["ffn.w13.weight"] = _rows(hidden, hidden)
        inside["ffn.w2.weight"] = _columns(hidden)
        found |= {f"layers.{i}.{name}": split for name, split in inside.items()}
    return found


def _of_mixer(mixer: TimeMixer) -> Iterator[tuple[str, Split]]:
    """Of the mixer's parameters that are divided."""
    if isinstance(mixer, (ChunkAttention, Attention)):
        width = mixer.n_kv_heads * mixer.head_dim
        yield "wq.weight", _rows(mixer.wq.out_features)
        yield "wo.weight", _columns(mixer.wo.in_features)
        if mixer.wkv is not None:
            yield "wkv.weight", _rows(width, width)
        if isinstance(mixer, ChunkAttention):
            for name, split in _of_compressors(mixer, width):
                yield f"compressors.{name}", split
    elif isinstance(mixer, Mamba2):
        E, N, S = mixer.inner, mixer.state_dim, mixer.n_heads
        convolved = ((E, True), (2 * N, False))
        yield "in_proj.weight", Split(0, ((E, True), *convolved, (S, True)))
        for name in ("conv.weight", "conv.bias"):
            yield name, Split(0, convolved, small=True)
        for name, size in (("A_log", S), ("dt_bias", S), ("D_skip", S), ("norm.weight", E)):
            yield name, Split(0, ((size, True),), small=True)
        yield "wo.weight", _columns(E)
    elif isinstance(mixer, MinRNN):
        parts = (mixer.channels,) * mixer.parts
        yield "in_proj.weight", _rows(*parts)
        yield "in_bias", Split(0, _rows(*parts).segments, small=True)
        yield "wo.weight", _columns(mixer.channels)
    elif isinstance(mixer, Hawk):
        C = mixer.channels
        yield "in_proj.weight", _rows(C, C)
        for name in ("conv.weight", "conv.bias", "Lambda"):
            yield name, Split(0, ((C, True),), small=True)
        yield "gate_weight", Split(1, ((mixer.gate_weight.shape[1], True),))
        yield "gate_bias", Split(1, ((C, True),), small=True)
        yield "wo.weight", _columns(C)


def _of_compressors(mixer: ChunkAttention, width: int) -> Iterator[tuple[str, Split]]:
    """width: G * D."""
    inside = mixer.compressors
    if isinstance(inside, Compressors):
        E, N, S = inside.ssm_dim, inside.state_dim, inside.n_heads
        inner, heads = ((E, True), (E, True)), ((S, True), (S, True))
        convolved = (*inner, (4 * N, False))
        yield "in_proj.weight", Split(0, (*inner, *convolved, *heads))
        yield "conv_weight", Split(0, convolved, small=True)
        for name, size in (("A_log", S), ("dt_bias", S), ("D_skip", S), ("norm_weight", E)):
            yield name, Split(1, ((size, True),), small=True)
        yield "out_proj", Split(2, ((E, True),))
    elif isinstance(inside, GatedPooling):
        yield "in_proj.weight", _rows(width, width, width, width)
        yield "position_bias", Split(1, ((width, True), (width, True)), small=True)
        yield "norm_weight", Split(1, ((width, True),), small=True)


def _rows(*sizes: int) -> Split:
    """Of a matrix whose outputs are divided."""
    return Split(0, tuple((size, True) for size in sizes))


def _columns(size: int) -> Split:
    """Of a matrix whose inputs are divided: each rank has a part of every sum."""
    return Split(1, ((size, True),))
