"""The training loop, the same for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.config import ConfigError, RunConfig
from attamba.train.beside import Beside
from attamba.train.checks import check_run
from attamba.train.distributed import (
    RankLost,
    Ranks,
    is_lost,
    lock_for_all,
    open_ranks,
    world_size,
)
from attamba.train.float8 import check_float8
from attamba.train.follow import RESULTS
from attamba.train.interrupt import (
    StopRequest,
    TrainingInterrupted,
    TrainingPreempted,
    left_at_once,
)
from attamba.train.metrics import MetricsLog, Record, Unwritten, records_up_to, rewrite
from attamba.train.observers import Observer, open_observers
from attamba.train.passes import check_cuda_graphs
from attamba.train.progress import Silent, open_progress
from attamba.train.run import Run, TrainingDiverged
from attamba.train.run_folder import find_given, open_run_folder, told_status, write_config
from attamba.train.sources import Sources, open_sources
from attamba.train.storage import CheckpointError
from attamba.train.watchdog import Watchdog

if TYPE_CHECKING:
    from attamba.harness import Tasks

OnLog = Callable[[Record], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class TrainResult:
    """What train returns."""

    run_dir: Path
    """Folder of the run, for attamba.load."""
    step: int
    """Steps done: train.steps."""
    metrics: list[Record] = field(repr=False)
    """Every record of metrics.jsonl, those from before a resume included; on rank 0."""
    is_main: bool = True
    """Is this rank 0, which speaks for all?"""
    interruption: TrainingInterrupted | None = None
    """What a signal in the last step would have raised, had there been another; a caller that has
    more to do may raise it."""


UNREADABLE, ASKED, PREEMPTED = 1, 2, 3
"""Why training stops before its end; the larger outweighs. A rank's next rows cannot be read, which
its next step says; Ctrl-C or should_stop; SIGTERM or SIGUSR1."""


def train(
    config: RunConfig,
    *,
    resume: bool = True,
    on_log: OnLog | None = None,
    should_stop: ShouldStop | None = None,
) -> TrainResult:
    """Train a model as `config` says, in the folder config.out.

    If the folder holds a checkpoint of the same configuration and data, training goes on from it
    and repeats what the uninterrupted run would have done: on CPU bit for bit. Ctrl-C, SIGTERM and
    SIGUSR1 finish the step and save; the last two end it at once where no step is under way, before
    the first and after the last. Sets torch's global random state.

    Under torchrun all ranks call this, share the work as config.parallel says and return the same;
    rank 0 alone writes metrics, so the records of the others are empty.

    resume: False refuses a folder that holds a checkpoint.
    on_log: called with each record after it was written to metrics.jsonl; on rank 0.
    should_stop: asked after each step; True saves and leaves as Ctrl-C does (a time limit).

    Where the rows of a step cannot be read, what came before is saved first.

    Raises ConfigError for a configuration that cannot be used or is not the folder's, and for
    tasks that cannot be loaded; DataError for the data; CheckpointError if one cannot be written
    or read; TrainingDiverged where losses or gradients that are not finite, or jump, reach a limit
    of spikes, none of which changed a weight; TrainingInterrupted (a KeyboardInterrupt) after
    Ctrl-C or should_stop, its subclass TrainingPreempted after SIGTERM or SIGUSR1.
    """
    with open_loop(config, resume=resume, on_log=on_log, should_stop=should_stop) as loop:
        loop.go()
    run, interruption = loop.run, None
    if loop.stop.signalled:
        told = f"Stopped after the last of {run.step} steps (out={config.out})"
        interruption = _interruption(told, preempted=loop.stop.preempted)
    return TrainResult(
        Path(config.out), run.step, loop.metrics.records, run.ranks.is_main, interruption
    )


def _interruption(told: str, *, preempted: bool) -> TrainingInterrupted:
    return (TrainingPreempted if preempted else TrainingInterrupted)(told)


@contextmanager
def open_loop(
    config: RunConfig,
    *,
    resume: bool = True,
    on_log: OnLog | None = None,
    should_stop: ShouldStop | None = None,
) -> Iterator[Loop]:
    """All that training needs, in the folder config.out, ready for the next step; see train."""
    check_run(config, world_size())
    run_dir = Path(config.out)
    with (
        left_at_once(run_dir),
        open_ranks(config) as ranks,
        Watchdog(ranks, config.parallel.hang_timeout) as watchdog,
    ):
        ranks.on_each(lambda: check_float8(config, ranks.device))
        ranks.on_each(lambda: check_cuda_graphs(config, ranks.device))
        tasks = _load_tasks(config, ranks)
        shown = config.train.progress and ranks.is_main
        with (
            lock_for_all(ranks, run_dir),
            open_progress(run_dir.name, enabled=shown) as progress,
        ):
            checkpoint = open_run_folder(run_dir, config, ranks, resume=resume, say=progress.say)
            given = None if checkpoint is not None else find_given(config, ranks)
            sources = _sources_of_rank(config, run_dir, ranks, checkpoint is None, progress)
            run = Run(config, sources, ranks, watchdog)
            if checkpoint is not None:
                run.resume(checkpoint)
                progress.say(f"Going on from {checkpoint}")
            elif given is not None:
                run.begin_with(given)
                progress.say(f"Beginning with the weights of {given}")
            ranks.on_main(lambda: write_config(run_dir, config))
            with (
                told_status(run_dir, ranks),
                ranks.on_each(lambda: _open_metrics(run)) as metrics,
                _open_beside(config, ranks, metrics, progress) as beside,
                _begun_together(ranks),
                watchdog.in_loop(),
                StopRequest(should_stop, patient=not ranks.alone) as stop,
            ):
                observers = [*open_observers(run, progress.say), beside]
                with _failures_marked():
                    yield Loop(run, tasks, metrics, progress, stop, on_log, observers)


@contextmanager
def _begun_together(ranks: Ranks) -> Iterator[None]:
    """From here on signals are heeded between steps, on all ranks alike."""
    ranks.largest(0)
    yield


@contextmanager
def _failures_marked() -> Iterator[None]:
    """Errors of a loop that ran are marked `may_pass`: another try of the command may go on."""
    try:
        yield
    except (TrainingDiverged, ConfigError):  # as it would the next time
        raise
    except Exception as error:
        error.may_pass = True  # type: ignore[attr-defined]
        raise


def _sources_of_rank(
    config: RunConfig, run_dir: Path, ranks: Ranks, fresh: bool, progress: Silent
) -> Sources:
    """Text is prepared by rank 0 alone; the others find it in the run's folder."""

    def work() -> Sources:
        return open_sources(
            config,
            run_dir,
            fresh=fresh and ranks.is_main,
            say=progress.say,
            share=ranks.share,
        )

    return ranks.main_first(work)


