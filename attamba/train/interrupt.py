"""Ctrl-C, SIGTERM, SIGUSR1 and limits of time: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attamba.exit_status import INTERRUPTED, REQUEUE


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped from outside, after it had saved if it had come to a step; the text says
    how to go on."""

    exit_status = INTERRUPTED
    """Of the command."""


class TrainingPreempted(TrainingInterrupted):
    """It was SIGTERM or SIGUSR1, by which schedulers take machines back."""

    exit_status = REQUEUE


@contextmanager
def left_at_once(run_dir: Path) -> Iterator[None]:
    """While entered, SIGTERM and SIGUSR1 raise TrainingPreempted: where no step is under way.

    A StopRequest that is entered within takes their place. Signals that were ignored stay so.
    """

    def leave(number: int, frame: object) -> None:
        raise TrainingPreempted(
            f"Told to leave by {signal.Signals(number).name} while no step was under way; the same "
            f"command goes on, from the last checkpoint if there is one (out={run_dir})"
        )

    previous = _handled((signal.SIGTERM, signal.SIGUSR1), leave)
    try:
        yield
    finally:
        _restored(previous)


def _handled(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Set a handler; returns those before it. Outside the main thread Python takes none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


def _restored(previous: dict[int, Any]) -> None:
    while previous:
        signal.signal(*previous.popitem())


class StopRequest:
    """While entered, the first Ctrl-C, SIGTERM or SIGUSR1 sets `requested`, for the loop to see.

    An optimizer step that is cut in two would leave weights that no checkpoint should hold. A
    second Ctrl-C acts at once, as it would have without this class; schedulers send SIGUSR1 and
    then SIGTERM, and in the end kill what stays. Signals that were ignored stay ignored (nohup),
    and outside the main thread, where Python takes no handlers, nothing is changed.

    should_stop: asked whenever `requested` is read; its first True is kept.
    patient: a second Ctrl-C changes nothing either. Under torchrun a rank often gets each signal
        twice, from the scheduler or terminal and from torchrun, which in the end kills those that
        stay.
    """

    def __init__(
        self, should_stop: Callable[[], bool] | None = None, *, patient: bool = False
    ) -> None:
        self._should_stop, self._patient = should_stop, patient
        self._stopped = False
        self.signalled = False
        """Was there a signal?"""
        self.preempted = False
        """Was it SIGTERM or SIGUSR1?"""
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Should training end after this step?"""
        if not self._stopped and self._should_stop is not None and self._should_stop():
            self._stopped = True  # and is left alone otherwise: a signal may have come meanwhile
        return self._stopped

    def __enter__(self) -> StopRequest:
        self._previous = _handled((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        _restored(self._previous)

    def _handle(self, number: int, frame: object) -> None:
        self._stopped = self.signalled = True
        self.preempted = self.preempted or number != signal.SIGINT
        if not self._patient and signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))
