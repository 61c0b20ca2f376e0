"""The compressors in Triton where states pass between tiles: the kernels as a differentiable op.

The forward pass keeps the states that enter the tiles, in proj's dtype; the backward pass
recomputes the rest from them. The parameters' gradients are sums over programs in a fixed order,
so results do not change from run to run.

Shapes: B batch, T tokens, E inner width, S heads, N state, W = E/S width of a head, n tiles of a
row, m segments.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attamba.ops.chunk_scan.kernels import pass_states
from attamba.ops.chunk_scan.triton import BLOCK, FOUR_WARPS, GROUP, filled, writes_ptx
from attamba.ops.compress.scan import kernels
from attamba.ops.compress.scan.backward import kernels as backward
from attamba.ops.compress.triton import flags, processors_of
from attamba.ops.layout import even_rows


class Launch(NamedTuple):
    """How a kernel is launched: warps of a program, registers of a thread, stages of its loop."""

    warps: int
    registers: int = 255
    stages: int = 1


TILE = 64
"""Tokens of a tile; a state is kept for each."""

PROGRAMS, SHORTEST = 4, 2
"""Rows are cut into segments until there are about so many programs for each multiprocessor, which
costs a second reading of all segments but one; and the fewest tiles of a segment."""

LARGEST_SIDE = 64
"""N and W of a head's state, which a program holds, may be so much."""

LAUNCHES = {
    "shared_inputs": Launch(4, 96),
    "segment_states": Launch(4, 128),
    "segment_outputs": Launch(4, 128),
    "normalise": Launch(4),
    "gradient_along": Launch(4),
    "segment_gradients": Launch(4, 128, 3),
    "scan_gradients": Launch(4),
    "step_gradients": Launch(4),
    "sum_heads": Launch(4, 128),
    "conv_gradients": Launch(2, 168, 2),
}
"""By kernel, for states of up to FOUR_WARPS numbers; see segment_warps for larger ones."""

SHARED_COLUMNS = 64
"""Columns of B and C that a program takes at once."""

COLUMNS, ROWS, SPAN = 64, 16, 256
"""What a program takes of the convolution's gradient: columns, and tokens, at once and in all."""


def segment_warps(kernel: str, state_dim: int, width: int) -> int:
    """Of one program, for states of these sides, filled up to powers of two.

    Four warps of segment_outputs, compiled by ptxas 12.8 for compute capability 9.0, read their
    values from a wrong place where states are deeper than wide, see chunk_scan.triton's
    gradient_warps; eight do not.
    """
    deep = kernel == "segment_outputs" and state_dim > width
    return LAUNCHES[kernel].warps * (2 if deep or state_dim * width > FOUR_WARPS else 1)


def passes_states(dtype: torch.dtype, state_dim: int, width: int) -> bool:
    """Do compressors of 16 bits and such states go through these kernels?

    Not in float32, whose exact products take long to compile in tiles of this size, see
    fits_a_tile: it goes through chunk_scan, in smaller ones.
    """
    return dtype != torch.float32 and max(state_dim, width) <= LARGEST_SIDE


