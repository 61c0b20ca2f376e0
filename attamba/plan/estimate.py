"""A plan: one configuration on one layout, all figures together."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from attamba.config import RunConfig
from attamba.models.accounting import countable, flops, n_parameters
from attamba.plan import memory
from attamba.plan.layout import Layout
from attamba.plan.policies import as_transformer
from attamba.plan.traffic import traffic

TRAINING = 3
"""A backward pass costs two forward passes."""


@dataclass(frozen=True)
class Plan:
    """Figures of one model. Bytes are those of one rank."""

    n_parameters: int
    memory: dict[str, float]
    """At the peak of a step; see plan.memory."""
    traffic: dict[str, float]
    """Received in a step; see plan.traffic."""
    flops: float
    """Of a rank in a step: the model's own, forward and backward."""
    flops_anew: float
    """Of a rank in a step: computed once more for activation checkpointing."""
    slowest: float
    """FLOPs of the rank that has most of them, over the mean: the one with the end of the rows."""
    cache: float | None
    """Bytes of a decode cache, where its tokens were asked for."""

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def total_traffic(self) -> float:
        return sum(self.traffic.values())

    def seconds(self, tflops: float, mfu: float) -> float:
        """Of a step, at `mfu` of a rank's `tflops` in model FLOPs; all wait for the slowest."""
        return self.flops * self.slowest / (tflops * 1e12 * mfu)


def make_plan(config: RunConfig, layout: Layout, decode_tokens: int | None = None) -> Plan:
    """All figures of `config` on `layout`.

    decode_tokens: also the decode cache of one sequence of so many tokens.

    Raises ConfigError where the model does not fit together.
    """
    sizes = memory.parameters(config, layout)
    held = memory.states(config, layout, sizes)
    held["whole weights"] = memory.working_weights(config, layout, sizes)
    held |= memory.activations(config, layout)
    done, anew = step_flops(config, layout)
    cache = None if decode_tokens is None else memory.decode_cache(config, layout, decode_tokens)
    return Plan(
        n_parameters=n_parameters(config.model),
        memory=held,
        traffic=traffic(config, layout, sizes),
        flops=done,
        flops_anew=anew,
        slowest=slowest(config, layout),
        cache=cache,
    )


def step_flops(config: RunConfig, layout: Layout) -> tuple[float, float]:
    """FLOPs of a rank in a step, and those of them that are done anew, by accounting.flops.

    The model's own are three forward passes over the step's tokens; the mean of all ranks: see
    slowest. full repeats all of a layer's forward pass, selective all of it but products and
    attention.
    """
    forward = flops(countable(config.model), config.data.seq_len)
    head = 2.0 * config.model.vocab_size * config.model.dim
    again = {"none": 0.0, "selective": forward.scan, "full": forward.total - head}
    tokens = config.data.batch_size * config.data.seq_len / layout.ranks
    kind = config.parallel.activation_checkpointing
    return TRAINING * forward.total * tokens, again[kind] * tokens


def slowest(config: RunConfig, layout: Layout) -> float:
    """FLOPs of the rank that has most, over the mean of all.

    Ranks that share rows have equal spans of them, and the last one's tokens see most.
    """
    model, seq_len = countable(config.model), config.data.seq_len
    mean, width = flops(model, seq_len), config.data.seq_len // layout.context
    if layout.context == 1:
        return 1.0
    before = seq_len - width
    seen = mean.attention * seq_len - flops(model, before).attention * before
    return (mean.total - mean.attention + seen / width) / mean.total


def beside(config: RunConfig) -> RunConfig:
    """The same run of a transformer of the same sizes."""
    other = copy.deepcopy(config)
    return dataclasses.replace(other, model=as_transformer(other.model))
