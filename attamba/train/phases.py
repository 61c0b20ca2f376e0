"""How long the parts of a step take, measured without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

Mark = float | torch.cuda.Event
PHASES = ("data", "forward", "backward", "optimizer")


class Phases:
    """`with phases("forward"): ...` measures and, in a profiler's trace, names that part.

    On CUDA by events in the stream; what is not done by the device (`on_host`) by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def __call__(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        with record_function(name):
            begin = self._mark(on_host)
            yield
            self._spans.append((name, begin, self._mark(on_host)))

    def take(self) -> dict[str, float]:
        """Seconds of each of PHASES since the last call; the device must have done its work."""
        total = dict.fromkeys(PHASES, 0.0)
        for name, begin, end in self._spans:
            total[name] += _seconds(begin, end)
        self._spans.clear()
        return total

    def _mark(self, on_host: bool) -> Mark:
        if on_host or not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - begin
