"""The ranks that share the tokens of rows, and what they tell each other, with gradients.

Rank r of R has tokens r T/R to (r + 1) T/R of every row. Every rank calls each of these functions
at the same place, with or without use for what it gets: in the backward pass too, all of them send.

Shapes: B rows, T tokens of a whole row, R ranks, W = T/R tokens of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowRanks", "all_reduce", "all_to_all", "reduce_scatter"]


@dataclass(frozen=True)
class RowRanks:
    """This rank among those that share its rows."""

    rank: int
    size: int
    """R."""
    group: str
    """Name of the process group."""

    def span(self, seq: int) -> slice:
        """This rank's tokens of rows of `seq`."""
        width = seq // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def own(self, t: Tensor) -> Tensor:
        """This rank's part of whole rows, [B, T, ...] -> [B, W, ...]."""
        return t[:, self.span(t.shape[1])]

    def before(self, t: Tensor, n: int) -> Tensor:
        """The last n tokens before this rank's, in order, of t [B, W, ...]: [B, min(n, r W), ...].

        They come from the neighbour, and from ranks further back where it has fewer than n.
        """
        width = t.shape[1]
        if n == 0:
            return t[:, :0]
        spans = [(max(0, r * width - n), r * width) for r in range(self.size)]
        begin = self.rank * width
        sent = [_overlap(span, (begin, begin + width)) for span in spans]
        parts = [t[:, low - begin : high - begin] for low, high in sent]
        received = [
            _overlap(spans[self.rank], (r * width, (r + 1) * width)) for r in range(self.size)
        ]
        got = all_to_all(
            torch.cat(parts, 1).transpose(0, 1),
            [high - low for low, high in received],
            [high - low for low, high in sent],
            self.group,
        )
        return got.transpose(0, 1)

    def gather(self, t: Tensor) -> Tensor:
        """t of every rank, [R, ...]. Its gradient is the sum of what all ranks make of it."""
        return _Gather.apply(t, self.size, self.group)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low < high else (b[0], b[0])


def all_to_all(t: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    """Rows of t: sent[r] of them to rank r, received[r] from it, each in the ranks' order."""
    return _AllToAll.apply(t, received, sent, group)


def all_reduce(t: Tensor, group: str, operation: str = "sum") -> Tensor:
    """The sum of t over the ranks, or their "max"; without a gradient."""
    return _wait(torch.ops._c10d_functional.all_reduce(t.contiguous(), operation, group))


def reduce_scatter(t: Tensor, size: int, group: str) -> Tensor:
    """This rank's part, [...], of the sum of t [size, ...] over the ranks."""
    return _ReduceScatter.apply(t, size, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _gather(t, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.size, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _reduce_scatter(t, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.size, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.splits, ctx.group = (received, sent), group
        return _all_to_all(t, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent = ctx.splits
        return _all_to_all(grad, sent, received, ctx.group), None, None, None


def _gather(t: Tensor, size: int, group: str) -> Tensor:
    if t.numel() == 0:
        return t.new_empty(size, *t.shape)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(
        t.contiguous().flatten(), size, group
    )
    return _wait(gathered).view(size, *t.shape)


def _reduce_scatter(t: Tensor, size: int, group: str) -> Tensor:
    if t.numel() == 0:
        return t.new_empty(t.shape[1:])
    summed = torch.ops._c10d_functional.reduce_scatter_tensor(
        t.contiguous().flatten(), "sum", size, group
    )
    return _wait(summed).view(t.shape[1:])


def _all_to_all(t: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    return _wait(
        torch.ops._c10d_functional.all_to_all_single(t.contiguous(), received, sent, group)
    )


def _wait(t: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(t)
