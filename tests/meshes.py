"""Loss, gradients and records of a run, of one process and of the ranks of a mesh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_meshes, on_ranks
from torch import Tensor

from attamba.config import RunConfig
from attamba.data import Batch
from attamba.train.distributed import Ranks
from attamba.train.run import Run
from attamba.train.sinks import Record
from attamba.train.sources import open_sources
from attamba.train.watchdog import Watchdog

CPU = torch.device("cpu")


def run_on(config: RunConfig, ranks: Ranks) -> Run:
    """A run of which no step is taken yet."""
    sources = open_sources(config, Path(config.out), fresh=False, say=print, share=ranks.share)
    return Run(config, sources, ranks, Watchdog(Ranks(ranks.device), 60))


def gradients_of(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Loss, norm and every clipped gradient of these rows, whole.

    batch: this rank's rows. Boundaries that are drawn are those of step 1.
    """
    run.model.set_draw(1)
    found = {"loss": run.gradients(run.send(batch)), "norm": run._clip()}
    for name, parameter in run.model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = grad if run.ranks.alone else grad.full_tensor()
    return {name: tensor.clone() for name, tensor in found.items()}


def alone(config: RunConfig, **parallel: Any) -> RunConfig:
    """The run on one process. parallel: what else to change of config.parallel."""
    one = {"replicate": 1, "shard": 1, "context": 1, "tensor": 1, **parallel}
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **one))


def of_one(config: RunConfig, work: Any) -> dict[str, Tensor]:
    """`work` by one process that keeps all activations."""
    return work(alone(config, activation_checkpointing="none"), Ranks(CPU))


def assert_equal(
    n: int,
    configs: dict[str, RunConfig],
    work: Any,
    *,
    loose: dict[str, float] | None = None,
    timeout: float = 120,
) -> None:
    """`work(config, ranks)`, tensors by name, gives on each of n ranks what it gives on one.

    loose: by the configuration's name, how far apart they may be, if not 5e-5 of their norm, or of
        a ten thousandth of that of all gradients: smaller ones are left over from sums of larger
        numbers, and have their rounding.
    """
    several = on_ranks(n, in_meshes, list(configs.values()), work, timeout=timeout)
    for (name, config), *found in zip(configs.items(), *several):
        expected = of_one(config, work)
        assert expected["norm"] > 0.5
        limit = (loose or {}).get(name, 5e-5)
        for rank in found:
            assert rank.keys() == expected.keys()
            for key, tensor in expected.items():
                error = (rank[key] - tensor).norm() / max(tensor.norm(), 1e-4 * expected["norm"])
                assert error < limit, f"{name}: {key} differs by {error:.1e}"


def assert_same_records(found: list[Record], expected: list[Record], rel: float = 1e-3) -> None:
    """But for sums in another order, which AdamW enlarges."""
    assert len(found) == len(expected)
    for left, right in zip(found, expected):
        assert left.keys() == right.keys() and left["kind"] == right["kind"]
        for key in left.keys() - {"kind"}:
            assert left[key] == pytest.approx(right[key], rel=rel), (left, right)
