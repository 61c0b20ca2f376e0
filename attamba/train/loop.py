"""The training loop, the same for every model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.config import RunConfig
from attamba.data import Batch
from attamba.models import Decoder, build_model
from attamba.train.checkpoint import restore, save_checkpoint
from attamba.train.interrupt import StopRequest, TrainingInterrupted
from attamba.train.metrics import MetricsLog, Record
from attamba.train.optim import build_optimizer, lr_at
from attamba.train.progress import Silent, open_progress
from attamba.train.run_folder import check_same_data, lock, open_run_folder
from attamba.train.runtime import resolve_device
from attamba.train.sources import Sources, open_sources
from attamba.train.storage import list_checkpoints, remove_old

if TYPE_CHECKING:
    from attamba.harness import Tasks

OnLog = Callable[[Record], None]


@dataclass(frozen=True)
class TrainResult:
    """What train returns."""

    run_dir: Path
    """Folder of the run, for attamba.load."""
    step: int
    """Steps done: train.steps."""
    metrics: list[Record] = field(repr=False)
    """Every record of metrics.jsonl, those from before a resume included."""


class TrainingDiverged(RuntimeError):
    """The loss, a gradient or a weight stopped being finite; no weight or file holds that step."""

    def __init__(self, what: str, *, step: int, config: RunConfig) -> None:
        checkpoints = list_checkpoints(config.out)
        self.step = step
        """The step, counted from 1, that could not be taken or kept."""
        self.checkpoint = checkpoints[-1] if checkpoints else None
        """The last good checkpoint, if one was written."""
        kept = f"The last good checkpoint is {self.checkpoint}"
        super().__init__(
            f"step {step}: {what}. "
            f"{kept if self.checkpoint else 'No checkpoint had been written yet'}. Start again in "
            f"another `out` with a lower optim.lr (now {config.optim.lr:g}), a longer "
            f"optim.warmup_steps (now {config.optim.warmup_steps}) or a lower optim.grad_clip "
            f"(now {config.optim.grad_clip:g}; 0 is none)"
        )


def train(config: RunConfig, *, resume: bool = True, on_log: OnLog | None = None) -> TrainResult:
    """Train a model as `config` says, in the folder config.out.

    If the folder holds a checkpoint of the same configuration and data, training goes on from it
    and repeats what the uninterrupted run would have done: on CPU bit for bit. Ctrl-C and SIGTERM
    finish the step and save. Sets torch's global random state.

    resume: False refuses a folder that holds a checkpoint.
    on_log: called with each record after it was written to metrics.jsonl.

    Raises ConfigError for a configuration that cannot be used or is not the folder's, and for
    tasks that cannot be loaded; DataError for the data; CheckpointError if one cannot be written
    or read; TrainingDiverged for a loss or gradient that is not finite, before it changes a
    weight; TrainingInterrupted (a KeyboardInterrupt) after Ctrl-C or SIGTERM.
    """
    config.validate()
    device = resolve_device(config.train.device, "train.device")
    tasks = _load_tasks(config.eval.tasks)
    run_dir = Path(config.out)
    with lock(run_dir), open_progress(run_dir.name, enabled=config.train.progress) as progress:
        checkpoint = open_run_folder(run_dir, config, resume=resume)
        sources = open_sources(config, run_dir, fresh=checkpoint is None, say=progress.say)
        run = _Run(config, sources, device)
        if checkpoint is not None:
            run.resume(checkpoint)
            progress.say(f"Going on from {checkpoint}")
        with (
            MetricsLog(run_dir, step=run.step, tensorboard=config.train.tensorboard) as metrics,
            StopRequest() as stop,
        ):
            _Loop(run, tasks, metrics, progress, stop, on_log).go()
    return TrainResult(run_dir=run_dir, step=run.step, metrics=metrics.records)


def _load_tasks(names: list[str]) -> Tasks | None:
    """Tasks to score, loaded before the first step: what is missing shows at once."""
    if not names:
        return None
    from attamba.harness import load_tasks

    return load_tasks(names)


class _Run:
    """Model, optimizer and data, and how far they are: what a checkpoint saves."""

    def __init__(self, config: RunConfig, sources: Sources, device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.sources, self.device = config, sources, device
        self.model: Decoder = build_model(config.model).to(device)
        # The compiled module shares its parameters with the model, which is the one saved.
        self.forward = torch.compile(self.model) if config.train.compile else self.model
        self.optimizer = build_optimizer(self.model, config.optim)
        self.step = self.tokens = 0
        self.seconds = 0.0

    def resume(self, checkpoint: Path) -> None:
        state = restore(checkpoint, self.model, self.optimizer, self.device)
        check_same_data(state["data"], self.sources.fingerprints, Path(self.config.out))
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    def save(self) -> None:
        """Write a checkpoint. Raises TrainingDiverged if a weight is not finite."""
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise TrainingDiverged(f"{name} is not finite", step=self.step, config=self.config)
        save_checkpoint(
            self.config.out,
            step=self.step,
            model=self.model,
            config=self.config,
            tokenizer=self.sources.tokenizer,
            optimizer=self.optimizer,
            tokens=self.tokens,
            seconds=self.seconds,
            data=self.sources.fingerprints,
        )
        remove_old(Path(self.config.out), self.config.train.keep)

    def take_step(self) -> dict[str, float]:
        """One optimizer step; loss, lr and grad_norm of it. Raises TrainingDiverged."""
        began = time.perf_counter()
        batch = self.sources.train.batch(self.step)
        self.model.set_draw(self.step)
        self.optimizer.zero_grad()
        mean_loss = self.gradients(batch)
        # One wait for the device per step: nothing that is not finite may reach the weights.
        loss, norm = torch.stack([mean_loss, self._clip()]).tolist()
        for what, value in (("the loss", loss), ("the gradient norm", norm)):
            if not math.isfinite(value):
                raise TrainingDiverged(f"{what} is {value}", step=self.step + 1, config=self.config)
        lr = lr_at(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        self.tokens += batch.inputs.size
        self.seconds += time.perf_counter() - began
        return {"loss": loss, "lr": lr, "grad_norm": norm}

    def gradients(self, batch: Batch) -> Tensor:
        """Add the gradient of the mean loss over all tokens of `batch`; return that loss.

        Float32 and a scalar, on the device. The rows go through the model in train.accumulate
        equal parts.
        """
        total = torch.zeros((), device=self.device)
        for part in self._parts(batch, self.config.data.batch_size // self.config.train.accumulate):
            loss = self._loss_sum(part) / batch.targets.size
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean nats per token over the validation rows; None where there are none."""
        windows = self.sources.valid_windows(self.config.train.eval_rows)
        if not windows:
            return None
        assert self.sources.valid is not None
        rows = self.config.data.batch_size // self.config.train.accumulate
        batch = self.sources.valid.rows(windows)
        self.model.eval()
        total = sum(float(self._loss_sum(part)) for part in self._parts(batch, rows))
        self.model.train()
        return total / batch.targets.size

    def score(self, tasks: Tasks) -> dict[str, float | None]:
        """Figures of tasks, by the weights as a checkpoint saves them (without autocast)."""
        from attamba.harness import AttambaLM, figures, run_tasks

        rows = self.config.data.batch_size // self.config.train.accumulate
        context = self.config.data.seq_len
        lm = AttambaLM(self.model, self.sources.tokenizer, context=context, batch_size=rows)
        return figures(run_tasks(lm, tasks, limit=self.config.eval.limit, stderr=False))

    def _loss_sum(self, batch: Batch) -> Tensor:
        """Summed cross entropy in nats, in float32 whatever the model computes in."""
        inputs, targets, doc_ids = (
            torch.from_numpy(array).to(self.device)
            for array in (batch.inputs, batch.targets, batch.doc_ids)
        )
        mixed = self.config.train.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = self.forward(inputs, doc_ids=doc_ids if self.config.data.doc_mask else None)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")

    @staticmethod
    def _parts(batch: Batch, rows: int) -> Iterator[Batch]:
        for i in range(0, len(batch.inputs), rows):
            part = slice(i, i + rows)
            yield Batch(batch.inputs[part], batch.targets[part], batch.doc_ids[part])

    def _clip(self) -> Tensor:
        """The gradient norm over all parameters, before clipping to optim.grad_clip."""
        limit = self.config.optim.grad_clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)