def _open_metrics(run: Run) -> MetricsLog | Unwritten:
    if not run.ranks.is_main:
        return Unwritten()
    results = Path(run.config.out) / RESULTS
    if results.exists():  # of checkpoints that are written anew
        rewrite(results, records_up_to(results, run.step))
    return MetricsLog(Path(run.config.out), step=run.step, config=run.config)


@contextmanager
def _open_beside(
    config: RunConfig, ranks: Ranks, metrics: MetricsLog | Unwritten, progress: Silent
) -> Iterator[Observer]:
    """The evaluating process of eval.mode=process, on rank 0."""
    if config.eval.mode != "process" or not ranks.is_main:
        yield Observer()
        return

    def show(record: Record) -> None:
        metrics.show(record)
        progress.record(record)

    with Beside(config, show, progress.say) as beside:
        yield beside


def _load_tasks(config: RunConfig, ranks: Ranks) -> Tasks | None:
    """Tasks to score, loaded before the first step: what is missing shows at once."""
    names = config.eval.tasks
    if not names or config.eval.mode == "job":
        return None
    from attamba.harness import load_tasks

    loaded: list[Tasks] = []
    ranks.on_main(lambda: loaded.append(load_tasks(names)))
    return loaded[0] if config.eval.mode == "inline" else None


