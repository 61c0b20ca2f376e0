"""Bytes that a rank receives in one step, and as many that it sends.

A collective over n ranks brings each of them (n - 1)/n of a gathered or reduced tensor, and twice
that where all are to have the sum (rings, or anything that is as good). A pass is a forward and a
backward pass of a part of the batch; there are train.accumulate of them in a step.
"""

from __future__ import annotations

import torch

from attamba.config import AttambaMixer, RunConfig
from attamba.mixers import HawkMixer, Mamba2Mixer, Mixer, TransformerMixer, attends
from attamba.models import build_model
from attamba.models.mixer_costs import kv_width, mixer_costs
from attamba.models.splits import placements, splits
from attamba.plan.activations import FLOAT32
from attamba.plan.layout import Layout
from attamba.plan.memory import Parameters, gather_bytes, product_bytes, residual_bytes
from attamba.plan.policies import entries_of_others, longest_open


def traffic(config: RunConfig, layout: Layout, sizes: list[Parameters]) -> dict[str, float]:
    """By what is sent; zero where nothing is."""
    return {
        "weights gathered": _gathered(config, layout, sizes),
        "gradients reduced": _reduced(layout, sizes),
        "gradients between copies": _between_copies(layout, sizes),
        "sums of tensor ranks": tensor_sums(config, layout),
        "rows between tensor ranks": tensor_rows(config, layout),
        "keys and values of a row": context_keys(config, layout),
        "open chunks and states": context_states(config, layout),
    }


def _gathered(config: RunConfig, layout: Layout, sizes: list[Parameters]) -> float:
    """Each pass gathers a layer's weights twice, forward and backward, in between they are freed;
    embedding, norm and head once, as they are needed last and first. In parallel.gather_dtype;
    parts are of equal size, filled up where they are not."""
    *layers, rest = sizes
    entries = 2 * sum(layer.sharded for layer in layers) + rest.sharded
    return layout.passes * gather_bytes(config) * entries * (layout.holders - 1)


def _reduced(layout: Layout, sizes: list[Parameters]) -> float:
    """Every gradient once in each pass, in float32: a rank keeps the sums of its own parts."""
    entries = sum(group.sharded for group in sizes)
    return layout.passes * FLOAT32 * entries * (layout.holders - 1)


def _between_copies(layout: Layout, sizes: list[Parameters]) -> float:
    """Copies of the model add up what is left of a step's gradients, once in a step."""
    entries = sum(group.sharded for group in sizes)
    return 2 * (layout.replicate - 1) / layout.replicate * FLOAT32 * entries


def tensor_sums(config: RunConfig, layout: Layout) -> float:
    """Tensor parallelism: matrices are cut by heads and inner widths, so that outputs are sums.

    With c bytes of a product, r of what runs between layers and g of parameters, per token:

        mixer, feed-forward     2 c d           a sum each, forward; c d again where layers are
                                                computed anew, which ends before the last sum
        their inputs            2 r d           gradients, summed
        embedding, head         (g + r) d       a sum forward; a gradient
        loss                    3 * 4           the largest logit, the sum, the target's
        norms inside            4 n             sums of squares over n norms, forward, anew and back
        compressors             c 2 G D / 2     each rank gets its own heads' sum: half a sum's
                                                traffic, forward, anew and back

    twice over, as a sum is collected and sent back. Gradients of gains, rates and taps, which all
    tensor ranks hold, are summed too, and are too small to count.
    """
    share = (layout.tensor - 1) / layout.tensor
    c, r, d = product_bytes(config), residual_bytes(config, layout), config.model.dim
    times = _forward_passes(config) + 1
    per_token = (gather_bytes(config) + r) * d + 3.0 * FLOAT32
    for mixer in config.model.layer_mixers():
        per_token += times * c * d + 2 * r * d
        if isinstance(mixer, AttambaMixer) and mixer.compressor == "ssm":
            per_token += times * c * kv_width(mixer, d)
        per_token += times * FLOAT32 * _norms(mixer)
    return 2 * layout.passes * layout.tokens * share * per_token


