"""Scores the checkpoints of a run while it goes on: `attamba follow`, and eval.mode=process.

<run_dir>/eval.jsonl    records of kind "valid" and "tasks", as metrics.jsonl would have them, with
                        "checkpoint"; and of kind "failed" with "error"
<run_dir>/.follow/      the checkpoint at work, which training may delete meanwhile
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attamba.config import ConfigError, RunConfig
from attamba.data.files import hold
from attamba.mixers import at_least
from attamba.models import Decoder
from attamba.train import losses
from attamba.train.checkpoint import load, read_config, read_state
from attamba.train.metrics import append_line, read_metrics
from attamba.train.progress import scores
from attamba.train.run_folder import STATUS
from attamba.train.runtime import resolve_device
from attamba.train.sinks import Record
from attamba.train.sources import open_sources
from attamba.train.storage import list_checkpoints, step_of

if TYPE_CHECKING:
    from attamba.data import Tokenizer
    from attamba.harness import Tasks
    from attamba.train.sources import Sources

RESULTS = "eval.jsonl"
POLL = 0.5
"""Seconds between looks at the folder."""


def follow(
    run_dir: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 8,
    idle: float | None = None,
    no_more: Callable[[], bool] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Validate, and score eval.tasks on, each checkpoint of a run that is due, as they appear.

    A checkpoint is due where train.eval_every (for tasks eval.every) steps have passed since the
    last one that was scored, or it is the last of the run. Those that eval.jsonl holds already are
    left out, so this can be stopped and started again. A failure is recorded and told, and the next
    checkpoint is waited for.

    Returns the number of failures, once the run has ended: done, or diverged, by its status.json.

    run_dir: may be empty yet.
    batch_size: rows per forward pass.
    idle: return after so many seconds without a checkpoint to score. Default: wait on.
    no_more: asked again and again; once it is True, return when all checkpoints are scored. With
        it, another process that follows the run is waited for.
    say: told of every result.

    Raises ConfigError for a folder that is not there or that another process follows, and for a
    device or a batch_size that cannot be used.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder; give the folder of a run, its `out`")
    at_least(batch_size, 1, "--batch-size")
    follower = _Follower(run_dir, resolve_device(device, "--device"), batch_size, say)
    with _alone(run_dir, wait=no_more is not None):
        since = time.monotonic()
        while True:
            # Asked first: what was saved before the end is seen after it.
            ended = _has_ended(run_dir) or (no_more is not None and no_more())
            if follower.score_next():
                since = time.monotonic()
            elif ended or (idle is not None and time.monotonic() - since > idle):
                return follower.failures
            else:
                time.sleep(POLL)


class _Follower:
    """Scores one checkpoint after the other."""

    def __init__(
        self, run_dir: Path, device: torch.device, rows: int, say: Callable[[str], None]
    ) -> None:
        self.run_dir, self.device, self.rows, self.say = run_dir, device, rows, say
        self.failures = 0
        self._sources: Sources | None = None
        self._tasks: tuple[list[str], Tasks] | None = None

    def score_next(self) -> bool:
        """Score the oldest checkpoint that is due. False: none is."""
        for checkpoint in list_checkpoints(self.run_dir):
            config = read_config(self.run_dir)  # what the run goes on with now
            kinds = due(step_of(checkpoint), config, self._results())
            if kinds:
                self._score(checkpoint, kinds, config)
                return True
        return False

    def _results(self) -> list[Record]:
        path = self.run_dir / RESULTS
        return read_metrics(path) if path.exists() else []

    def _score(self, checkpoint: Path, kinds: list[str], config: RunConfig) -> None:
        about: Record = {"step": step_of(checkpoint), "checkpoint": checkpoint.name}
        score = {"valid": self._valid, "tasks": self._score_tasks}
        try:
            with _kept(checkpoint, self.run_dir / ".follow") as folder:
                state = read_state(folder)
                about |= {"tokens": state["tokens"], "seconds": state["seconds"]}
                model, tokenizer = load(folder, device=self.device)
                for kind in kinds:
                    self._record({"kind": kind, **about, **score[kind](model, tokenizer, config)})
        except Exception as error:
            if not checkpoint.exists():  # training deleted it first: the next one is scored
                return
            self.failures += 1
            text = f"{type(error).__name__}: {error}"
            self._record({"kind": "failed", **about, "kinds": kinds, "error": text})

    def _record(self, record: Record) -> None:
        append_line(self.run_dir / RESULTS, record)
        self.say(told(record))

    @torch.no_grad()
    def _valid(self, model: Decoder, tokenizer: Tokenizer, config: RunConfig) -> Record:
        if self._sources is None:
            self._sources = open_sources(config, self.run_dir, fresh=False, say=self.say)
        windows = self._sources.valid_windows(config.train.eval_rows)
        assert self._sources.valid is not None  # or it would not be due
        batch = self._sources.valid.rows(windows)
        total = sum(
            float(losses.nats(losses.logits(model, rows, config), rows.targets))
            for part in losses.parts(batch, self.rows)
            for rows in [losses.on_device(part, self.device)]
        )
        loss = total / batch.n_scored
        return {"valid_loss": loss, "valid_bits_per_byte": self._sources.bits_per_byte(loss)}

    def _score_tasks(self, model: Decoder, tokenizer: Tokenizer, config: RunConfig) -> Record:
        from attamba.harness import AttambaLM, figures, load_tasks, run_tasks

        if self._tasks is None or self._tasks[0] != config.eval.tasks:
            self._tasks = (config.eval.tasks, load_tasks(config.eval.tasks))
        context = config.data.seq_len
        lm = AttambaLM(model, tokenizer, context=context, batch_size=self.rows)
        return figures(run_tasks(lm, self._tasks[1], limit=config.eval.limit, stderr=False))


def due(step: int, config: RunConfig, results: list[Record]) -> list[str]:
    """What is to be scored of this step's checkpoint, "valid" and "tasks", after these results."""
    data, found = config.data, []
    has_valid = data.generate is not None or data.valid is not None or data.valid_fraction > 0
    for kind, every, wanted in (
        ("valid", config.train.eval_every, has_valid),
        ("tasks", config.eval.every, bool(config.eval.tasks)),
    ):
        done = max(
            (r["step"] for r in results if kind in (r["kind"], *r.get("kinds", ()))), default=0
        )
        passed = every > 0 and step // every > done // every
        if wanted and step > done and (passed or step == config.train.steps):
            found.append(kind)
    return found


def told(record: Record) -> str:
    """A record in words."""
    if record["kind"] == "failed":
        return f"{record['checkpoint']} could not be scored: {record['error']}"
    return f"{record['checkpoint']}  {scores(record)}"


def _has_ended(run_dir: Path) -> bool:
    path = run_dir / STATUS
    state = json.loads(path.read_text(encoding="utf-8"))["state"] if path.exists() else None
    return state in ("done", "diverged")


@contextmanager
def _alone(run_dir: Path, *, wait: bool) -> Iterator[None]:
    """One follower at a time. wait: for another to end, which no training wants any more."""
    while True:
        with hold(run_dir / ".follow.lock") as is_held:
            if is_held:
                yield
                return
        if not wait:
            raise ConfigError(
                f"{run_dir}: another process scores its checkpoints already; wait for it, or stop "
                f"it"
            )
        time.sleep(POLL)


@contextmanager
def _kept(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """The checkpoint under a second name while entered, for training may delete the first."""
    kept = folder / checkpoint.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, kept, copy_function=_link)
        yield kept
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy(source, target)
