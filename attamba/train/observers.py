"""What looks at a run while it trains, and changes nothing of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attamba.train.sinks import Record
from attamba.train.utilisation import FlopCounter, peak_flops

if TYPE_CHECKING:
    from attamba.train.run import Run


class Observer:
    """Called by the loop, on every rank; the base, which sees nothing."""

    def after_step(self, run: Run) -> list[Record]:
        """A step was taken, which the device may still be at. Returns records of its own."""
        return []

    def figures(self, run: Run) -> Record:
        """What to add to the training record of this step; the device has done it."""
        return {}

    def close(self, run: Run) -> None:
        """Training is over, or has failed."""


def open_observers(run: Run, say: Callable[[str], None]) -> list[Observer]:
    """The observers that the run's configuration asks for."""
    observers: list[Observer] = [Speed(run)]
    if run.config.metrics.layers_every:
        from attamba.train.layers import LayerStatistics

        observers.append(LayerStatistics(run))
    if run.config.profile is not False:
        from attamba.train.profile import Profiler

        observers.append(Profiler(run, say))
    return observers


class Speed(Observer):
    """How fast a run is, and what holds it up, since the last record:

    tokens_per_second_per_device  tokens_per_second is that of all
    mfu                model FLOPs utilisation: the FLOPs of the model itself, forward and backward,
                       over all devices' peak; null where that is not known
    data_share, forward_share, backward_share, optimizer_share
                       of the time: reading and sending rows (on the host, beside the device's
                       work), forward passes with the loss, backward passes, clipping and the
                       optimizer; on rank 0, data_share on the rank that reads longest, for which
                       all others wait
    memory_bytes, memory_reserved_bytes, memory_peak_bytes
                       of the rank that has the most: allocated on the device, held by its
                       allocator, and allocated at most so far; on a CPU the process's resident
                       size and the most of it, and nothing reserved
    """

    def __init__(self, run: Run) -> None:
        self._counter = FlopCounter(run.config)
        self._peak = peak_flops(run.config, run.device)
        self._flops = 0.0
        self._since = (run.tokens, run.seconds)

    def after_step(self, run: Run) -> list[Record]:
        if self._peak is not None:
            assert run.batch is not None
            self._flops += self._counter.of(run.batch, run.chunk_size)
        return []

    def figures(self, run: Run) -> Record:
        tokens, seconds = run.tokens - self._since[0], run.seconds - self._since[1]
        shares = {f"{name}_share": spent / seconds for name, spent in run.phases.take().items()}
        shares["data_share"] = float(run.ranks.most(_number(shares["data_share"], run)))
        flops = float(run.ranks.sum(_number(self._flops, run)))
        self._since, self._flops = (run.tokens, run.seconds), 0.0
        # Ranks that work on the same rows have each counted the whole of them.
        flops *= run.ranks.share[1] / run.ranks.size
        rate = None if self._peak is None else self._peak * run.ranks.size
        return {
            "tokens_per_second_per_device": tokens / seconds / run.ranks.size,
            "mfu": None if rate is None else flops / seconds / rate,
            **shares,
            **{name: run.ranks.largest(n) for name, n in memory(run.device).items()},
        }


def _number(value: float, run: Run) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=run.device)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes in use now and at most, by the names that records have."""
    if device.type == "cuda":
        known = torch.cuda.memory_stats(device)
        return {
            "memory_bytes": known.get("allocated_bytes.all.current", 0),
            "memory_reserved_bytes": known.get("reserved_bytes.all.current", 0),
            "memory_peak_bytes": known.get("allocated_bytes.all.peak", 0),
        }
    if not sys.platform.startswith("linux"):
        return {}
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    names = {"memory_bytes": "VmRSS", "memory_peak_bytes": "VmHWM"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in names.items()}
