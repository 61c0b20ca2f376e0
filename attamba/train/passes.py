"""Forward and backward passes of a step, launched kernel by kernel or replayed from CUDA graphs.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attamba.config import ConfigError, RunConfig
from attamba.train.losses import Rows

MeanLoss = Callable[[Rows, Tensor], Tensor]
"""From rows and a scalar, the number of targets of the whole step, to a part's share of the mean
loss, a float32 scalar."""


class Passes:
    """A forward pass, then its backward pass, which adds to the parameters' gradients.

    factor: of the loss, for its gradients alone.
    """

    def __init__(self, mean_loss: MeanLoss, factor: float) -> None:
        self._mean_loss, self._factor = mean_loss, factor
        self._loss: Tensor | None = None

    def forward(self, rows: Rows, scored: Tensor, variant: Hashable = None) -> Tensor:
        """The rows' share of the mean loss, detached. scored: float32 scalar, targets of the step.

        variant: tells models apart that compute differently with the same weights.
        """
        self._loss = self._mean_loss(rows, scored)
        return self._loss.detach()

    def backward(self) -> None:
        """Of the last forward pass."""
        (self._take_loss() * self._factor).backward()

    def _take_loss(self) -> Tensor:
        assert self._loss is not None
        loss, self._loss = self._loss, None
        return loss


class CapturedPasses(Passes):
    """The same from two CUDA graphs for each shape of rows and variant: two launches by the host.

    The first call runs the pass a few times as it is, which compiles what is to be compiled, then
    captures it. Gradients have memory of their own, the same for all graphs: a step's first pass
    (no parameter has a gradient) puts them there, further ones add to them. What the passes hold
    between forward and backward keeps its memory, which all graphs share. A pass must not look at
    values on the host.
    """

    def __init__(
        self, mean_loss: MeanLoss, factor: float, parameters: Iterable[nn.Parameter]
    ) -> None:
        super().__init__(mean_loss, factor)
        self._parameters = [p for p in parameters if p.requires_grad]
        self._gradients: list[Tensor | None] | None = None
        """Of each parameter; None for one that the loss does not depend on."""
        self._graphs: dict[Hashable, _Graphs] = {}
        self._now: _Graphs | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def forward(self, rows: Rows, scored: Tensor, variant: Hashable = None) -> Tensor:
        adds = any(parameter.grad is not None for parameter in self._parameters)
        key = (rows.inputs.shape, variant, adds)
        if key not in self._graphs:
            self._warm_up(rows, scored)
            self._graphs[key] = self._capture(rows, scored, adds)
        self._now = graphs = self._graphs[key]
        for held, new in zip((*graphs.rows, graphs.scored), (*rows, scored)):
            held.copy_(new)
        graphs.forward.replay()
        return graphs.loss

    def backward(self) -> None:
        assert self._now is not None and self._gradients is not None
        self._now.backward.replay()
        self._now = None
        for parameter, gradient in zip(self._parameters, self._gradients):
            parameter.grad = gradient

    def _differentiate(self) -> list[Tensor | None]:
        """Gradients of the last forward pass, in new memory."""
        loss = self._take_loss() * self._factor
        return list(torch.autograd.grad(loss, self._parameters, allow_unused=True))

    def _warm_up(self, rows: Rows, scored: Tensor) -> None:
        """Beside the stream that captures, as PyTorch wants it."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                super().forward(rows, scored)
                gradients = self._differentiate()
        current.wait_stream(stream)
        if self._gradients is None:
            self._gradients = [
                None if gradient is None else torch.empty_like(parameter)
                for parameter, gradient in zip(self._parameters, gradients)
            ]

    def _capture(self, rows: Rows, scored: Tensor, adds: bool) -> _Graphs:
        held = Rows(*(torch.empty_like(t) for t in rows))
        for empty, full in zip(held, rows):
            empty.copy_(full)
        count = scored.clone()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            loss = super().forward(held, count)
        with torch.cuda.graph(backward, pool=self._pool):
            self._put(self._differentiate(), adds)
        return _Graphs(held, count, loss, forward, backward)

    def _put(self, new: list[Tensor | None], adds: bool) -> None:
        assert self._gradients is not None
        pairs = [(g, n) for g, n in zip(self._gradients, new) if g is not None and n is not None]
        gradients, news = [g for g, _ in pairs], [n for _, n in pairs]
        if adds:
            torch._foreach_add_(gradients, news)
        else:
            torch._foreach_copy_(gradients, news)


@dataclass
class _Graphs:
    """A captured pass, and the memory that it reads rows from and writes its loss to."""

    rows: Rows
    scored: Tensor
    loss: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


def check_cuda_graphs(config: RunConfig, device: torch.device, n_ranks: int) -> None:
    """Raises ConfigError where train.cuda_graphs cannot be."""
    if not config.train.cuda_graphs:
        return
    if device.type != "cuda":
        raise ConfigError(
            f"train.cuda_graphs=true needs a CUDA device, and this run is on {device.type}; set "
            f"train.cuda_graphs=false"
        )
    if n_ranks > 1:
        raise ConfigError(
            f"train.cuda_graphs=true is for one process, and there are {n_ranks} ranks, which "
            f"gather parameters in between; set train.cuda_graphs=false"
        )
