"""The cross entropy in Triton: kernels.py as a differentiable operator."""

from typing import Any

import torch
import triton
from torch import Tensor

from attamba.ops.cross_entropy.kernels import nats_backward_kernel, nats_kernel
from attamba.ops.layout import last_dense

FORWARD = {"BLOCK": 4096, "num_warps": 4}
BACKWARD = {"BLOCK": 2048, "num_warps": 4}


# The tag: a compiler may hand over rows that it has spread out.
@torch.library.custom_op(
    "attamba::cross_entropy", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def cross_entropy_triton(
    logits: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Nats of each row, and log(sum(exp(logits))); float32 [R] both. See cross_entropy."""
    nats, log_sum = _nats(logits, targets, ignore_index)
    logits, (rows, width) = last_dense(logits), logits.shape
    nats_kernel[(rows,)](
        logits, targets.contiguous(), nats, log_sum, logits.stride(0),
        V=width, IGNORED=ignore_index, **FORWARD,
    )  # fmt: skip
    return nats, log_sum


@cross_entropy_triton.register_fake
def _nats(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return tuple(logits.new_empty(rows, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


@torch.library.custom_op(
    "attamba::cross_entropy_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def cross_entropy_backward(
    logits: Tensor, targets: Tensor, log_sum: Tensor, grad: Tensor, ignore_index: int
) -> Tensor:
    """The gradient of logits, of their type; grad: that of the nats, float32 [R]."""
    logits, (rows, width) = last_dense(logits), logits.shape
    out = logits.new_empty(rows, width)
    nats_backward_kernel[(rows, triton.cdiv(width, BACKWARD["BLOCK"]))](
        logits, targets.contiguous(), log_sum, grad.contiguous(), out, logits.stride(0),
        V=width, IGNORED=ignore_index, **BACKWARD,
    )  # fmt: skip
    return out


@cross_entropy_backward.register_fake
def _gradient(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return cross_entropy_backward(*ctx.saved_tensors, grad, ctx.ignore_index), None, None


cross_entropy_triton.register_autograd(_backward, setup_context=_save)
