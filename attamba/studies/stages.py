"""Runs that are trained in stages: what is trained after what, and the records of all of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from attamba.config import ConfigError, RunConfig
from attamba.studies.recipe import Resolve, Run
from attamba.studies.results import Record
from attamba.train.checkpoint import check_shapes
from attamba.train.metrics import read_metrics
from attamba.train.storage import list_checkpoints


def trainings(run: Run, config: RunConfig, resolve: Resolve) -> list[RunConfig]:
    """What is trained one after the other: the run's stages, in folders within its own, and it.

    config: the run's own. resolve: last changes to a stage's tree. Each but the first begins with
    the weights of the one before, by where they are; the run's own configuration tells them by what
    its stages were. Raises ConfigError where one cannot be.
    """
    found: list[RunConfig] = []
    stages = run.stage_configs(resolve)
    folders = [str(Path(config.out) / "stages" / str(n)) for n in range(1, len(stages) + 1)]
    for one, out in zip([*stages, config], [*folders, config.out]):
        init = replace(one.train, init_from=found[-1].out) if found else one.train
        found.append(replace(one, out=out, train=init))
    return found


def check_stages(configs: list[RunConfig]) -> None:
    """Raise ConfigError where one is of another model, or gone though a later one has begun."""
    *stages, own = configs
    for number, config in enumerate(stages, 1):
        check_shapes(f"stage {number}", config.model, own.model)
    begun = [bool(list_checkpoints(config.out)) for config in configs]
    for config, (there, later) in zip(configs, itertools.pairwise(begun)):
        if later and not there:
            raise ConfigError(
                f"{config.out} holds no checkpoint, and what began with its weights is there; "
                f"delete {own.out} to train anew"
            )


def read_all(configs: list[RunConfig], n: int) -> list[list[Record]]:
    """The records of the first n of `trainings`, counted on from one to the next.

    Those of what comes before the run's own have its number as their `stage`.
    """
    found: list[list[Record]] = []
    before = {"step": 0, "tokens": 0, "seconds": 0.0}
    for number, config in enumerate(configs[:n], 1):
        stage = {} if config is configs[-1] else {"stage": number}
        records = [
            r | {key: r[key] + n for key, n in before.items() if key in r} | stage
            for r in read_metrics(Path(config.out) / "metrics.jsonl")
        ]
        last = next((r for r in reversed(records) if r["kind"] == "train"), before)
        before = {key: last[key] for key in before}
        found.append(records)
    return found
