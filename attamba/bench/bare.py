"""What `attamba bench loop` holds the training loop against, and the text that it trains on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch

from attamba.config import RunConfig
from attamba.data import Batch, load_tokenizer, prepare
from attamba.models import build_model
from attamba.train import losses
from attamba.train.optim import build_optimizer


def bare_step(config: RunConfig, batch: Batch, device: torch.device) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW of a fresh model on the batch, and nothing else."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device).train()
    forward = torch.compile(model) if config.train.compile else model
    nats = torch.compile(losses.nats) if config.train.compile else losses.nats
    optimizer = build_optimizer(model, config.optim)
    limit, scored = config.optim.grad_clip or math.inf, batch.n_scored
    mixed = config.train.dtype == "bfloat16"
    rows = config.data.batch_size // config.train.accumulate
    parts = [losses.on_device(part, device) for part in losses.parts(batch, rows)]

    def step() -> None:
        optimizer.zero_grad()
        for inputs, targets, doc_ids in parts:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
                logits = forward(inputs, doc_ids=doc_ids if config.data.doc_mask else None)
            (nats(logits, targets) / scored).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()

    return step


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
