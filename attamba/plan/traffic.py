"""Bytes that a rank receives in one step, and as many that it sends.

A collective over n ranks brings each of them (n - 1)/n of a gathered or reduced tensor, and twice
that where all are to have the sum (rings, or anything that is as good). A pass is a forward and a
backward pass of a part of the batch; there are train.accumulate of them in a step.
"""

from __future__ import annotations

from attamba.config import AttambaMixer, RunConfig
from attamba.mixers import attends
from attamba.models.mixer_costs import kv_width
from attamba.plan.activations import FLOAT32
from attamba.plan.layout import Layout
from attamba.plan.memory import Parameters, gather_bytes, product_bytes, state_bytes
from attamba.plan.policies import entries_of_others


def traffic(config: RunConfig, layout: Layout, sizes: list[Parameters]) -> dict[str, float]:
    """By what is sent; zero where nothing is."""
    return {
        "weights gathered": _gathered(config, layout, sizes),
        "gradients reduced": _reduced(layout, sizes),
        "gradients between copies": _between_copies(layout, sizes),
        "sums of tensor ranks": tensor_sums(config, layout),
        "keys and values of a row": context_keys(config, layout),
        "states of a row": context_states(config, layout),
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

    Of [tokens, d], all ranks get the sum: after attention and after the feed-forward part, in the
    forward pass and for the gradients of their inputs in the backward pass, 4 for each layer; 5
    where a layer's forward pass is repeated, which ends before its last sum. One more for the
    embedding, one for the gradient of the head's input.

    Attamba's compressors are cut by their heads, and their outputs, 2 G D per token, are sums of
    which a rank needs its own heads': half the traffic of a sum for all, in the forward pass and
    in the backward pass, and again where it is repeated. The two sums of squares per token that
    their norm needs are not counted.
    """
    share = (layout.tensor - 1) / layout.tensor
    c, d = product_bytes(config), config.model.dim
    again = config.parallel.activation_checkpointing != "none"
    per_token = 2.0 * 2 * c * d
    for mixer in config.model.layer_mixers():
        per_token += 2.0 * (5 if again else 4) * c * d
        if isinstance(mixer, AttambaMixer) and mixer.compressor == "ssm":
            per_token += (3 if again else 2) * c * 2 * kv_width(mixer, d)
    return layout.passes * layout.tokens * share * per_token


def context_keys(config: RunConfig, layout: Layout) -> float:
    """Context parallelism: keys and values from the ranks before this one.

    Entries of other ranks (see policies.entries_of_others), 2 G D c bytes each, come once in the
    forward pass and once in the backward pass, which sends their gradients back: three times in
    all, and a fourth time where a layer is computed anew, attention with it
    (activation_checkpointing=full). For ring attention the same.
    """
    times = 4 if config.parallel.activation_checkpointing == "full" else 3
    total = 0.0
    for i, mixer in enumerate(config.model.layer_mixers()):
        if attends(mixer):
            entry = 2 * kv_width(mixer, config.model.dim) / layout.tensor * product_bytes(config)
            total += entry * entries_of_others(config.model, i, layout)
    return layout.passes * layout.rows * times * total


def context_states(config: RunConfig, layout: Layout) -> float:
    """Context parallelism: the state of compressors or recurrence at the end of a rank's tokens.

    Its float32 state and its convolution's last inputs go to the next rank, and their gradients
    back: twice, and a third time where a layer is computed anew. Where ssm_scope is `chunk` they
    are those of the one chunk that reaches over, and ranks need not wait for each other.
    """
    if layout.context == 1:
        return 0.0
    times = 2 if config.parallel.activation_checkpointing == "none" else 3
    states = sum(state_bytes(config, i) for i in range(config.model.n_layers))
    return layout.passes * layout.rows * times * states / layout.tensor
