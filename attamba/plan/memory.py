"""Bytes that a rank holds at the peak of a training step, by what they are.

Not counted: what the allocator, the kernels and the communication library take for themselves, and
gradients of activations while one operator computes them. The step's optimizer has its peak
elsewhere, and a smaller one: the fused AdamW works in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attamba.config import AttambaMixer, RunConfig, TransformerMixer
from attamba.mixers import attends
from attamba.models import build_model
from attamba.models.accounting import cache_bytes, countable
from attamba.models.mixer_costs import head_dim, kv_width
from attamba.models.splits import Placement, placements, splits
from attamba.plan.activations import FLOAT32, layer_keeps
from attamba.plan.layout import Layout
from attamba.plan.policies import entries_of_others

BFLOAT16 = 2
MOMENTS = 2
"""Of AdamW, float32 each."""


@dataclass(frozen=True)
class Parameters:
    """Sizes of the tensors that are sharded together: one layer, or all that is in none."""

    sharded: int
    """Entries on the rank that has most."""
    whole: int
    """Entries of a rank's tensors before they are sharded (1/tensor of the matrices)."""
    matrices: int
    """Those of the matrices, which bfloat16 products copy."""
    tensors: int


def parameters(config: RunConfig, layout: Layout) -> list[Parameters]:
    """Of each layer, and last of embedding, final norm and head.

    Where each lies is what training uses: models.splits. Tensor parallelism divides matrices and
    leaves vectors whole; FSDP2 cuts what is left along one dimension, of which the first rank has
    most.
    """
    with torch.device("meta"):
        model = build_model(config.model)
    places = placements(model, splits(model), layout.tensor, layout.holders)
    groups: list[list[tuple[torch.nn.Parameter, Placement]]] = [
        [] for _ in range(len(model.layers))
    ]
    groups.append([])
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        group = int(rest.partition(".")[0]) if first == "layers" else -1
        groups[group].append((parameter, places[name]))
    return [_sizes(group) for group in groups]


def _sizes(group: list[tuple[torch.nn.Parameter, Placement]]) -> Parameters:
    return Parameters(
        sharded=sum(placed.held for _, placed in group),
        whole=sum(placed.whole for _, placed in group),
        matrices=sum(placed.whole for parameter, placed in group if parameter.ndim > 1),
        tensors=len(group),
    )


def states(config: RunConfig, layout: Layout, sizes: list[Parameters]) -> dict[str, float]:
    """What stays from step to step, of n entries on this rank.

    weights          4 n    float32, whatever products are computed in
    gradients        4 n
    optimizer        8 n + 4 for each tensor: two moments and a count of steps, float32
    """
    n = sum(group.sharded for group in sizes)
    tensors = sum(group.tensors for group in sizes)
    return {
        "weights": FLOAT32 * n,
        "gradients": FLOAT32 * n,
        "optimizer state": MOMENTS * FLOAT32 * n + FLOAT32 * tensors,
    }


def working_weights(config: RunConfig, layout: Layout, sizes: list[Parameters]) -> float:
    """Whole weights that a rank holds beside its shards, in the backward pass.

    Over several ranks, with g bytes of parallel.gather_dtype:

        g     of embedding, norm and head, gathered once per pass, and their gradients: 2 g
        g     of two layers, the one at work and the next
        g + 4 of one layer's gradient, and the float32 copy in which it is reduced

    In train.dtype=bfloat16 with weights in float32, products keep a bfloat16 copy of each matrix
    until their backward pass: of all layers, or of one where activations are computed anew; and of
    the head.
    """
    *layers, rest = sizes
    largest = max(layer.whole for layer in layers)
    g = gather_bytes(config)
    gathered = 0.0
    if layout.ranks > 1:
        two = sum(sorted((layer.whole for layer in layers), reverse=True)[:2])
        gathered = 2 * g * rest.whole + g * two + (g + FLOAT32) * largest
    if config.train.dtype != "bfloat16" or (layout.ranks > 1 and g == BFLOAT16):
        return gathered
    matrices = [layer.matrices for layer in layers]
    held = sum(matrices) if config.parallel.activation_checkpointing == "none" else max(matrices)
    head = config.model.vocab_size * config.model.dim // layout.tensor
    return gathered + BFLOAT16 * (held + head)