class Loop:
    """Steps until the end, with metrics, validation and checkpoints in between."""

    def __init__(
        self,
        run: Run,
        tasks: Tasks | None,
        metrics: MetricsLog | Unwritten,
        progress: Silent,
        stop: StopRequest,
        on_log: OnLog | None,
        observers: Sequence[Observer],
    ) -> None:
        self.run, self.tasks, self.metrics, self.progress = run, tasks, metrics, progress
        self.stop, self.on_log = stop, on_log
        self.logged = (run.tokens, run.seconds)
        self.observers = observers
        run.model.train()

    def go(self) -> None:
        """All steps that are left. Raises what train does."""
        run = self.run
        self.progress.start(run.step, run.config.train.steps)
        try:
            while run.step < run.config.train.steps:
                self.step()
        except (TrainingDiverged, TrainingInterrupted):
            run.finish_saving()
            raise
        except RuntimeError as error:
            if run.ranks.alone or isinstance(error, CheckpointError):
                raise
            goes_on = f"the same command goes on from the last checkpoint (out={run.config.out})"
            # Those that were told to leave a moment before their first step do not come to it.
            if self.stop.preempted:
                raise TrainingPreempted(
                    f"Told to leave, as other ranks that are gone already; {goes_on}"
                ) from error
            if is_lost(error):
                cause = (str(error).splitlines() or [type(error).__name__])[0]
                raise RankLost(
                    f"another rank is gone, which has said why unless it was killed ({cause}); "
                    f"{goes_on}"
                ) from error
            raise
        finally:
            for observer in self.observers:
                observer.close(run)
        run.finish_saving()

    def step(self) -> None:
        """One step, and what is due after it."""
        run, every = self.run, self.run.config.train
        run.take_step()
        readable = run.read_ahead()
        own = [record for observer in self.observers for record in observer.after_step(run)]
        logs = self._due(every.log_every)
        # A GPU is not waited for between records; a CPU is done already.
        if logs or own or run.device.type == "cpu":
            values = run.read()
            self.progress.step(run.step, values["loss"], self._rate())
        if logs:
            for observer in self.observers:
                values |= observer.figures(run)
            self._log({"kind": "train", **values, "tokens_per_second": self._rate()})
            self.logged = (run.tokens, run.seconds)
        for record in own:
            self._log(record)
        self._evaluate()
        stopping = self._stopping(readable)
        if self._due(every.save_every) or stopping:
            self.metrics.sync()
            run.save()
        if stopping == UNREADABLE:
            run.finish_saving()
            self.progress.say(
                f"Saved a checkpoint after step {run.step}: the rows of the next cannot be read"
            )
        elif stopping and run.step < every.steps:
            raise _interruption(
                f"Stopped after step {run.step} of {every.steps} and saved a checkpoint; the "
                f"same command goes on from it (out={run.config.out})",
                preempted=stopping == PREEMPTED,
            )

    def _evaluate(self) -> None:
        """Validate and score tasks, where that is due."""
        run = self.run
        if run.config.eval.mode != "inline":
            return
        if self._due(run.config.train.eval_every):
            self._validate()
        if self.tasks is not None and self._due(run.config.eval.every):
            self._log({"kind": "tasks", **run.score(self.tasks)})

    def _stopping(self, readable: bool) -> int:
        """Why to save now and stop, or 0; if one rank has a reason, all do.

        readable: has this rank the rows of the next step?
        """
        asked = ASKED if self.stop.requested else 0 if readable else UNREADABLE
        # Looked at last: what comes while should_stop is asked is seen, and outweighs its answer.
        return self.run.ranks.largest(PREEMPTED if self.stop.preempted else asked)

    def _due(self, every: int) -> bool:
        """Is it the last step, or one in `every`? 0: the last alone."""
        step = self.run.step
        return step == self.run.config.train.steps or (every > 0 and step % every == 0)

    def _rate(self) -> float:
        """Training tokens per second since the last record."""
        tokens, seconds = self.logged
        return (self.run.tokens - tokens) / (self.run.seconds - seconds)

    def _validate(self) -> None:
        loss = self.run.validate()
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the validation loss is {loss}", step=self.run.step, config=self.run.config
            )
        bits = self.run.sources.bits_per_byte(loss)
        self._log({"kind": "valid", "valid_loss": loss, "valid_bits_per_byte": bits})

    def _log(self, values: dict[str, Any]) -> None:
        run = self.run
        kind = values.pop("kind")
        record = {"kind": kind, "step": run.step, "tokens": run.tokens, **values}
        record["seconds"] = run.seconds
        self.metrics.write(record)
        self.progress.record(record)
        if self.on_log is not None and run.ranks.is_main:
            self.on_log(record)
