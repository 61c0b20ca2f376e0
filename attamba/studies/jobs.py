"""The runs of a study one after the other, or several at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from attamba.studies.engine import Outcome, Place, work_on
from attamba.studies.recipe import Run

Say = Callable[[str], None]


def run_all(runs: list[Run], place: Place, *, jobs: int = 1, say: Say = print) -> list[Outcome]:
    """Work on every run, `jobs` at a time, and say what became of each.

    Several jobs on device "cuda" or "auto" are spread over the CUDA devices that there are.
    A run that cannot be (its configuration, its data, the device's memory) fails alone; the others
    go on. Raises KeyboardInterrupt after Ctrl-C, SIGTERM or SIGUSR1, when what was running has
    saved.
    """
    outcomes = []
    for outcome in _each(runs, place, jobs):
        outcomes.append(outcome)
        say(str(outcome))
    return outcomes


def _each(runs: list[Run], place: Place, jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        for run in runs:
            yield work_on(run, place)
        return
    # Forked processes cannot use a CUDA device that this one has touched.
    context = multiprocessing.get_context("spawn")
    begun, leaving = context.Value("i", 0), context.Event()
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_settle, initargs=(jobs, begun, leaving)
    ) as pool:
        try:
            for future in as_completed([pool.submit(_work_or_leave, run, place) for run in runs]):
                yield future.result()
        except BaseException:
            leaving.set()
            raise


_leaving: Any = None
"""In a process of several jobs, an event that all of them share: begin nothing more."""


def _work_or_leave(run: Run, place: Place) -> Outcome:
    if _leaving.is_set():
        return Outcome(run, "waiting")
    try:
        return work_on(run, place)
    except BaseException:  # Ctrl-C; what work_on answers for itself is an outcome
        _leaving.set()
        raise


def _settle(jobs: int, begun: Any, leaving: Any) -> None:
    """A process of `jobs` takes its share of the CPU's threads, and the next CUDA device in turn.

    begun: how many processes came before, shared by all. leaving: see _leaving.
    """
    global _leaving
    _leaving = leaving
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    with begun.get_lock():
        number = begun.value
        begun.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