def activations(config: RunConfig, layout: Layout) -> dict[str, float]:
    """Kept for the backward pass, and the larger of two peaks on top of it.

    With r bytes per number of what flows from layer to layer (2 where weights are gathered in
    bfloat16, else 4), per token:

        activation_checkpointing=none         what every layer keeps (plan.activations)
        ... full                              r d for each layer
        ... selective                         r d and the products' results, for each layer
        rotary positions                      4 D
        final norm and the head's input       4 d + 4 + c d

    and on top, whichever is more: 2 c V per token of logits (they and their gradient; where tensor
    ranks share the vocabulary 12 V / n, since a float32 copy's softmax, its gradient and the
    gradient of the logits are there at once), or, with checkpointing, what one layer keeps. With
    context parallelism keys and values from other ranks are held besides: see others_keys.
    """
    model, kind = config.model, config.parallel.activation_checkpointing
    c = product_bytes(config)
    kept = [layer_keeps(model, mixer, c, layout.tensor) for mixer in model.layer_mixers()]
    inputs = residual_bytes(config, layout) * model.dim * len(kept)
    per_token = {
        "none": sum(k.everything for k in kept),
        "selective": inputs + sum(k.products for k in kept),
        "full": float(inputs),
    }[kind]
    per_token += FLOAT32 * (model.dim + 1) + c * model.dim
    per_token += max((FLOAT32 * head_dim(m, model.dim) for m in _attending(config)), default=0)
    of_a_logit = 2 * c if layout.tensor == 1 else 3 * FLOAT32
    logits = of_a_logit * model.vocab_size / layout.tensor
    anew = max(k.everything for k in kept) if kind != "none" else 0.0
    return {
        "activations": per_token * layout.tokens,
        "loss, or one layer anew": max(logits, anew) * layout.tokens,
        "keys from other ranks": others_keys(config, layout),
    }


def others_keys(config: RunConfig, layout: Layout) -> float:
    """Keys and values of other ranks' tokens: of all layers, or one where they are computed anew.

    And their gradients, one layer at a time. On the last rank, which uses those of all others.
    """
    if layout.context == 1:
        return 0.0
    c, held = product_bytes(config), [0.0]
    for i, mixer in enumerate(config.model.layer_mixers()):
        if attends(mixer):
            entry = 2 * kv_width(mixer, config.model.dim) / layout.tensor * c
            held.append(entry * entries_of_others(config.model, i, layout) * layout.rows)
    kept = sum(held) if config.parallel.activation_checkpointing == "none" else max(held)
    return kept + max(held)


def decode_cache(config: RunConfig, layout: Layout, tokens: int, rows: int = 1) -> float:
    """Bytes of a bfloat16 decode cache of `rows` sequences, heads shared over tensor ranks.

    Keys and values by accounting.cache_bytes; the compressors' states are divided as well.
    """
    return cache_bytes(countable(config.model), tokens, BFLOAT16, rows) / layout.tensor


def gather_bytes(config: RunConfig) -> int:
    """Of a parameter on its way between ranks."""
    return BFLOAT16 if config.parallel.gather_dtype == "bfloat16" else FLOAT32


def product_bytes(config: RunConfig) -> int:
    """c: of a number in matrix products."""
    return BFLOAT16 if config.train.dtype == "bfloat16" else FLOAT32


def residual_bytes(config: RunConfig, layout: Layout) -> int:
    """r: of a number between layers. FSDP casts inputs to the type that weights are gathered in."""
    return gather_bytes(config) if layout.ranks > 1 else FLOAT32


def _attending(config: RunConfig) -> Iterator[AttambaMixer | TransformerMixer]:
    return (mixer for mixer in config.model.layer_mixers() if attends(mixer))
