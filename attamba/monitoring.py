"""Sections of a run's configuration that look at training, and leave steps out that would harm it.

See attamba.config, which makes a RunConfig of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attamba.mixers import ConfigError, at_least

Sink = Literal["jsonl", "tensorboard", "wandb", "trackio"]


@dataclass(kw_only=True)
class MetricsConfig:
    """What is measured while training, and where it goes."""

    sinks: list[Sink] = field(default_factory=lambda: ["jsonl"])
    """jsonl: metrics.jsonl in the run's folder. tensorboard: event files there. wandb, trackio:
    those packages, where they are installed."""
    project: str = "attamba"
    """Of wandb and trackio; the run's name there is that of its folder."""
    layers_every: int = 0
    """Steps between statistics of each layer (activations, gradients, updates, attention); 0 for
    none."""
    layers_queries: int = 16
    """Queries of a row, evenly spread, whose attention weights are looked at."""
    peak_tflops: float | None = None
    """Of one device, 1e12 operations per second, for the model FLOPs utilisation. Default: the
    data sheet's for bfloat16, where the device is known and train.dtype is bfloat16."""

    def validate(self) -> None:
        for name in ("sinks", "project"):
            if not getattr(self, name):
                raise ConfigError(f"metrics.{name} is empty; leave it out for the default")
        if len(set(self.sinks)) < len(self.sinks):
            raise ConfigError(f"metrics.sinks={self.sinks} names one twice; name each once")
        at_least(self.layers_every, 0, "metrics.layers_every")
        at_least(self.layers_queries, 1, "metrics.layers_queries")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ConfigError(f"metrics.peak_tflops={self.peak_tflops} must be above 0")


@dataclass(kw_only=True)
class SpikesConfig:
    """Steps that change no weight: a loss or gradient that is not finite, or a loss that jumps.

    A step that is skipped counts as a step: its rows are passed over and the learning rate goes on
    as planned; weights and the optimizer's moments stay as they are.
    """

    threshold: float | None = None
    """Skip a loss above median + threshold * 1.4826 * MAD of the last `window` losses (MAD: median
    of the distances to the median; 1.4826 * MAD is a normal distribution's standard deviation).
    Default: finite losses are never skipped."""
    window: int = 128
    """Losses of steps that were taken; while there are fewer, no finite loss is skipped."""
    max_in_a_row: int = 5
    """So many skipped steps one after the other end training; 1: the first one does."""
    max_skipped: int = 100
    """So many in the whole run end training."""

    def validate(self) -> None:
        if self.threshold is not None and not self.threshold > 0:
            raise ConfigError(
                f"spikes.threshold={self.threshold} must be above 0; leave it out to keep all"
            )
        at_least(self.window, 3, "spikes.window")
        for name in ("max_in_a_row", "max_skipped"):
            at_least(getattr(self, name), 1, f"spikes.{name}")


@dataclass(kw_only=True)
class ProfileConfig:
    """What `profile` records; `profile: true` means these defaults."""

    wait: int = 10
    """Steps of this call of train before it: compilation and warm-up."""
    steps: int = 3
    """Steps in the trace."""

    def validate(self) -> None:
        at_least(self.wait, 1, "profile.wait")
        at_least(self.steps, 1, "profile.steps")


@dataclass(kw_only=True)
class EvalConfig:
    """How a run is evaluated: tasks of the lm-eval harness, and by whom."""

    tasks: list[str] = field(default_factory=list)
    """Names; NAME=PATH for those on local text. Default: none."""
    every: int = 0
    """Steps between scorings; 0 for the last step alone."""
    limit: int | None = None
    """Documents of each task. Default: all."""
    mode: Literal["inline", "process", "job"] = "inline"
    """Who validates and scores. inline: training itself, which waits. process: a process beside it,
    of checkpoints. job: whoever runs `attamba follow`."""
    device: str = "cpu"
    """Of mode process: cpu, cuda:1, auto, ..."""

    def validate(self) -> None:
        at_least(self.every, 0, "eval.every")
        if self.limit is not None:
            at_least(self.limit, 1, "eval.limit")
        if not self.tasks and (self.every or self.limit):
            raise ConfigError("eval.every and eval.limit need eval.tasks; name some, or leave them")
        if self.device != "cpu" and self.mode != "process":
            raise ConfigError(
                f"eval.device={self.device!r} is that of eval.mode=process, not of "
                f"{self.mode}; set both, or leave it out"
            )
