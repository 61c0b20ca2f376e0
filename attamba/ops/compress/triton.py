"""The compressors in Triton, where every chunk fits a tile: kernels.py as a differentiable op.

The backward pass recomputes everything from the inputs and the output; the parameters' gradients
are sums over programs in a fixed order, so results do not change from run to run.

Shapes: B batch, T tokens, E inner width, S heads, N state, Q tokens of a tile.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attamba.ops.chunk_scan.triton import filled, writes_ptx
from attamba.ops.compress.kernels import compress_backward_kernel, compress_forward_kernel
from attamba.ops.layout import even_rows


class Launch(NamedTuple):
    """How a kernel is launched: warps of a program, registers of a thread, how many programs
    there are for each multiprocessor, how many heads are loaded or computed at a time, and how many
    arrays are loaded of each."""

    warps: int
    registers: int
    programs: int
    stages: int
    arrays: int


TILE = 16
"""Tokens of a tile; a chunk must fit one. Longer ones are faster where states pass, see scan."""

FORWARD = Launch(warps=1, registers=168, programs=64, stages=3, arrays=2)
BACKWARD = Launch(warps=1, registers=255, programs=16, stages=3, arrays=4)
"""Not every number of warps is right: compiled by Triton 3.6 for compute capability 9.0, two give
wrong gradients, in every dtype. One and four agree to the bit in 16 bits. Run the GPU tests after a
change."""

ON_THEIR_WAY = 24 * 1024
"""Bytes that a program loads ahead, at most, so that as many programs fit a multiprocessor as its
registers allow."""


def fits_a_tile(longest: int, dtype: torch.dtype) -> bool:
    """Are chunks of `longest` tokens computed on their own, with no states passed?

    Not in float32, which goes through the scan with states: there one warp too gives a wrong
    gradient (see BACKWARD).
    """
    return dtype != torch.float32 and longest <= TILE


def compress_triton(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See compress; starts is [B or 1, T], and every chunk fits a tile."""
    y_k, y_v, _ = compress_forward(proj, conv_weight, A, dt_bias, D, starts, state_dim, eps)
    return y_k, y_v


