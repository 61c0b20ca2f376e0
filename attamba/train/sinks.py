"""Where records of metrics go beside metrics.jsonl: TensorBoard, wandb, trackio.

Each takes them as numbers by name: "<kind>/<key>", and for layers "<kind>/<key>/<module>".
"""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from attamba.data import MissingPackageError
from attamba.data.files import write_json

Record = dict[str, Any]

_NOT_PLOTTED = ("kind", "step")
_INSTALL = {
    "tensorboard": "pip install 'attamba[train]'",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
}


class Sink(Protocol):
    """Takes records while a run goes on."""

    def write(self, record: Record) -> None:
        """One record."""

    def sync(self) -> None:
        """Bring what was written to where it stays, if that can be asked for."""

    def close(self) -> None:
        """No more records come."""


def open_sinks(
    names: list[str], run_dir: Path, *, step: int, project: str, config: Record
) -> list[Sink]:
    """The sinks of these names.

    step: the step that the run goes on from; 0 begins a run of its own in wandb and trackio.
    config: the run's, shown there.

    Raises MissingPackageError (an ImportError) where its package is not installed.
    """
    trackers: dict[str, Callable[[Path, str, str, Record], Sink]] = {
        "wandb": Wandb,
        "trackio": Trackio,
    }
    sinks: list[Sink] = []
    for name in names:
        if name in trackers:
            run_id = tracking_id(run_dir, fresh=step == 0 and not sinks)
            sinks.append(trackers[name](run_dir, run_id, project, config))
    if "tensorboard" in names:
        sinks.append(TensorBoard(run_dir, step))
    return sinks


class TensorBoard:
    """Event files in <run_dir>/tensorboard."""

    def __init__(self, run_dir: Path, step: int) -> None:
        writer = _needed("tensorboard", "torch.utils.tensorboard").SummaryWriter
        # Events of later steps, written by a run that was killed, are hidden from the plots.
        self._events = writer(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in scalars(record):
            self._events.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Wandb:
    """A run of wandb, which goes on when training does.

    It takes steps in rising order alone, and a run that goes on from a checkpoint repeats some: the
    step is therefore a figure like others, and the axis of all.
    """

    def __init__(self, run_dir: Path, run_id: str, project: str, config: Record) -> None:
        self._run = _needed("wandb", "wandb").init(
            project=project,
            name=run_dir.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=config,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log({"step": record["step"], **dict(scalars(record))})

    def sync(self) -> None:
        """Its own process does."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, which goes on when training does."""

    def __init__(self, run_dir: Path, run_id: str, project: str, config: Record) -> None:
        name = f"{run_dir.resolve().name}-{run_id[:8]}"
        module = _needed("trackio", "trackio")
        self._run = module.init(project=project, name=name, resume="allow", config=config)

    def write(self, record: Record) -> None:
        self._run.log(dict(scalars(record)), step=record["step"])

    def sync(self) -> None:
        """Its own thread does."""

    def close(self) -> None:
        self._run.finish()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record by name; what is null or text is left out."""
    for key, value in record.items():
        figures = value if isinstance(value, dict) else {None: value}
        for module, number in figures.items():
            if key not in _NOT_PLOTTED and isinstance(number, (int, float)):
                name = f"{record['kind']}/{key}"
                yield (name if module is None else f"{name}/{module}"), number


def tracking_id(run_dir: Path, *, fresh: bool) -> str:
    """The run's name among all others, kept in its folder; `fresh` draws a new one."""
    path = run_dir / "tracking.json"
    if not fresh and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    made = uuid.uuid4().hex
    write_json(path, {"id": made})
    return made


def _needed(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{name} in metrics.sinks needs {name}, which is not installed; it comes with: "
            f"{_INSTALL[name]}"
        ) from error
