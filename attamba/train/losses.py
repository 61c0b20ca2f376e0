"""A model over rows of tokens, as training runs it, and their cross entropy.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attamba.config import RunConfig
from attamba.data import UNSCORED, Batch
from attamba.ops.cross_entropy import cross_entropy


class Rows(NamedTuple):
    """A Batch on a device: int64 [B, T] each."""

    inputs: Tensor
    targets: Tensor
    doc_ids: Tensor


def logits(
    forward: Callable[..., Tensor],
    rows: Rows,
    config: RunConfig,
    *,
    keep_casts: bool = True,
) -> Tensor:
    """[B, T, V], in the precision of train.dtype, documents apart if data.doc_mask says so.

    forward: the model, or what was made of it.
    keep_casts: let autocast keep what it cast until the end of the pass; not for parameters that
        come and go.
    """
    with torch.autocast(
        rows.inputs.device.type,
        dtype=torch.bfloat16,
        enabled=config.train.dtype == "bfloat16",
        cache_enabled=keep_casts,
    ):
        return forward(rows.inputs, doc_ids=rows.doc_ids if config.data.doc_mask else None)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy, float32, of logits [B, T, V]; UNSCORED targets [B, T] are left out."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), UNSCORED).sum()


def parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in parts of `rows` rows."""
    for i in range(0, len(batch.inputs), rows):
        part = slice(i, i + rows)
        yield Batch(batch.inputs[part], batch.targets[part], batch.doc_ids[part])


def on_device(batch: Batch, device: torch.device) -> Rows:
    """Sent there without waiting for it."""
    return Rows(*(_sent(a, device) for a in (batch.inputs, batch.targets, batch.doc_ids)))


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """From pinned memory, or the host would wait until a GPU is idle."""
    if device.type != "cuda":
        return torch.from_numpy(array).to(device)
    pinned = torch.empty(array.shape, dtype=torch.int64, device="cpu", pin_memory=True)
    pinned.numpy()[...] = array  # torch's own copy would wake its other threads
    return pinned.to(device, non_blocking=True)
