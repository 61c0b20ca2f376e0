"""Small models of every mixer, and what their decode caches hold in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import attamba
from attamba.models import Decoder
from attamba.modules.cache import DecodeCache

MIXERS: dict[str, Any] = {
    "attamba": None,
    "separator": {
        "type": "attamba",
        "n_heads": 2,
        "ssm_heads": 2,
        "boundary": {"type": "separator", "tokens": [1]},
        "leading_tokens": 3,
    },
    "per head": {
        "type": "attamba",
        "n_heads": 4,
        "n_kv_heads": 2,
        "kv_proj": True,
        "ssm_heads": 2,
        "boundary": "head_cyclic",
        "ssm_scope": "sequence",
        "leading_tokens": 0,
        "chunk_size": 3,
    },
    "unbounded": {"type": "attamba", "n_heads": 2, "ssm_heads": 2, "leading_tokens": None},
    "transformer": {"type": "transformer", "n_heads": 2},
    "window": {"type": "transformer", "n_heads": 2, "window": 20, "head_dim": 4},
    "mean": {"type": "attamba", "n_heads": 2, "compressor": "mean", "leading_tokens": 3},
    "gated": {"type": "attamba", "n_heads": 2, "compressor": "gated", "leading_tokens": 3},
    "mamba2": {"type": "mamba2", "head_dim": 8, "state_dim": 4},
    "mingru": {"type": "mingru"},
    "minlstm": {"type": "minlstm", "conv_width": 1},
    "hawk": [{"type": "hawk", "n_blocks": 2}, {"type": "transformer", "n_heads": 2}],
}


def small_model(mixer: Any = None, n_layers: int = 2, **changes: Any) -> Decoder:
    """A small model. Without a mixer: attamba with `changes`."""
    if mixer is None:
        mixer = {
            "type": "attamba",
            "n_heads": 2,
            "ssm_heads": 2,
            "state_dim": 4,
            "leading_tokens": 16,
            **changes,
        }
    config = attamba.ModelConfig(vocab_size=11, dim=16, n_layers=n_layers, ffn_dim=8, mixer=mixer)
    return attamba.build_model(config).eval().requires_grad_(False)


def random_ids(batch: int, seq: int) -> Tensor:
    return torch.randint(11, (batch, seq))


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object."""
    leaves = (str, int, float, type(None), torch.dtype, torch.device, type)
    if id(thing) in seen or isinstance(thing, leaves):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from _tensors(value, seen)
    else:
        yield from _tensors(vars(thing), seen)


def storages(cache: DecodeCache) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(cache, set())}
    return sum(s.nbytes() for s in storages.values())


def row_of(cache: DecodeCache, row: int) -> dict[str, Tensor]:
    out = {"length": cache.lengths[row].clone()}
    for i, layer in enumerate(cache.layers):
        tensors = {}
        if layer.kv is not None:
            tensors |= {"k": layer.kv.k, "v": layer.kv.v, **layer.kv.tensors()}
        if layer.state is not None:
            tensors |= layer.state.tensors()
        for name, tensor in tensors.items():
            out[f"{i}.{name}"] = tensor[row].clone()
        if layer.carry is not None:
            out[f"{i}.carry"] = layer.carry[row].clone()
    return out
