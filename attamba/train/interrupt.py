"""Ctrl-C and SIGTERM: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped from outside after it had saved; the text says how to go on."""


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM sets `requested`, for the loop to see.

    An optimizer step that is cut in two would leave weights that no checkpoint should hold. A
    second signal acts at once, as it would have without this class. Signals that were ignored
    stay ignored (nohup), and outside the main thread, where Python takes no handlers, nothing is
    changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