def compress_scan(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See compress; starts is [B or 1, T], proj is not empty."""
    inputs = (proj, conv_weight, A, dt_bias, D)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y_k, y_v, _, _ = scan_forward(*inputs, starts, state_dim, eps, keep)
    return y_k, y_v


# The tag: see compress_forward.
@torch.library.custom_op(
    "attamba::compress_scan_forward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def scan_forward(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_k and y_v [B, T, E], the norm's factors, float32 [B, T, 2], and for the backward pass
    the states that enter the tiles, [B, n, 2S, N, W]; none of them, [0], unless `keep`.
    """
    y_k, y_v, rstd, states = _outputs(
        proj, conv_weight, A, dt_bias, D, starts, state_dim, eps, keep
    )
    call = _Call(proj, conv_weight, A, dt_bias, D, starts, state_dim)
    squares = torch.empty_like(call.dt)
    call.run(
        kernels.segment_outputs, call.heads_grid,
        call.proj, call.conv_weight, call.D, *call.shared, call.entering(), y_k, y_v,
        squares, states, *call.sizes, call.proj.stride(1), **call.constants, KEEP=keep,
    )  # fmt: skip
    call.run(
        kernels.normalise, call.tokens_grid,
        y_k, y_v, squares, rstd, call.seq, squares.shape[2], eps, **call.whole_rows,
        S=call.heads, SP=triton.next_power_of_2(call.heads),
    )  # fmt: skip
    return y_k, y_v, rstd, states


@scan_forward.register_fake
def _outputs(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seq, _ = proj.shape
    heads, inner = A.shape[1], conv_weight.shape[0] // 2 - 2 * state_dim
    y_k, y_v = (proj.new_empty(batch, seq, inner) for _ in range(2))
    rstd = proj.new_empty(batch, seq, 2, dtype=torch.float32)
    tiles = (seq + TILE - 1) // TILE
    shape = (batch, tiles, 2 * heads, state_dim, inner // heads) if keep else (0,)
    return y_k, y_v, rstd, proj.new_empty(shape)


@torch.library.custom_op(
    "attamba::compress_scan_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def scan_backward(
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
    states: Tensor,
    state_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of proj, of conv_weight, and of A, dt_bias and D, float32 [3, 2, S]."""
    call = _Call(proj, conv_weight, A, dt_bias, D, starts, state_dim)
    halves = tuple(t.contiguous() for t in (y_k, y_v, dy_k, dy_v))
    dproj = proj.new_empty(proj.shape)
    along = torch.empty_like(rstd)
    call.run(backward.gradient_along, call.tokens_grid, *halves, along, call.seq, **call.whole_rows)
    norm = (*halves, rstd.contiguous(), along)
    dconv = proj.new_empty(*proj.shape[:2], conv_weight.shape[0])
    dshared = proj.new_empty(call.heads, *call.shared[0].shape)
    sums, through = along.new_empty(4, *call.dt.shape), along.new_empty(states.shape[:4])
    call.run(
        backward.scan_gradients, call.heads_grid,
        call.proj, call.conv_weight, call.D, *call.shared, states.contiguous(),
        call.leaving(norm), *norm, dproj, dconv, dshared, sums, through,
        *call.sizes, call.proj.stride(1), dproj.stride(1), **call.constants,
    )  # fmt: skip
    dscalars = call.step_gradients(sums, through, dproj)
    dweight = call.conv_gradients(dshared, dconv, dproj)
    return dproj, dweight.to(conv_weight.dtype), dscalars


@scan_backward.register_fake
def _gradients(
    dy_k: Tensor, dy_v: Tensor, proj: Tensor, conv_weight: Tensor, A: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dproj = proj.new_empty(proj.shape)
    dconv = conv_weight.new_empty(conv_weight.shape)
    return dproj, dconv, proj.new_empty(3, *A.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state_dim, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.state_dim = state_dim


def _backward(ctx: Any, dy_k: Tensor, dy_v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dproj, dconv, dscalars = scan_backward(dy_k, dy_v, *saved, ctx.state_dim)
    _, _, A, dt_bias, D, *_ = saved
    dA, dbias, dD = (g.to(t.dtype) for g, t in zip(dscalars.unbind(0), (A, dt_bias, D)))
    return dproj, dconv, dA, dbias, dD, None, None, None, None


scan_forward.register_autograd(_backward, setup_context=_save)


@dataclass
class _Call:
    """One call's tensors as the kernels take them, and the passes that both directions share."""

    proj: Tensor
    conv_weight: Tensor
    A: Tensor
    dt_bias: Tensor
    D: Tensor
    starts: Tensor
    state_dim: int

    def __post_init__(self) -> None:
        self.proj = even_rows(self.proj)
        self.A, self.dt_bias, self.D = (t.contiguous() for t in (self.A, self.dt_bias, self.D))
        self.conv_weight = self.conv_weight.t().contiguous()  # columns side by side, as in proj
        self.batch, self.seq, _ = self.proj.shape
        self.heads = self.A.shape[1]
        self.taps, channels = self.conv_weight.shape
        self.inner = channels // 2 - 2 * self.state_dim
        self.tiles = triton.cdiv(self.seq, TILE)
        programs = 2 * self.heads * self.batch
        wanted = max(1, round(processors_of(self.proj.device) * PROGRAMS / programs))
        self.span = max(min(SHORTEST, self.tiles), triton.cdiv(self.tiles, wanted))
        self.heads_grid = (2 * self.heads, triton.cdiv(self.tiles, self.span), self.batch)
        self.sizes = (self.seq, self.tiles, self.span)
        self.dt = self.A.new_empty(
            2 * self.heads, self.batch, self.tiles * TILE, dtype=torch.float32
        )

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels of a head are compiled for."""
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
            "PRECISION": "ieee" if self.proj.dtype == torch.float32 else "tf32",
            "PTX": writes_ptx(),
        }

    @property
    def tokens_grid(self) -> tuple[int, int, int]:
        return triton.cdiv(self.seq, self.whole_rows["R"]), self.batch, 2

    @property
    def whole_rows(self) -> dict[str, int]:
        """What the kernels of whole tokens are compiled for."""
        filled = triton.next_power_of_2(self.inner)
        return {"E": self.inner, "R": max(1, 4096 // filled), "EP": filled}

    @property
    def columns_grid(self) -> tuple[int, int, int]:
        blocks = triton.cdiv(4 * self.state_dim, self.few_columns["BLOCK"])
        return self.tiles, self.batch, blocks

    @property
    def few_columns(self) -> dict[str, Any]:
        """What the kernels of columns of B and C are compiled for."""
        constants = {name: self.constants[name] for name in ("E", "S", "N", "TAPS", "Q", "PTX")}
        block = min(SHARED_COLUMNS, triton.next_power_of_2(4 * self.state_dim))
        return {**constants, "BLOCK": block}

    def run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        launch = LAUNCHES[kernel.fn.__name__]
        sides = filled(self.state_dim), filled(self.inner // self.heads)
        options = {
            "num_warps": segment_warps(kernel.fn.__name__, *sides),
            "num_stages": launch.stages,
        }
        if writes_ptx():
            options["maxnreg"] = launch.registers
        kernel[grid](*args, **constants, **options)

    @cached_property
    def shared(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What heads share: see shared_inputs."""
        starts, starts_stride = flags(self.starts)
        columns = 4 * self.state_dim
        shared = self.proj.new_empty(self.batch, self.seq, columns)
        cum = torch.empty_like(self.dt)
        first, visible = (self.dt.new_empty(self.dt.shape[1:], dtype=torch.int32) for _ in "fv")
        outputs = (shared, self.dt, cum, first, visible)
        self.run(
            kernels.shared_inputs, self.columns_grid,
            self.proj, self.conv_weight, self.A, self.dt_bias, starts, *outputs,
            self.seq, self.tiles, starts_stride, self.proj.stride(1),
            **self.few_columns, SP=triton.next_power_of_2(2 * self.heads),
        )  # fmt: skip
        return outputs

    def entering(self) -> Tensor:
        """The states that enter the segments, float32 [B, m, 2S, N, W]; none, [0], of one."""
        if self.heads_grid[1] == 1:
            return self.dt.new_empty(0)
        own, decays, grid = self._own_states()
        self.run(
            kernels.segment_states, grid,
            self.proj, self.conv_weight, *self.shared, own, decays,
            *self.sizes, self.proj.stride(1), **self.constants,
        )  # fmt: skip
        return self._pass(own, decays, backwards=False)

    def leaving(self, norm: tuple[Tensor, ...]) -> Tensor:
        """Gradients of the states that leave the segments, like `entering`.

        norm: y_k, y_v, dy_k, dy_v, rstd and along.
        """
        if self.heads_grid[1] == 1:
            return self.dt.new_empty(0)
        own, decays, grid = self._own_states()
        shared, _, *rest = self.shared
        constants = {name: value for name, value in self.constants.items() if name != "TAPS"}
        self.run(
            backward.segment_gradients, grid,
            self.proj, shared, *rest, *norm, own, decays,
            *self.sizes, self.proj.stride(1), **constants,
        )  # fmt: skip
        return self._pass(own, decays, backwards=True)

    def _own_states(self) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """Room for each segment's own state and decay, and the grid of all segments but one.

        What the last one taken leaves is nobody's concern: it is neither computed nor used.
        """
        heads, segments, batch = self.heads_grid
        decays = self.dt.new_empty(batch, segments, heads)
        own = decays.new_empty(*decays.shape, self.state_dim, self.inner // self.heads)
        return own, decays, (heads, segments - 1, batch)

    def _pass(self, own: Tensor, decays: Tensor, backwards: bool) -> Tensor:
        heads, segments, batch = self.heads_grid
        entering, before = torch.empty_like(own), own.new_zeros(own[:, 0].shape)
        size = before[0, 0].numel()
        pass_states[(batch * heads, triton.cdiv(size, BLOCK))](
            own, decays, before, entering, torch.empty_like(before), segments,
            S=heads, SIZE=size, BLOCK=BLOCK, GROUP=GROUP, BACKWARDS=backwards, num_warps=2,
        )  # fmt: skip
        return entering

    def step_gradients(self, sums: Tensor, through: Tensor, dproj: Tensor) -> Tensor:
        """Fills dproj's columns of dt; returns gradients of A, dt_bias and D, float32 [3, 2, S]."""
        dscalars = sums.new_empty(self.batch, self.tiles, 3, 2, self.heads)
        constants = {name: self.constants[name] for name in ("E", "S", "N", "Q", "NP")}
        self.run(
            backward.step_gradients, (self.tiles, self.batch),
            self.A, self.dt, self.shared[4], sums, through, dproj, dscalars,
            self.seq, self.tiles, dproj.stride(1), **constants,
            SP=triton.next_power_of_2(2 * self.heads),
        )  # fmt: skip
        return dscalars.sum((0, 1))

    def conv_gradients(self, dshared: Tensor, dconv: Tensor, dproj: Tensor) -> Tensor:
        """Fills dproj's columns of x, B and C; returns the weights' gradient, float32."""
        visible = self.shared[4]
        self.run(
            backward.sum_heads, self.columns_grid,
            self.proj, self.conv_weight, visible, dshared, dconv,
            self.seq, self.tiles, self.proj.stride(1), **self.few_columns,
        )  # fmt: skip
        channels = self.conv_weight.shape[1]
        spans = triton.cdiv(self.seq, SPAN)
        dweight = self.dt.new_empty(self.batch, spans, self.taps, channels)
        self.run(
            backward.conv_gradients, (triton.cdiv(channels, COLUMNS), spans, self.batch),
            self.proj, self.conv_weight, visible, dconv, dproj, dweight,
            self.seq, SPAN, visible.shape[1], self.proj.stride(1), dproj.stride(1),
            E=self.inner, N=self.state_dim, TAPS=self.taps,
            TP=triton.next_power_of_2(self.taps), R=ROWS, BLOCK=COLUMNS,
            STAGES=LAUNCHES["conv_gradients"].stages,
        )  # fmt: skip
        return dweight.sum((0, 1)).t().contiguous()