class _Loop:
    """Steps until the end, with metrics, validation and checkpoints in between."""

    def __init__(
        self,
        run: _Run,
        tasks: Tasks | None,
        metrics: MetricsLog,
        progress: Silent,
        stop: StopRequest,
        on_log: OnLog | None,
    ) -> None:
        self.run, self.tasks, self.metrics, self.progress = run, tasks, metrics, progress
        self.stop, self.on_log = stop, on_log
        self.logged = (run.tokens, run.seconds)

    def go(self) -> None:
        run, every = self.run, self.run.config.train
        self.progress.start(run.step, every.steps)
        run.model.train()
        while run.step < every.steps:
            values = run.take_step()
            self.progress.step(run.step, values["loss"], self._rate())
            if self._due(every.log_every):
                self._log({"kind": "train", **values, "tokens_per_second": self._rate()})
                self.logged = (run.tokens, run.seconds)
            if self._due(every.eval_every):
                self._validate()
            if self.tasks is not None and self._due(run.config.eval.every):
                self._log({"kind": "tasks", **run.score(self.tasks)})
            if self._due(every.save_every) or self.stop.requested:
                self.metrics.sync()
                run.save()
            if self.stop.requested and run.step < every.steps:
                raise TrainingInterrupted(
                    f"Stopped after step {run.step} of {every.steps} and saved a checkpoint; the "
                    f"same command goes on from it (out={run.config.out})"
                )

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
        if self.on_log is not None:
            self.on_log(record)
