"""What a run shows while it goes on.

A live bar where standard output is a terminal and rich is installed; lines of text otherwise;
nothing with train.progress=false.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attamba.train.metrics import Record


class Silent:
    """Shows nothing; the base of those that do."""

    def start(self, step: int, steps: int) -> None:
        """Training goes on from `step` of `steps`."""

    def step(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        """A step is done; on a GPU one in some. loss: None where it is not finite."""

    def record(self, record: Record) -> None:
        """A line was written to the metrics."""

    def say(self, text: str) -> None:
        """Something that the user should read."""


class Lines(Silent):
    """One line per record."""

    def __init__(self) -> None:
        self._steps = 0

    def start(self, step: int, steps: int) -> None:
        self._steps = steps

    def record(self, record: Record) -> None:
        head = f"step {record['step']}/{self._steps}"
        if record["kind"] in ("valid", "tasks"):
            self.say(f"{head}  {scores(record)}")
        if record["kind"] != "train":
            return
        rate = record["tokens_per_second"]
        left = (self._steps - record["step"]) * (record["tokens"] / record["step"]) / rate
        self.say(
            f"{head}  loss {_told(record['loss'], '.4f')}  lr {record['lr']:.2e}  "
            f"grad norm {_told(record['grad_norm'], '.2f')}  {_skipped(record)}"
            f"{rate:,.0f} tokens/s  {clock(left)} left"
        )

    def say(self, text: str) -> None:
        print(text, flush=True)


class Bar(Silent):
    """A bar with loss, tokens/s and time left; messages and validations scroll above it."""

    def __init__(self, bar: Any, description: str) -> None:
        self._bar = bar
        self._task = bar.add_task(description, total=None, loss="", rate="")

    def start(self, step: int, steps: int) -> None:
        self._bar.reset(self._task, total=steps, completed=step)

    def step(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        self._bar.update(
            self._task,
            completed=step,
            loss=f"loss {_told(loss, '.3f')}",
            rate=f"{tokens_per_second:,.0f} tokens/s",
        )

    def record(self, record: Record) -> None:
        if record["kind"] in ("valid", "tasks"):
            self.say(f"step {record['step']}  {scores(record)}")

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


@contextmanager
def open_progress(description: str, *, enabled: bool) -> Iterator[Silent]:
    """The display that this process should have; see the top of this file."""
    if not enabled:
        yield Silent()
    elif sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeLeft(),
            TextColumn("left"),
        )
        with Progress(*columns) as bar:
            yield Bar(bar, description)
    else:
        yield Lines()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _told(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _skipped(record: Record) -> str:
    return f"{record['skipped']} skipped  " if record["skipped"] else ""


def scores(record: Record) -> str:
    """A record of validation or of tasks."""
    if record["kind"] == "tasks":
        figures = {key: value for key, value in record.items() if "/" in key}
        return ", ".join(f"{k} {'-' if v is None else f'{v:.4f}'}" for k, v in figures.items())
    bits = record["valid_bits_per_byte"]
    text = "" if bits is None else f", {bits:.4f} bits/byte"
    return f"validation: {record['valid_loss']:.4f} nats/token{text}"
