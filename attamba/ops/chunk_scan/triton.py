"""The scan in Triton: kernels.py as a differentiable op, for chunks of any length.

Shapes: B batch, T tokens, S heads, K groups, N state, W width, n tiles of Q tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attamba.ops.backends import interpreted, shared_memory
from attamba.ops.chunk_scan import kernels

BLOCK, GROUP = 64, 16
"""Elements of a state that one program passes along, and the tiles that it takes at once."""


FOUR_WARPS = 2048
"""Numbers of a state that a program of four warps takes; more are for eight."""


def state_warps(state_dim: int, width: int) -> int:
    """Warps of a program that holds a state of these sides."""
    return 4 if state_dim * width <= FOUR_WARPS else 8


def gradient_warps(dtype: torch.dtype, state_dim: int, width: int) -> int:
    """The same of tile_gradients.

    ptxas 12.8, which Triton 3.6 brings along, compiles it wrongly for compute capability 9.0 where
    a state in 16 bits is 64 or 128 numbers deep, filled up to a power of two, and narrow: it adds
    to the address of an operand in shared memory before it has worked the address out
    (tests/sass.py finds that; ptxas 12.9 is right). Two warps multiply without such addresses.
    """
    if dtype != torch.float32 and filled(state_dim) in (64, 128) and filled(width) <= 32:
        return 2
    return state_warps(state_dim, width)


COMPILED = {(128, 64): 905}
"""Bytes per token as it was compiled, where the bound is far off: Mamba-2's own states, 16 bits."""


def tile_tokens(dtype: torch.dtype, state_dim: int, width: int, memory: int) -> int | None:
    """Q, tokens of a tile: as many as leave room for the states in so many bytes of shared memory.

    None where no number does. The bound is tile_shared_gradients', which needs most: four states in
    float32, and less than this per token (tests/ops/test_compiled_kernels.py compares).
    """
    exact = dtype == torch.float32
    sides = filled(state_dim), filled(width)
    per_token = 20 * sum(sides) if exact else COMPILED.get(sides, 8 * sum(sides))
    for tile in (32, 16) if exact else (64, 32, 16):
        if 16 * sides[0] * sides[1] + tile * per_token <= memory:
            return tile
    return None


def filled(side: int) -> int:
    """Up to what a matrix product takes."""
    return max(16, triton.next_power_of_2(side))


def chunk_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See chunk_scan; B and C are [B, T, K, N], starts is [B or 1, T]. T is at least 1."""
    batch, _, heads, width = x.shape
    if D is None:
        D = A.new_zeros(heads)
    if initial_state is None:
        shape = (batch, heads, B.shape[3], width)
        initial_state = x.new_zeros(shape, dtype=torch.float32)
    B, C = B.to(x.dtype), C.to(x.dtype)
    return scan_forward(x, dt.float(), A, B, C, starts, D, initial_state.float())


@torch.library.custom_op("attamba::scan_forward", mutates_args=())
def scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """y like x, contiguous, and the last state, float32 [B, S, N, W]."""
    call = _Call(x, dt, A, B, C, starts, initial_state)
    entering, final = call.states()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.tile_outputs[call.grid](
        call.x, dt, call.A, call.B, call.C, D.contiguous(), call.starts, entering, y,
        *call.sizes, *call.batch_strides, *call.strides, **call.constants, num_warps=call.warps,
    )  # fmt: skip
    return y, final


@scan_forward.register_fake
def _outputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), initial_state.new_empty(initial_state.shape)


@torch.library.custom_op("attamba::scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and initial_state."""
    call = _Call(x, dt, A, B, C, starts, initial_state)
    entering, _ = call.states()
    dy = dy.contiguous()
    leaving, dinitial = call.state_gradients(dy, dfinal.contiguous())
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dA, dD = (torch.empty_like(call.decays) for _ in range(2))
    shared = (*call.sizes, *call.batch_strides, *call.strides)
    kernels.tile_gradients[(call.sizes[1], x.shape[2], x.shape[0])](
        call.x, dt, call.A, call.B, call.C, D.contiguous(), call.starts, entering, leaving, dy,
        dx, ddt, dA, dD, *shared, **call.constants, num_warps=call.gradient_warps,
    )  # fmt: skip
    kernels.tile_shared_gradients[call.grid](
        call.x, dt, call.A, call.B, call.C, call.starts, entering, leaving, dy, dB, dC,
        *shared, **call.constants, num_warps=call.warps,
    )  # fmt: skip
    return dx, ddt, dA.sum((0, 1)).to(A.dtype), dB, dC, dD.sum((0, 1)).to(D.dtype), dinitial


