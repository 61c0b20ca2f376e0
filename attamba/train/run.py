"""A run: its model, optimizer and data, how far they are, and one step of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attamba.config import ConfigError, RunConfig
from attamba.data import UNSCORED, Batch, DataError
from attamba.models import Decoder, build_model
from attamba.train import losses
from attamba.train.checkpoint import (
    load_weights,
    read_state,
    restore,
    save_about,
    save_checkpoint,
)
from attamba.train.chunk_sizes import draw_size, set_chunk_size
from attamba.train.distributed import Ranks
from attamba.train.guard import Guard, n_skipped, step_unless
from attamba.train.optim import build_optimizer, clip_gradients, local, lr_at
from attamba.train.parallelize import Forward, parallelize, reduce_on_last, reshard, tensor_ranks
from attamba.train.passes import CapturedPasses, Passes
from attamba.train.phases import Phases
from attamba.train.run_folder import check_same_data
from attamba.train.sources import Rows, Sources
from attamba.train.storage import TOKENIZER, list_checkpoints, remove_old, weights_digest
from attamba.train.watchdog import Watchdog

if TYPE_CHECKING:
    from attamba.harness import Tasks
    from attamba.train.sharded import Saver
    from attamba.train.tensor import TensorRanks


class TrainingDiverged(RuntimeError):
    """Losses or gradients are not finite or jump, or a weight is not finite; no file holds it."""

    def __init__(self, what: str, *, step: int, config: RunConfig) -> None:
        checkpoints = list_checkpoints(config.out)
        self.step = step
        """The step, counted from 1, that could not be taken or kept; where training does not wait
        for the device, the last one before it looked."""
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


@dataclass(frozen=True)
class StepRows:
    """What a rank takes a step on."""

    batch: Batch
    """Its rows, as they were read."""
    scored: int
    """How many targets of this rank's own tokens count."""
    parts: list[losses.Rows]
    """The rows on the device, one entry for each forward pass."""


