"""The rotary embedding in Triton: one kernel that reads and writes each number once.

Shapes: B batch, T tokens, H query heads, G key/value heads, D width of a head.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from attamba.ops.layout import even_rows
from attamba.ops.rotary.kernels import rotate_kernel, step_table_kernel

NUMBERS = 512
"""Of a head's half that a program holds at a time, over its tokens."""


# The tag: a compiler may hand over rows that it has spread out.
@torch.library.custom_op("attamba::rotate", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def rotate_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D] and k [B, T, G, D] turned by their positions; back: the other way."""
    outputs = _pair(q, k)
    _launch((q, k), (cos, sin), outputs, back)
    return outputs


@rotate_pair.register_fake
def _pair(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_pair(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _pair_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *rotate_pair(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None


rotate_pair.register_autograd(_pair_backward, setup_context=_save_pair)


@torch.library.custom_op("attamba::rotate_sums", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def rotate_sums(
    q: Tensor, k: Tensor, v: Tensor, direct: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See with_positions: q, keys and values, direct added to them."""
    outputs = _sums(q, k, v)
    _launch((q, k, v, direct), (cos, sin), outputs, False)
    return outputs


@rotate_sums.register_fake
def _sums(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op(
    "attamba::rotate_sums_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def rotate_sums_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, of k (v's is dv), and of direct; shared: keys and values had one."""
    outputs = _gradients(dq, dk, dv, cos, sin, shared)
    _launch((dq, dk, dv, outputs[2]), (cos, sin), outputs, True)
    return outputs


@rotate_sums_backward.register_fake
def _gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = dv.shape if shared else (*dv.shape[:2], 2, *dv.shape[2:])
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape), dv.new_empty(shape)


def _save_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, direct, cos, sin = inputs
    ctx.shared = direct.dim() == 4
    ctx.save_for_backward(cos, sin)


def _sums_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, ddirect = rotate_sums_backward(dq, dk, dv, *ctx.saved_tensors, ctx.shared)
    return dq, dk, dv, ddirect, None, None


rotate_sums.register_autograd(_sums_backward, setup_context=_save_sums)


def _launch(
    inputs: tuple[Tensor, ...],
    table: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    back: bool,
) -> None:
    """inputs: q, k and, where there are sums, v and direct; outputs: q, k and the last."""
    batch, seq, heads, width = inputs[0].shape
    sums = len(inputs) == 4
    rows = [even_rows(t.flatten(2)) for t in inputs]
    rows += rows[: 4 - len(rows)]  # in the place of what is not there, and not read
    cos, sin = (t.contiguous() for t in table)
    columns = triton.next_power_of_2(width // 2)
    block = max(1, NUMBERS // columns)
    rotate_kernel[(triton.cdiv(batch * seq, block),)](
        *rows, cos, sin, *outputs, *outputs[: 3 - len(outputs)],
        batch * seq, cos.shape[0] * seq, *(t.stride(1) for t in rows),
        H=heads, G=inputs[1].shape[2], C=width // 2, CP=columns, BLOCK=block,
        BACK=back, SUMS=sums, SHARED=sums and inputs[3].dim() == 4, num_warps=4,
    )  # fmt: skip


def step_table_triton(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """See rotary.step_table. frequency: float64 [D/2]."""
    shape = (*positions.shape, 1, frequency.numel())
    cos, sin = (torch.empty(shape, device=positions.device) for _ in range(2))
    columns = triton.next_power_of_2(frequency.numel())
    step_table_kernel[(positions.numel(),)](
        positions.contiguous(), frequency, cos, sin, C=frequency.numel(), CP=columns, num_warps=1
    )
    return cos, sin
