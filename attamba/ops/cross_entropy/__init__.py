"""Cross entropy of a vocabulary's logits, which on a GPU are read once each way."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attamba.ops.backends import choose

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, backend: str = "auto"
) -> Tensor:
    """Nats of each target, float32 [R]; 0 where it is ignore_index.

    logits: [R, V], read as float32. targets: int64 [R], below V; others are an error of PyTorch's,
    and NaN in Triton. Raises ValueError where shapes disagree, and for backend "triton" where it
    cannot run.
    """
    _check(logits, targets)
    if choose(backend, logits.device, logits.dtype) == "triton":
        from attamba.ops.cross_entropy.triton import cross_entropy_triton

        return cross_entropy_triton(logits, targets, ignore_index)[0]
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="none")


def _check(logits: Tensor, targets: Tensor) -> None:
    """The kernels read a target for each row, whether there is one or not."""
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [R, V]")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets has shape {list(targets.shape)}, expected {list(logits.shape[:1])} "
            f"for logits of shape {list(logits.shape)}"
        )
