"""What `attamba bench loop` holds the training loop against, and the text that it trains on."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from torch import Tensor

from attamba.config import RunConfig
from attamba.data import Batch, load_tokenizer, prepare
from attamba.models import build_model
from attamba.train import losses
from attamba.train.optim import build_optimizer, lr_at
from attamba.train.passes import CapturedPasses, Passes
from attamba.train.run import Run


class BareStep:
    """Forward, backward, clipping and AdamW of a fresh model, and nothing else.

    Launched as the loop does: with train.cuda_graphs from CUDA graphs, else kernel by kernel. P is
    the model's own, also where training draws it.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.device = config, device
        self.model = build_model(config.model).to(device).train()
        compiled = config.train.compile
        self._forward = torch.compile(self.model) if compiled else self.model
        self._nats = torch.compile(losses.nats) if compiled else losses.nats
        self._optimizer = build_optimizer(self.model, config.optim)
        self._step = 0
        self._limit = config.optim.grad_clip or math.inf
        self._rows = config.data.batch_size // config.train.accumulate
        self._passes = Passes(self._mean_loss, 1.0)
        if config.train.cuda_graphs:
            self._passes = CapturedPasses(self._mean_loss, 1.0, self.model.parameters())

    def copy(self, run: Run) -> None:
        """Be where `run` is, before a step: its weights, its optimizer's state, its steps done.

        How much power a card draws depends on the numbers that it multiplies, and on that its
        clock: of two models with other weights one may be faster for that alone.
        """
        self._step = run.step
        for own, theirs in zip(self.model.parameters(), run.model.parameters()):
            own.data.copy_(theirs)
            held = self._optimizer.state[own]
            for name, value in run.optimizer.state[theirs].items():
                held.setdefault(name, torch.empty_like(value)).copy_(value)

    def parts(self, batch: Batch) -> list[losses.Rows]:
        """The batch on the device, a forward pass each."""
        return [losses.on_device(part, self.device) for part in losses.parts(batch, self._rows)]

    def __call__(self, parts: list[losses.Rows], scored: int) -> None:
        """One step. scored: the batch's targets that count."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr_at(self._step, self.config)
        self._optimizer.zero_grad()
        of_step = torch.full((), float(scored), device=self.device)
        for rows in parts:
            self._passes.forward(rows, of_step)
            self._passes.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._limit)
        self._optimizer.step()
        self._step += 1

    def _mean_loss(self, rows: losses.Rows, scored: Tensor) -> Tensor:
        """The rows' share of the mean over the `scored` targets of the step."""
        return self._nats(losses.logits(self._forward, rows, self.config), rows.targets) / scored


def write_text(folder: str, config: RunConfig) -> str:
    """A prepared folder of random bytes, in documents of a quarter of a row and four rows."""
    draw, length = random.Random(0), config.data.seq_len
    least = 8 * length * config.data.batch_size
    source, written = Path(folder) / "text", 0
    source.mkdir()
    while written < least:
        size = draw.randint(length // 4 + 1, 4 * length)
        text = bytes(draw.choices(range(32, 127), k=size))
        (source / f"{written}.txt").write_bytes(text)
        written += size
    prepare(source, Path(folder) / "prepared", load_tokenizer("bytes"))
    return str(Path(folder) / "prepared")
