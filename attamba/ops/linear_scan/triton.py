"""The linear recurrence in Triton: kernels.py as a differentiable op.

Shapes: B batch, T tokens, C channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attamba.ops.linear_scan import kernels

TILE, WIDTH = 32, 64
"""Tokens and channels that a program takes at once."""

PROGRAMS = 512
"""Rows are cut into pieces until there are about so many programs, which fill a GPU."""

SHORTEST = 8
"""Tiles of a piece: fewer are not worth the second reading."""


def linear_scan_triton(
    a: Tensor, b: Tensor, starts: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See linear_scan; starts is [B or 1, T]. T is at least 1, as are B and C."""
    return scan_forward(a, b, starts, initial_state)


@torch.library.custom_op("attamba::linear_scan_triton", mutates_args=())
def scan_forward(
    a: Tensor, b: Tensor, starts: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """h like b, contiguous, and the last state, float32 [B, C]."""
    call = _Call(a, b, starts)
    entering = call.entering(initial_state, initial_state, backwards=False)
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    return h, call.run(entering, h)


@torch.library.custom_op("attamba::linear_scan_triton_backward", mutates_args=())
def scan_backward(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    starts: Tensor,
    h: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and initial_state."""
    call, dfinal, initial = _Call(a, dh, starts), dfinal.contiguous(), initial_state.contiguous()
    entering = call.entering(torch.zeros_like(dfinal), dfinal, backwards=True)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    db, dinitial = torch.empty_like(h), torch.empty_like(initial)
    kernels.run_gradients[call.grid](
        call.a, call.b, call.starts, dfinal, entering, h, initial, da, db, dinitial,
        *call.sizes, *call.strides, **call.constants,
    )  # fmt: skip
    return da, db, dinitial


@scan_forward.register_fake
def _outputs(a: Tensor, b: Tensor, starts: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), initial_state.new_empty(initial_state.shape)


@scan_backward.register_fake
def _gradients(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    starts: Tensor,
    h: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), initial_state.new_empty(initial_state.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, starts, initial_state = inputs
    ctx.save_for_backward(a, starts, output[0], initial_state)


def _backward(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    da, db, dinitial = scan_backward(dh, dfinal, *ctx.saved_tensors)
    return da, db, None, dinitial


scan_forward.register_autograd(_backward, setup_context=_save)


@dataclass
class _Call:
    """One call's tensors as the kernels take them. b: inputs, or their gradients' dh."""

    a: Tensor
    b: Tensor
    starts: Tensor

    def __post_init__(self) -> None:
        self.a, self.b = (t if t.stride(2) == 1 else t.contiguous() for t in (self.a, self.b))
        self.starts = self.starts.contiguous().view(torch.uint8)
        batch, seq, channels = self.b.shape
        self.constants = {"C": channels, "Q": TILE, "W": WIDTH}
        blocks = triton.cdiv(channels, WIDTH)
        tiles = triton.cdiv(seq, TILE)
        pieces = max(1, min(tiles // SHORTEST, PROGRAMS // (blocks * batch)))
        span = triton.cdiv(tiles, pieces) * TILE
        pieces = triton.cdiv(seq, span)
        self.grid, self.sizes = (pieces, blocks, batch), (seq, span, pieces)

    @property
    def strides(self) -> tuple[int, ...]:
        a, b = self.a, self.b
        starts_b = self.starts.shape[1] if self.starts.shape[0] > 1 else 0
        return a.stride(0), b.stride(0), starts_b, a.stride(1), b.stride(1)

    def entering(self, first: Tensor, dfinal: Tensor, backwards: bool) -> Tensor:
        """States that enter the pieces, float32 [B, pieces, C], in the order in which they run.

        first: float32 [B, C], the one that enters the first of them.
        """
        pieces = self.grid[0]
        first = first.contiguous()
        if pieces == 1:
            return first
        batch, channels = first.shape
        decays, states = (first.new_empty(batch, pieces, channels) for _ in range(2))
        kernels.piece_totals[self.grid](
            self.a, self.b, self.starts, dfinal.contiguous(), decays, states,
            *self.sizes, *self.strides, **self.constants, BACKWARDS=backwards,
        )  # fmt: skip
        none = torch.zeros(1, pieces, dtype=torch.bool, device=first.device)
        after, _ = scan_forward(decays, states, none, first)
        return torch.cat([first[:, None], after[:, :-1]], 1)

    def run(self, entering: Tensor, h: Tensor) -> Tensor:
        """Fills h, returns the last state, float32 [B, C]."""
        final = entering.new_empty(h.shape[0], h.shape[2])
        kernels.run_scan[self.grid](
            self.a, self.b, self.starts, entering, h, final,
            *self.sizes, *self.strides, **self.constants,
        )  # fmt: skip
        return final
