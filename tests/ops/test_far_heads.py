"""Heads that lie before tokens, [B, H, T, D] as [B, T, H, D], farther apart than 32 bits count.

The memory between them is never touched, so that it costs nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attamba.ops import chunk_attention, chunk_scan

pytest.importorskip("triton")
HEADS = 6
APART = 2**29
"""Numbers from head to head: the last two begin beyond 2**31."""


def _far(t: Tensor) -> Tensor:
    """The same numbers, [1, T, HEADS, D], head by head."""
    room = torch.empty(HEADS * APART, dtype=t.dtype)
    far = room.as_strided(t.shape, (HEADS * APART, t.shape[3], APART, 1))
    return far.copy_(t)


@pytest.mark.parametrize("which", ["q", "k", "v", "dy"])
def test_attention(which):
    torch.manual_seed(0)
    near = {name: torch.randn(1, 20, HEADS, 16).half() for name in ("q", "k", "v", "dy")}
    ends = torch.arange(20) % 4 == 3

    def run(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> list[Tensor]:
        used = [t.detach().requires_grad_() for t in (q, k, v)]
        out = chunk_attention(*used, ends, 3, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, used, dy)]

    far = {**near, which: _far(near[which])}
    for ours, theirs in zip(run(**far), run(**near), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", ["x", "B", "C"])
def test_scan(which):
    torch.manual_seed(0)
    near = {name: torch.randn(1, 20, HEADS, 16).half() for name in ("x", "B", "C")}
    dt, A = torch.rand(1, 20, HEADS), -torch.rand(HEADS)
    starts = torch.arange(20) % 7 == 0

    def run(x: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
        used = [t.detach().requires_grad_() for t in (x, B, C)]
        out = chunk_scan(used[0], dt, A, used[1], used[2], starts, backend="triton")
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out.sum(), used)]

    far = {**near, which: _far(near[which])}
    for ours, theirs in zip(run(**far), run(**near), strict=True):
        assert torch.equal(ours, theirs)
