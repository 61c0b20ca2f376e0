"""The recurrence by pairs: T steps are T/2 steps over pairs of tokens, and so on.

Two steps in a row are one step, (a1, b1) then (a2, b2) being (a1 a2, a2 b1 + b2). So a scan over
pairs gives the states after each pair, and one product more those in between: work in proportion
to T, in log T rounds. There are only products and sums of what is given, so decays of exactly 0
or 1 are as good as any. It is one custom operator, which torch.compile takes as it is at any
length; the gradient is the same recurrence run backwards.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_scan_torch(
    a: Tensor, b: Tensor, starts: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See linear_scan; starts is [B or 1, T]."""
    seq = b.shape[1]
    if seq == 0:
        return b, initial_state
    if seq == 1:
        kept = a[:, 0].float().masked_fill(starts, 0.0)
        state = torch.addcmul(b[:, 0].float(), kept, initial_state)
        return state[:, None].to(b.dtype), state
    return _forward(a, b, starts, initial_state)


@torch.library.custom_op("attamba::linear_scan", mutates_args=())
def _forward(a: Tensor, b: Tensor, starts: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """h in b's dtype and the last state, float32 [B, C]."""
    decay = a.float().masked_fill(starts[..., None], 0.0)
    update = b.float().clone()
    update[:, 0].addcmul_(decay[:, 0], initial_state)
    h = _scan(decay, update)
    return h.to(b.dtype), h[:, -1].clone()


@torch.library.custom_op("attamba::linear_scan_backward", mutates_args=())
def _backward(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    starts: Tensor,
    h: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and initial_state: g_t = dh_t + a_(t+1) g_(t+1) is the second of them."""
    decay = a.float().masked_fill(starts[..., None], 0.0)
    update = dh.float().flip(1)
    update[:, 0] += dfinal
    g = _scan(decay.flip(1).roll(1, 1), update).flip(1)
    before = torch.cat([initial_state[:, None], h[:, :-1].float()], 1)
    da = (g * before).masked_fill_(starts[..., None], 0.0)
    return da.to(a.dtype), g.to(h.dtype), g[:, 0] * decay[:, 0]


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_(t-1) + b_t from h_(-1) = 0, float32 [B, T, C], T at least 1."""
    if b.shape[1] == 1:
        return b
    pairs, rest = b.shape[1] // 2, (b.shape[1] - 1) // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, None, 2)
    of_pairs = _scan(
        a[:, first] * a[:, second], torch.addcmul(b[:, second], a[:, second], b[:, first])
    )
    h = torch.empty_like(b)
    h[:, second] = of_pairs
    h[:, 0] = b[:, 0]
    torch.addcmul(b[:, 2::2], a[:, 2::2], of_pairs[:, :rest], out=h[:, 2::2])
    return h


@_forward.register_fake
def _outputs(a: Tensor, b: Tensor, starts: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), torch.empty_like(initial_state)


@_backward.register_fake
def _gradients(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    starts: Tensor,
    h: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), torch.empty_like(initial_state)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, starts, initial_state = inputs
    ctx.save_for_backward(a, starts, output[0], initial_state)


def _gradient(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    da, db, dinitial = _backward(dh, dfinal, *ctx.saved_tensors)
    return da, db, None, dinitial


_forward.register_autograd(_gradient, setup_context=_save)