class Run:
    """Model, optimizer and data, and how far they are: what a checkpoint saves."""

    def __init__(
        self, config: RunConfig, sources: Sources, ranks: Ranks, watchdog: Watchdog
    ) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.sources = config, sources
        self.ranks, self.watchdog, self.device = ranks, watchdog, ranks.device
        self.model: Decoder = build_model(config.model)
        if ranks.alone:  # sharding moves one layer after the other
            self.model.to(self.device)
        # A compiled module shares its parameters with the model, which is the one saved.
        self.forward = parallelize(self.model, ranks.mesh, config)
        self.tensor_ranks = tensor_ranks(ranks.mesh)
        watchdog.follow(self.model)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.nats = _nats(self.tensor_ranks, config.train.compile)
        self.passes = self._passes()
        self.guard = Guard(config.spikes, self.device)
        self.phases = Phases(self.device)
        self.saver = None if ranks.alone else _open_saver(ranks, config, watchdog)
        self.rows_per_pass = config.data.batch_size // ranks.share[1] // config.train.accumulate
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.init_weights: str | None = None
        """Fingerprint of the weights of train.init_from."""
        self.chunk_size: int | None = None
        """P of the last step, where train.chunk_sizes draws it."""
        self.batch: Batch | None = None
        """This rank's rows of the last step."""
        self._ahead: StepRows | None = None
        """Rows of the step to come, if they have been read and sent."""
        self.pending = torch.zeros(2, device=self.device)
        """Loss and gradient norm of the last step, on the device."""

    def resume(self, checkpoint: Path) -> None:
        state = restore(checkpoint, self.model, self.optimizer, self.device)
        check_same_data(state["data"], self.sources.fingerprints, Path(self.config.out))
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.init_weights = state.get("init_weights")
        if "skips" in state:  # older checkpoints have none
            self.guard.restore(state["skips"])

    def begin_with(self, checkpoint: Path) -> None:
        """Take a verified checkpoint's weights and nothing else of it, on all ranks at once."""
        if read_state(checkpoint)["tokenizer"] != self.sources.fingerprints["tokenizer"]:
            raise ConfigError(
                f"train.init_from={self.config.train.init_from}: its tokenizer is not the data's, "
                f"so that its weights mean other tokens; set "
                f"data.tokenizer={checkpoint / TOKENIZER}, and prepare folders with that one"
            )
        load_weights(self.model, checkpoint)
        self.init_weights = weights_digest(checkpoint)

    def save(self) -> None:
        """Write a checkpoint, or begin to on several ranks.

        Raises TrainingDiverged as `read` does, and if a weight is not finite.
        """
        self.read()
        self._check_finite()
        about: dict[str, Any] = {
            "step": self.step,
            "config": self.config,
            "tokenizer": self.sources.tokenizer,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": self.sources.fingerprints,
            "skips": self.guard.state(),
            "init_weights": self.init_weights,
        }
        if self.saver is None:
            save_checkpoint(self.config.out, model=self.model, optimizer=self.optimizer, **about)
            remove_old(Path(self.config.out), self.config.train.keep)
            return
        self.watchdog.beat(f"saving after step {self.step}")
        self.saver.save(
            self.step,
            self.model,
            self.optimizer,
            lambda folder: save_about(folder, device=self.device, **about),
        )

    def _check_finite(self) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        wrong = [
            i
            for i, (_, parameter) in enumerate(self.model.named_parameters())
            if not bool(torch.isfinite(local(parameter)).all())
        ]
        found = self.ranks.largest(wrong[0] if wrong else -1)
        if found >= 0:
            raise TrainingDiverged(
                f"{names[found]} is not finite", step=self.step, config=self.config
            )

    def finish_saving(self) -> None:
        """Until the last checkpoint is whole. Raises CheckpointError if it could not be written."""
        if self.saver is not None:
            self.saver.wait()

    def take_step(self) -> None:
        """One optimizer step, without waiting for the device: `read` tells how it went."""
        began = time.perf_counter()
        self.watchdog.beat(f"reading the rows of step {self.step + 1}")
        rows, self._ahead = self._ahead or self._next_rows(), None
        self.batch = rows.batch
        self.watchdog.beat(f"step {self.step + 1}")
        self.model.set_draw(_draw_of(self.config.train.seed, self.step))
        self.optimizer.zero_grad()
        with self.drawn_chunks():
            loss = self.gradients(rows)
        with self.phases("optimizer"):
            self.pending = torch.stack([loss, self._clip()])
            for group in self.optimizer.param_groups:
                group["lr"] = lr_at(self.step, self.config)
            # Nothing that is not finite may reach the weights.
            step_unless(self.optimizer, self.guard.judge(*self.pending))
        self.step += 1
        self.tokens += rows.batch.inputs.size * self.ranks.share[1]
        self.seconds += time.perf_counter() - began

    def read(self) -> dict[str, Any]:
        """Figures of the last step, for which it waits: loss and grad_norm (None where not finite),
        lr, and skipped, the steps left out so far.

        Raises TrainingDiverged where spikes.max_in_a_row or spikes.max_skipped is reached.
        """
        began = time.perf_counter()
        both = torch.cat([self.pending.double(), self.guard.counts.double()]).tolist()
        self.seconds += time.perf_counter() - began
        (loss, norm), counts = both[:2], [int(count) for count in both[2:]]
        limit = self.guard.reached(counts)
        if limit is not None:
            what = f"the loss is {loss}" if math.isfinite(norm) else f"the gradient norm is {norm}"
            what = f"the loss is {loss}" if not math.isfinite(loss) else what
            raise TrainingDiverged(f"{what}, and {limit}", step=self.step, config=self.config)
        return {
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr_at(self.step - 1, self.config),
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped": n_skipped(counts),
        }

    def read_ahead(self) -> bool:
        """Have the next step's rows on the device, while that is still at the last one.

        False where they cannot be had: the step that needs them raises, when this one is saved.
        """
        if self.step == self.config.train.steps or self._ahead is not None:
            return True
        began = time.perf_counter()
        self.watchdog.beat(f"reading the rows of step {self.step + 1}")
        try:
            self._ahead = self._next_rows()
        except (DataError, OSError, torch.OutOfMemoryError):
            return False
        finally:
            self.watchdog.beat(f"step {self.step}")
            self.seconds += time.perf_counter() - began
        return True

    def _next_rows(self) -> StepRows:
        with self.phases("data", on_host=True):
            return self.send(self.sources.train.batch(self.step))

    def send(self, batch: Batch) -> StepRows:
        """This rank's rows to its device, in train.accumulate equal parts, without waiting."""
        own = self._own(batch)
        parts = [
            losses.on_device(part, self.device) for part in losses.parts(own, self.rows_per_pass)
        ]
        return StepRows(batch, own.n_scored, parts)

    def gradients(self, rows: StepRows) -> Tensor:
        """Add the gradient of the mean loss over the targets of all ranks; return that loss.

        Float32 and a scalar, on the device.
        """
        total = torch.zeros((), device=self.device)
        scored = torch.full_like(total, self.ranks.count(rows.scored))
        for number, part in enumerate(rows.parts, 1):
            reduce_on_last(self.model, number == len(rows.parts))
            with self.phases("forward"):
                loss = self.passes.forward(part, scored, self.chunk_size)
            with self.phases("backward"):
                self.passes.backward()
            total += loss
        return self.ranks.sum(total)

    @contextmanager
    def drawn_chunks(self) -> Iterator[None]:
        """The chunk size of this step, where there are several to draw from."""
        sizes = self.config.train.chunk_sizes
        if sizes is None:
            yield
            return
        self.chunk_size = draw_size(sizes, self.config.train.seed, self.step)
        set_chunk_size(self.model, self.chunk_size)
        yield
        set_chunk_size(self.model, None)

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean nats per target over the validation rows; None where there are none.

        Ranks share the rows, and all return the same.
        """
        self.read()  # what the device is still at is training's time, not this
        windows = self.sources.valid_windows(self.config.train.eval_rows)
        if not windows:
            return None
        assert self.sources.valid is not None
        batch = self._own(_every_nth(self.sources.valid, windows, *self.ranks.share))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        for part in losses.parts(batch, self.rows_per_pass):
            self.watchdog.beat(f"validation after step {self.step}")
            total += self._loss_sum(losses.on_device(part, self.device))
        self.model.train()
        reshard(self.model)
        return float(self.ranks.sum(total)) / self.ranks.count(batch.n_scored)

    def score(self, tasks: Tasks) -> dict[str, float | None]:
        """Figures of tasks, by the weights as a checkpoint saves them (without autocast)."""
        from attamba.harness import AttambaLM, figures, run_tasks

        self.read()
        context = self.config.data.seq_len
        lm = AttambaLM(
            self.model, self.sources.tokenizer, context=context, batch_size=self.rows_per_pass
        )
        return figures(run_tasks(lm, tasks, limit=self.config.eval.limit, stderr=False))

    def _passes(self) -> Passes:
        def mean_loss(rows: losses.Rows, scored: Tensor) -> Tensor:
            return self._loss_sum(rows) / scored

        # Sharding averages gradients over ranks, and the mean is over the targets of all. Ranks
        # that share layers count the same targets, each of them, and so cancel out.
        factor = float(self.ranks.size)
        if self.config.train.cuda_graphs:
            return CapturedPasses(mean_loss, factor, self.model.parameters())
        return Passes(mean_loss, factor)

    def _loss_sum(self, rows: losses.Rows) -> Tensor:
        """Summed cross entropy in nats, in float32 whatever the model computes in."""
        return self.nats(self.logits(rows, self.forward), rows.targets)

    def _own(self, batch: Batch) -> Batch:
        """Targets of this rank's tokens alone, where several share the rows."""
        ranks = self.model.row_ranks
        if ranks is None:
            return batch
        return replace(batch, targets=batch.targets[:, ranks.span(batch.targets.shape[1])])

    def logits(self, rows: losses.Rows, forward: Forward) -> Tensor:
        """What `forward`, the model or a compiled one, says of the rows; [rows, T, V]."""
        # Gathered parameters come and go: their casts must not stay behind in autocast's cache.
        alone = self.ranks.alone
        return losses.logits(forward, rows, self.config, keep_casts=alone)

    def _clip(self) -> Tensor:
        """The gradient norm over all parameters, before clipping to optim.grad_clip."""
        limit = self.config.optim.grad_clip or math.inf
        return clip_gradients(self.model.parameters(), limit)