@scan_backward.register_fake
def _gradients(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC, dD, dh = (t.new_empty(t.shape) for t in (x, dt, A, B, C, D, initial_state))
    return dx, ddt, dA, dB, dC, dD, dh


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    dx, ddt, dA, dB, dC, dD, dinitial = scan_backward(dy, dfinal, *ctx.saved_tensors)
    return dx, ddt, dA, dB, dC, None, dD, dinitial


scan_forward.register_autograd(_backward, setup_context=_save)


@dataclass
class _Call:
    """One call's tensors as the kernels take them, and the passes that both directions share."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    starts: Tensor
    initial_state: Tensor

    def __post_init__(self) -> None:
        self.x, self.B, self.C = (_dense_last(t) for t in (self.x, self.B, self.C))
        self.A = self.A.contiguous()
        self.starts = self.starts.contiguous().view(torch.uint8)
        batch, seq, heads, width = self.x.shape
        groups, state_dim = self.B.shape[2:]
        exact = self.x.dtype == torch.float32
        tile = tile_tokens(self.x.dtype, state_dim, width, shared_memory(self.x.device))
        assert tile is not None  # chunk_scan has asked
        tiles = triton.cdiv(seq, tile)
        self.grid = (tiles, groups, batch)
        self.sizes = (seq, tiles)
        self.constants: dict[str, Any] = {
            "S": heads,
            "K": groups,
            "N": state_dim,
            "W": width,
            "Q": tile,
            "NP": filled(state_dim),
            "WP": filled(width),
            "PRECISION": "ieee" if exact else "tf32",
        }
        self.warps = state_warps(state_dim, width)
        self.gradient_warps = gradient_warps(self.x.dtype, state_dim, width)
        self.decays = self.x.new_empty(batch, tiles, heads, dtype=torch.float32)

    @property
    def starts_b(self) -> int:
        return self.starts.shape[1] if self.starts.shape[0] > 1 else 0

    @property
    def batch_strides(self) -> tuple[int, ...]:
        return (*(t.stride(0) for t in (self.x, self.dt, self.B, self.C)), self.starts_b)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(t.stride(i) for t in (self.x, self.dt, self.B, self.C) for i in (1, 2))

    def states(self) -> tuple[Tensor, Tensor]:
        """The states that enter the tiles, float32 [B, n, S, N, W], and the last one."""
        own = self._state_buffer()
        kernels.tile_states[self.grid](
            self.x, self.dt, self.A, self.B, self.starts, own, self.decays,
            *self.sizes, *(t.stride(0) for t in (self.x, self.dt, self.B)), self.starts_b,
            *self.strides[:6], **self.constants, num_warps=self.warps,
        )  # fmt: skip
        initial = self.initial_state.contiguous()
        entering, final = torch.empty_like(own), torch.empty_like(initial)
        self._pass(own, initial, entering, final, backwards=False)
        return entering, final

    def state_gradients(self, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states that leave the tiles, and of the initial one."""
        own = self._state_buffer()
        kernels.tile_state_gradients[self.grid](
            self.dt, self.A, self.C, self.starts, dy, own,
            *self.sizes, self.dt.stride(0), self.C.stride(0), self.starts_b,
            *self.strides[2:4], *self.strides[6:], **self.constants, num_warps=self.warps,
        )  # fmt: skip
        leaving, dinitial = torch.empty_like(own), torch.empty_like(dfinal)
        self._pass(own, dfinal, leaving, dinitial, backwards=True)
        return leaving, dinitial

    def _state_buffer(self) -> Tensor:
        shape = (*self.decays.shape, self.constants["N"], self.constants["W"])
        return self.decays.new_empty(shape)

    def _pass(
        self, own: Tensor, before: Tensor, entering: Tensor, after: Tensor, backwards: bool
    ) -> None:
        batch, tiles, heads = self.decays.shape
        size = self.constants["N"] * self.constants["W"]
        kernels.pass_states[(batch * heads, triton.cdiv(size, BLOCK))](
            own, self.decays, before, entering, after, tiles,
            S=heads, SIZE=size, BLOCK=BLOCK, GROUP=GROUP, BACKWARDS=backwards, num_warps=2,
        )  # fmt: skip


def _dense_last(t: Tensor) -> Tensor:
    """[B, T, heads, columns] whose columns are adjacent in memory."""
    return t if t.stride(3) == 1 else t.contiguous()


def writes_ptx() -> bool:
    """Do kernels run as PTX: neither in Triton's interpreter nor on an AMD GPU?"""
    return torch.version.hip is None and not interpreted()
