"""What the demo trains and measures, and how it fits into its time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from attamba.config import (
    AttambaMixer,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    TransformerMixer,
)

MODELS = ("attamba", "transformer")
LEARNING_RATES = {"attamba": 2e-3, "transformer": 2e-3}
"""Chosen for each by attamba.demo.tune: studies/demo-rates."""
SEED_SPREAD = 0.04
"""Bits per byte between two seeds of one model at its rate, about: studies/demo-rates."""
TRAINING_SHARE = 0.68
"""Of the demo's minutes; the rest is for preparing, evaluating and timing the decoder."""
MAX_STEPS = 1500
"""A fast machine is done sooner rather than training for longer."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo. The defaults are what two cores can do in five minutes."""

    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    chunk_size: int = 8
    leading_tokens: int = 64
    seq_len: int = 512
    batch_size: int = 2
    lr: dict[str, float] = field(default_factory=LEARNING_RATES.copy)
    """Peak learning rate of each model."""
    seed: int = 0
    steps: int | None = None
    """Optimizer steps of each model. Default: as many as fit, see fit_steps."""
    eval_bytes_per_file: int = 2048
    """Of each held-out file, from its beginning, that are scored."""
    chunk_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """At which the one trained Attamba model is evaluated."""
    lengths: tuple[int, ...] = (1024, 8192, 65536)
    """Tokens in the cache, at which it is measured."""
    decode_repeats: int = 48
    prompt: str = "def "
    sample_tokens: int = 320
    mask_tokens: int = 160
    """Length of the input whose attention mask is drawn."""


def model_config(settings: DemoSettings, name: str) -> ModelConfig:
    """The demo's model called `name`.

    The transformer's feed-forward layers are widened until both have the same number of
    parameters, to less than one row of a matrix per layer.
    """
    from attamba.models.accounting import n_parameters

    attamba = ModelConfig(
        dim=settings.dim,
        n_layers=settings.n_layers,
        mixer=AttambaMixer(
            n_heads=settings.n_heads,
            chunk_size=settings.chunk_size,
            leading_tokens=settings.leading_tokens,
        ),
    )
    if name == "attamba":
        return attamba
    transformer = replace(attamba, mixer=TransformerMixer(n_heads=settings.n_heads))
    missing = n_parameters(attamba) - n_parameters(transformer)
    per_unit = 3 * settings.dim * settings.n_layers  # parameters that one unit of ffn_dim costs
    return replace(transformer, ffn_dim=3 * settings.dim + round(missing / per_unit))


def run_config(settings: DemoSettings, name: str, out: Path, *, progress: bool = True) -> RunConfig:
    """How the demo trains the model called `name`, in out/name on the data in out/data."""
    steps = settings.steps
    assert steps is not None, "fit_steps chooses them"
    return RunConfig(
        out=str(out / name),
        model=model_config(settings, name),
        data=DataConfig(
            train=str(out / "data" / "train"),
            valid=str(out / "data" / "held-out"),
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
        ),
        optim=OptimConfig(lr=settings.lr[name], warmup_steps=steps // 10, min_lr_ratio=0.02),
        train=TrainConfig(
            steps=steps,
            seed=settings.seed,
            device="cpu",
            log_every=max(1, steps // 40),
            eval_every=-(-steps // 8),
            eval_rows=8,
            save_every=-(-steps // 4),
            keep=1,
            progress=progress,
        ),
    )


def fit_steps(settings: DemoSettings, minutes: float) -> int:
    """Steps of each model, in tens, that two trainings of together TRAINING_SHARE can take.

    Times a few steps of both on this machine. At least 10, at most MAX_STEPS.
    """
    per_step = sum(_seconds_per_step(settings, name) for name in MODELS)
    return max(10, min(MAX_STEPS, int(TRAINING_SHARE * 60 * minutes / per_step) // 10 * 10))


def _seconds_per_step(settings: DemoSettings, name: str) -> float:
    """Median seconds of a training step on this machine."""
    import torch
    import torch.nn.functional as F

    from attamba.models import build_model
    from attamba.train.optim import build_optimizer

    model = build_model(model_config(settings, name))
    optimizer = build_optimizer(model, OptimConfig())
    ids = torch.randint(256, (settings.batch_size, settings.seq_len + 1))
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])  # the first ones warm up
