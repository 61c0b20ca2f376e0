"""The product of few rows in Triton: a custom operator that a CUDA graph can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from attamba.ops.backends import overlaps, starts_early
from attamba.ops.layout import last_dense
from attamba.ops.thin_linear.kernels import thin_linear_kernel

if TYPE_CHECKING:
    from attamba.ops.thin_linear import Norm


class Tile(NamedTuple):
    """Rows, outputs and inputs that a program takes at once; its warps; the parts in which these
    share the inputs."""

    rows: int
    outputs: int
    inputs: int
    warps: int = 4
    split: int = 1


def tile_of(rows: int, inputs: int, normed: bool, dtype: torch.dtype) -> Tile:
    """From the shape alone: many small programs, whose loads are all on their way at once."""
    block_rows = min(64, max(16, triton.next_power_of_2(rows)))
    wide = max(16, triton.next_power_of_2(inputs))
    if dtype == torch.float32:  # exact products go without tensor cores
        return Tile(min(block_rows, 32), 16, min(64, wide))
    if block_rows == 64:
        return Tile(block_rows, 32, min(64, wide))
    if block_rows == 32:
        return Tile(32, 32 if normed else 16, min(256, wide), warps=4 if normed else 8)
    if normed:
        return Tile(block_rows, 32, wide if wide <= 512 else 256)
    if wide <= 512:
        return Tile(block_rows, 16, wide)
    return Tile(block_rows, 16, wide if wide <= 2048 else 1024, split=4)


def thin_linear_triton(
    x: Tensor, weight: Tensor, norm: Norm | None, gate: bool, residual: Tensor | None
) -> Tensor:
    """See thin_linear."""
    gain, eps = (None, 0.0) if norm is None else norm
    return _thin_linear(x, weight, gain, residual, eps, gate)


def normed_linear_triton(x: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """See normed_linear."""
    return _normed_linear(x, weight, *norm)


@torch.library.custom_op("attamba::thin_linear", mutates_args=())
def _thin_linear(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gate: bool,
) -> Tensor:
    return _launch(x, weight, gain, residual, eps, gate, None)


@torch.library.custom_op("attamba::normed_linear", mutates_args=())
def _normed_linear(x: Tensor, weight: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _launch(x, weight, gain, None, eps, False, normed), normed


@_normed_linear.register_fake
def _(x: Tensor, weight: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape)


def _launch(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gate: bool,
    normed: Tensor | None,
) -> Tensor:
    x, weight = last_dense(x), weight.contiguous()
    added = x if residual is None else last_dense(residual)
    out = _output(x, weight, gain, residual, eps, gate)
    rows, inputs = x.shape[0], x.shape[-1]
    parts, outputs = x.shape[1] if x.dim() == 3 else 1, out.shape[-1]
    tile = tile_of(rows, inputs, gain is not None, weight.dtype)
    overlap = overlaps(x.device)
    grid = (triton.cdiv(outputs, tile.outputs), parts, triton.cdiv(rows, tile.rows))
    thin_linear_kernel[grid](
        x,
        weight,
        x if gain is None else gain.contiguous(),
        added,
        out,
        out if normed is None else normed,
        rows,
        eps,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        added.stride(0),
        added.stride(1) if added.dim() == 3 else 0,
        N=outputs,
        K=inputs,
        BR=tile.rows,
        BN=tile.outputs,
        BK=tile.inputs,
        SPLIT=tile.split,
        NORM=gain is not None,
        KEEP=normed is not None,
        GATE=gate,
        RESIDUAL=residual is not None,
        PRECISION="ieee" if weight.dtype == torch.float32 else "tf32",
        OVERLAP=overlap,
        EARLY=starts_early(rows),
        num_warps=tile.warps,
        num_stages=1,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out


@_thin_linear.register_fake
def _output(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gate: bool,
) -> Tensor:
    outputs = weight.shape[-2]
    return x.new_empty(*x.shape[:-1], outputs // 2 if gate else outputs)
