"""profile: a trace of a few steps, and on CUDA what the memory held in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from attamba.config import ProfileConfig
from attamba.train.observers import Observer
from attamba.train.sinks import Record

if TYPE_CHECKING:
    from attamba.train.run import Run

ENTRIES = 200_000
"""Allocations that a memory snapshot keeps the history of."""


class Profiler(Observer):
    """Writes <run_dir>/profile/trace-step-<first>.json and, on CUDA, memory-step-<first>.pickle.

    The trace is for chrome://tracing, Perfetto and TensorBoard; the parts of a step have the names
    of phases.PHASES in it. The snapshot is for pytorch.org/memory_viz. Rank 0 alone writes.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        asked = run.config.profile
        self._config = asked if isinstance(asked, ProfileConfig) else ProfileConfig()
        self._say, self._on = say, run.ranks.is_main
        self._begin = run.step + self._config.wait
        self._end = self._begin + self._config.steps
        self._folder = Path(run.config.out) / "profile"
        self._profile: profile | None = None

    def after_step(self, run: Run) -> list[Record]:
        if self._on and run.step == self._begin:
            self._start(run.device)
        elif self._profile is not None and run.step == self._end:
            self._write(run.device)
        return []

    def close(self, run: Run) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None
            if run.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        if self._on and run.step < self._end:
            self._say(
                f"No profile: it takes steps {self._begin + 1} to {self._end}, and training ended "
                f"after step {run.step}; set profile.wait and profile.steps to fewer"
            )

    def _start(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(device)
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profile.__enter__()

    def _write(self, device: torch.device) -> None:
        assert self._profile is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._profile.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace-step-{self._begin + 1:08d}.json"
        _aside(trace, self._profile.export_chrome_trace)
        self._profile = None
        text = "the memory in it; there is no snapshot on a CPU"
        if device.type == "cuda":
            snapshot = self._folder / f"memory-step-{self._begin + 1:08d}.pickle"
            _aside(snapshot, torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
            text = f"a snapshot of the memory in {snapshot}"
        self._say(f"Steps {self._begin + 1} to {self._end}: a trace in {trace}, {text}")


def _aside(path: Path, write: Callable[[str], object]) -> None:
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    write(str(aside))
    os.replace(aside, path)
