"""Tasks by name, through the harness's own evaluation."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from attamba.config import ConfigError
from attamba.evaluate import finite
from attamba.harness.adapter import AttambaLM

TASKS = Path(__file__).parent / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))
"""Tasks on text that the caller names; they need no network."""


@dataclass(frozen=True)
class Tasks:
    """What load_tasks returns: tasks with their documents, to be scored any number of times."""

    manager: TaskManager
    loaded: list[Any]


def load_tasks(tasks: Sequence[str]) -> Tasks:
    """Find tasks and read their documents.

    tasks: names of tasks, groups or tags of the harness, or of LOCAL_TASKS; "NAME=PATH" says where
        a local task's text is.

    Raises ConfigError for a name that is not a task's, naming the nearest, for none, and for a task
    whose data are on the network where there is none; DataError for text that cannot be read.
    """
    names, texts = _parse(tasks)
    with _quiet(), _random_states_kept():
        manager = TaskManager(
            include_path=str(TASKS),
            include_defaults=not set(names) <= set(LOCAL_TASKS),  # to read all takes seconds
            metadata=texts,
        )
        return Tasks(manager, [task for name in names for task in _load(manager, name)])


def run_tasks(
    lm: AttambaLM, tasks: Tasks, *, limit: int | None = None, stderr: bool = True
) -> dict[str, Any]:
    """Score a model on tasks; returns what the harness's simple_evaluate returns.

    Args:
        lm: the model.
        limit: documents of each task. Default: all.
        stderr: estimate standard errors, some of which are drawn many times.

    Random states of torch, numpy and Python come back as they were. Raises ConfigError for a limit
    below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1; leave it out for all documents")
    with _quiet(), _random_states_kept():
        return simple_evaluate(
            model=lm,
            tasks=list(tasks.loaded),
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000 if stderr else 0,
            task_manager=tasks.manager,
        )


def table(results: dict[str, Any]) -> str:
    """Results as the harness prints them."""
    kinds = [kind for kind in ("results", "groups") if kind in results]
    return "\n".join(make_table(results, kind) for kind in kinds)


def figures(results: dict[str, Any]) -> dict[str, float | None]:
    """Results as one number for each "task/metric"; None for what is not finite."""
    return finite(
        {
            f"{task}/{metric.removesuffix(',none')}": value
            for task, values in results["results"].items()
            for metric, value in values.items()
            if "," in metric and "_stderr," not in metric and isinstance(value, (int, float))
        }
    )


def _parse(tasks: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(names, path of each local task's text where it was given)."""
    names, texts = [], {}
    for task in tasks:
        name, equals, path = task.partition("=")
        if not name or (equals and not path):
            raise ConfigError(f"task {task!r} is not of the form NAME or NAME=PATH")
        if name in names:
            raise ConfigError(f"task {name!r} is given twice; name each task once")
        if equals and name not in LOCAL_TASKS:
            raise ConfigError(
                f"task {task!r}: only tasks on local text take a PATH ({', '.join(LOCAL_TASKS)}); "
                f"give the name alone"
            )
        names.append(name)
        if equals:
            texts[name] = path
    if not names:
        raise ConfigError(f"no task given; name some, e.g. hellaswag, {', '.join(LOCAL_TASKS)}")
    return names, texts


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The task or group of this name, or all tasks with this tag."""
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see: attamba-lm-eval ls tasks"
        raise ConfigError(f"task {name!r} is not known to the harness; {hint}")
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        raise ConfigError(
            f"task {name!r} needs its data from the network, which cannot be reached ({error}); "
            f"connect once, so that they are kept on disk, or choose tasks on local text: "
            f"{', '.join(LOCAL_TASKS)}"
        ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of its own tasks' defaults; its errors are still seen."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds every generator, and a training run goes on after it."""
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