def _nats(tensor_ranks: TensorRanks | None, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """losses.nats, also of logits whose vocabulary ranks share."""
    if tensor_ranks is None:
        return torch.compile(losses.nats) if compiled else losses.nats
    from attamba.train.tensor import cross_entropy_sum

    def nats(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float().flatten(0, 1)
        return cross_entropy_sum(logits, targets.flatten(), UNSCORED, tensor_ranks)

    return nats


def _draw_of(seed: int, step: int) -> int:
    """The draw of random boundaries: seeds lie far apart, so that each has steps of its own."""
    return (step + seed * 0x9E3779B1) & 0xFFFFFFFF


def _every_nth(rows: Rows, windows: list[int], rank: int, n: int) -> Batch:
    """Every n-th of the windows from the rank-th on; as many for each rank.

    Forward passes of all ranks go together, so where n does not divide the windows some ranks have
    a row that does not count.
    """
    own = windows[rank::n]
    missing = -(-len(windows) // n) - len(own)
    batch = rows.rows([*own, *windows[:missing]])
    targets = batch.targets.copy()
    targets[len(own) :] = UNSCORED
    return Batch(batch.inputs, targets, batch.doc_ids)


def _open_saver(ranks: Ranks, config: RunConfig, watchdog: Watchdog) -> Saver:
    from attamba.train.sharded import Saver

    return Saver(ranks, Path(config.out), config.train.keep, watchdog.stir)
