"""The gated product in Triton: kernels.py and two matrix products as a differentiable operator.

Shapes: B batch, T tokens, F width of a and of b, N outputs.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from attamba.ops.layout import even_rows
from attamba.ops.swiglu.kernels import gate_backward_kernel, gate_kernel

TILE = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}


# The tag: a compiler may hand over rows that it has spread out.
@torch.library.custom_op(
    "attamba::gated_product", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def gated_product_triton(x: Tensor, weight: Tensor) -> Tensor:
    """See gated_product."""
    width = x.shape[2] // 2
    x, grid = even_rows(x), _grid(x)
    gated = x.new_empty(*x.shape[:2], width)
    gate_kernel[grid](x, gated, x.shape[0] * x.shape[1], x.stride(1), F=width, **TILE)
    with torch.autocast(x.device.type, enabled=False):  # its types are the caller's
        return torch.nn.functional.linear(gated, weight)


@gated_product_triton.register_fake
def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.custom_op(
    "attamba::gate_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def gate_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU(a) * b [B, T, F], and x's gradient [B, T, 2F] from its gradient."""
    gated, dx = _gradients(x, grad)
    x, grad, grid = even_rows(x), even_rows(grad), _grid(x)
    gate_backward_kernel[grid](
        x, grad, gated, dx, x.shape[0] * x.shape[1], x.stride(1), grad.stride(1),
        F=grad.shape[2], **TILE,
    )  # fmt: skip
    return gated, dx


@gate_backward.register_fake
def _gradients(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    gated, dx = gate_backward(x, dy @ weight)
    trains = ctx.needs_input_grad[1]  # not where an adapter trains, and the model does not
    return dx, dy.flatten(0, 1).t() @ gated.flatten(0, 1) if trains else None


gated_product_triton.register_autograd(_backward, setup_context=_save)


def _grid(x: Tensor) -> tuple[int, int]:
    batch, seq, width = x.shape
    return triton.cdiv(batch * seq, TILE["ROWS"]), triton.cdiv(width // 2, TILE["COLUMNS"])