def tensor_rows(config: RunConfig, layout: Layout) -> float:
    """Tensor parallelism: rows of matrices that make several things, such as keys and values.

    A rank holds a run of such a matrix and uses a run of each thing: it receives what it uses and
    does not hold, forward and where layers are computed anew, and as much of gradients. In
    parallel.gather_dtype, and of the rank that receives most.
    """
    if layout.tensor == 1:
        return 0.0
    with torch.device("meta"):
        model = build_model(config.model)
    uses, most = splits(model), [0] * layout.tensor
    places = placements(model, uses, layout.tensor, layout.holders)
    for name, parameter in model.named_parameters():
        if places[name].tensor_dim is not None and len(uses[name].segments) > 1:
            width = parameter.numel() // parameter.shape[0]
            for rank in range(layout.tensor):
                most[rank] += width * uses[name].missing(rank, layout.tensor)
    return layout.passes * (_forward_passes(config) + 1) * gather_bytes(config) * max(most)


def context_keys(config: RunConfig, layout: Layout) -> float:
    """Context parallelism: keys and values from the ranks before this one.

    Entries of other ranks (see policies.entries_of_others), 2 G D c bytes each, come once in the
    forward pass, and once more where layers are computed anew; in the backward pass as many
    gradients come back. (Ring attention passes all T - T/ranks keys on in the forward pass, and
    keys and gradients in the backward pass.)
    """
    total = 0.0
    for i, mixer in enumerate(config.model.layer_mixers()):
        if attends(mixer):
            entry = 2 * kv_width(mixer, config.model.dim) / layout.tensor * product_bytes(config)
            total += entry * entries_of_others(config.model, i, layout)
    return layout.passes * layout.rows * (_forward_passes(config) + 1) * total


def context_states(config: RunConfig, layout: Layout) -> float:
    """Context parallelism: what else of the tokens before a rank's own it needs, per layer.

        compressors by chunk     m r d            the layer's normed input at the m tokens of the
                                                  chunk that may reach over
        ... by sequence,         (ranks - 1) 4 (n + m) + conv
        recurrences                               states of n numbers at the ends of all spans, and
                                                  m decays over them; the convolution's last inputs

    forward, where layers are computed anew, and their gradients.
    """
    if layout.context == 1:
        return 0.0
    total = sum(_state_bytes(config, layout, i) for i in range(config.model.n_layers))
    return layout.passes * layout.rows * (_forward_passes(config) + 1) * total


def _state_bytes(config: RunConfig, layout: Layout, layer_idx: int) -> float:
    """See context_states."""
    mixer, d, t = config.model.layer_mixers()[layer_idx], config.model.dim, layout.tensor
    c, r = product_bytes(config), residual_bytes(config, layout)
    if isinstance(mixer, TransformerMixer):
        return 0.0
    if isinstance(mixer, AttambaMixer) and mixer.ssm_scope == "chunk":
        others = layout.seq_len * (layout.context - 1) // layout.context
        return min(longest_open(config.model, layer_idx), others) * r * d
    states = mixer_costs(mixer, d).float32 / t
    if isinstance(mixer, AttambaMixer):
        decays, taps = 2 * mixer.ssm_heads / t, mixer.conv_width - 1
        conv = c * taps * 2 * ((mixer.ssm_dim or d // 2) / t + 2 * mixer.state_dim)
    elif isinstance(mixer, Mamba2Mixer):
        inner, taps = mixer.inner(d) / t, mixer.conv_width - 1
        decays, conv = inner / mixer.head_dim, c * taps * (inner + 2 * mixer.state_dim)
    else:
        decays, taps = states, mixer.conv_width - 1
        conv = taps * (c * states if isinstance(mixer, HawkMixer) else r * d)
    return (layout.context - 1) * FLOAT32 * (states + decays) + conv


def _norms(mixer: Mixer) -> int:
    """Norms over numbers that tensor ranks divide."""
    if isinstance(mixer, AttambaMixer):
        return 0 if mixer.compressor == "mean" else 2
    return 1 if isinstance(mixer, Mamba2Mixer) else 0


def _forward_passes(config: RunConfig) -> int:
    """Of a layer, for one backward pass."""
    return 1 if config.parallel.activation_checkpointing == "none" else 2