# The tag: a compiler may hand over rows that it has spread out; to move them together took as
# long as half the forward kernel.
@torch.library.custom_op(
    "attamba::compress_forward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def compress_forward(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_k and y_v [B, T, E], and the norm's factors, float32 [B, T, 2]."""
    y_k, y_v, rstd = _outputs(proj, conv_weight, A, dt_bias, D, starts, state_dim, eps)
    plan = _Plan.make(proj, conv_weight, A, state_dim)
    span, grid = plan.spans(FORWARD)
    proj, starts, starts_stride = even_rows(proj), *flags(starts)
    compress_forward_kernel[grid](
        proj, *(t.contiguous() for t in (conv_weight, A, dt_bias, D)), starts, y_k, y_v, rstd,
        plan.seq, span, starts_stride, proj.stride(1), eps,
        **plan.constants(), **plan.options(FORWARD),
    )  # fmt: skip
    return y_k, y_v, rstd


@compress_forward.register_fake
def _outputs(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq, _ = proj.shape
    inner = conv_weight.shape[0] // 2 - 2 * state_dim
    y_k, y_v = (proj.new_empty(batch, seq, inner) for _ in range(2))
    return y_k, y_v, proj.new_empty(batch, seq, 2, dtype=torch.float32)


@torch.library.custom_op(
    "attamba::compress_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def compress_backward(
    dy_k: Tensor,
    dy_v: Tensor,
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    y_k: Tensor,
    y_v: Tensor,
    rstd: Tensor,
    state_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of proj, of conv_weight, and of A, dt_bias and D, float32 [3, 2, S]."""
    plan = _Plan.make(proj, conv_weight, A, state_dim)
    span, grid = plan.spans(BACKWARD)
    proj, starts, starts_stride = even_rows(proj), *flags(starts)
    dproj = proj.new_empty(proj.shape)
    # One tensor, and so one sum, since kernels as short as these cost most by their number.
    numbers = conv_weight.numel(), 3 * 2 * plan.heads
    sums = proj.new_zeros(grid[1] * plan.batch, sum(numbers), dtype=torch.float32)
    compress_backward_kernel[grid](
        proj, *(t.contiguous() for t in (conv_weight, A, dt_bias, D)), starts,
        *(t.contiguous() for t in (y_k, y_v, rstd, dy_k, dy_v)), dproj, sums,
        plan.seq, span, starts_stride, proj.stride(1), dproj.stride(1),
        **plan.constants(), **plan.options(BACKWARD),
        TP=max(8, triton.next_power_of_2(plan.taps)),  # columns that a product has at least
    )  # fmt: skip
    dweight, dscalars = sums.sum(0).split(numbers)
    dconv = dweight.view(plan.taps, -1).t().contiguous()
    dscalars = dscalars.view(3, 2, plan.heads).clone()  # outputs share no memory
    return dproj, dconv.to(conv_weight.dtype), dscalars


@compress_backward.register_fake
def _gradients(
    dy_k: Tensor, dy_v: Tensor, proj: Tensor, conv_weight: Tensor, A: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dproj = proj.new_empty(proj.shape)
    dconv = conv_weight.new_empty(conv_weight.shape)
    return dproj, dconv, proj.new_empty(3, *A.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state_dim, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.state_dim = state_dim


def _backward(ctx: Any, dy_k: Tensor, dy_v: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dproj, dconv, dscalars = compress_backward(dy_k, dy_v, *saved, ctx.state_dim)
    _, _, A, dt_bias, D, *_ = saved
    dA, dbias, dD = (g.to(t.dtype) for g, t in zip(dscalars.unbind(0), (A, dt_bias, D)))
    return dproj, dconv, dA, dbias, dD, None, None, None


compress_forward.register_autograd(_backward, setup_context=_save)


@dataclass
class _Plan:
    """Sizes of one call, and how it is cut into programs."""

    batch: int
    seq: int
    inner: int
    heads: int
    state_dim: int
    taps: int
    processors: int
    exact: bool

    @classmethod
    def make(cls, proj: Tensor, conv_weight: Tensor, A: Tensor, state_dim: int) -> "_Plan":
        channels, taps = conv_weight.shape
        return cls(
            batch=proj.shape[0],
            seq=proj.shape[1],
            inner=channels // 2 - 2 * state_dim,
            heads=A.shape[1],
            state_dim=state_dim,
            taps=taps,
            processors=processors_of(proj.device),
            exact=proj.dtype == torch.float32,
        )

    def spans(self, launch: Launch) -> tuple[int, tuple[int, int, int]]:
        """Tokens of a row that one program owns, and the grid."""
        wanted = -(-self.processors * launch.programs // (2 * self.batch))
        tiles = -(-self.seq // (wanted * TILE))  # whole ones: a part takes as long
        span = max(tiles, 1) * TILE
        return span, (2, -(-self.seq // span), self.batch)

    def options(self, launch: Launch) -> dict[str, int]:
        head = launch.arrays * TILE * filled(self.inner // self.heads) * 2
        stages = min(launch.stages, 1 + ON_THEIR_WAY // head)
        options = {"num_warps": launch.warps, "num_stages": 1, "STAGES": stages}
        if writes_ptx():
            options["maxnreg"] = launch.registers
        return options

    def constants(self) -> dict[str, Any]:
        width = self.inner // self.heads
        return {
            "E": self.inner,
            "S": self.heads,
            "N": self.state_dim,
            "W": width,
            "TAPS": self.taps,
            "Q": TILE,
            "NP": filled(self.state_dim),
            "WP": filled(width),
            # Two at least, since Triton does not compile a running sum of one column.
            "SP": max(2, triton.next_power_of_2(self.heads)),
            "PRECISION": "ieee" if self.exact else "tf32",
            "PTX": writes_ptx(),
        }


def flags(starts: Tensor) -> tuple[Tensor, int]:
    """bool [B or 1, T] as bytes, and the distance between rows (0 where they are one)."""
    starts = starts.contiguous().view(torch.uint8)
    return starts, starts.shape[1] if starts.shape[0] > 1 else 0


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
