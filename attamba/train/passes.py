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
        """The rows' share of the mean loss, detached, until the next pass overwrites it.

        scored: float32 scalar, targets of the step.
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
    """The same from CUDA graphs, one forward and one backward: two launches by the host.

    There are two for each shape of rows and variant, and two more for a step's further passes. The
    first call runs the pass a few times as it is, which compiles what is to be compiled, then
    captures it. Gradients have memory of their own, the same for all graphs: a step's first pass
    (no parameter has a gradient yet) puts them there, further ones, of the same variant, add to
    them; nothing else may set gradients in between. What the passes hold between forward and
    backward keeps its memory, which all graphs share. A pass must not look at values on the host.
    """

    def __init__(
        self, mean_loss: MeanLoss, factor: float, parameters: Iterable[nn.Parameter]
    ) -> None:
        super().__init__(mean_loss, factor)
        self._parameters = [p for p in parameters if p.requires_grad]
        self._memory: list[Tensor | None] = [None for _ in self._parameters]
        """For the gradient of each, once a loss has depended on it."""
        self._gradients: dict[Hashable, list[Tensor | None]] = {}
        """By shape and variant: that memory, None for parameters that its loss leaves out."""
        self._graphs: dict[Hashable, _Graphs] = {}
        self._now: _Graphs | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def forward(self, rows: Rows, scored: Tensor, variant: Hashable = None) -> Tensor:
        adds = any(parameter.grad is not None for parameter in self._parameters)
        kind = (rows.inputs.shape, variant)
        if kind not in self._gradients:
            self._gradients[kind] = self._warm_up(rows, scored)
        if (kind, adds) not in self._graphs:
            self._graphs[kind, adds] = self._capture(rows, scored, self._gradients[kind], adds)
        self._now = graphs = self._graphs[kind, adds]
        for held, new in zip((*graphs.rows, graphs.scored), (*rows, scored)):
            held.copy_(new)
        graphs.forward.replay()
        return graphs.loss

    def backward(self) -> None:
        assert self._now is not None
        self._now.backward.replay()
        for parameter, gradient in zip(self._parameters, self._now.gradients):
            if gradient is not None:
                parameter.grad = gradient
        self._now = None

    def _differentiate(self) -> list[Tensor | None]:
        """Gradients of the last forward pass, in new memory."""
        loss = self._take_loss() * self._factor
        return list(torch.autograd.grad(loss, self._parameters, allow_unused=True))

    def _warm_up(self, rows: Rows, scored: Tensor) -> list[Tensor | None]:
        """Beside the stream that captures, as PyTorch wants it. The gradients' memory."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                super().forward(rows, scored)
                used = [gradient is not None for gradient in self._differentiate()]
        current.wait_stream(stream)
        for i, parameter in enumerate(self._parameters):
            if used[i] and self._memory[i] is None:
                self._memory[i] = torch.empty_like(parameter)
        return [memory if use else None for memory, use in zip(self._memory, used)]

    def _capture(
        self, rows: Rows, scored: Tensor, gradients: list[Tensor | None], adds: bool
    ) -> _Graphs:
        held = Rows(*(torch.empty_like(t) for t in rows))
        for empty, full in zip(held, rows):
            empty.copy_(full)
        count = scored.clone()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            loss = super().forward(held, count)
        with torch.cuda.graph(backward, pool=self._pool):
            _put(self._differentiate(), gradients, adds)
        return _Graphs(held, count, loss, gradients, forward, backward)


def _put(new: list[Tensor | None], gradients: list[Tensor | None], adds: bool) -> None:
    """New gradients into their memory, or added to what is there."""
    assert [gradient is None for gradient in new] == [gradient is None for gradient in gradients]
    memory = [gradient for gradient in gradients if gradient is not None]
    values = [gradient for gradient in new if gradient is not None]
    (torch._foreach_add_ if adds else torch._foreach_copy_)(memory, values)


@dataclass
class _Graphs:
    """A captured pass, and the memory that it reads rows from and writes its results to."""

    rows: Rows
    scored: Tensor
    loss: Tensor
    gradients: list[Tensor | None]
    """Of each parameter; None for those that the loss leaves out."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


def check_cuda_graphs(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where train.cuda_graphs has no CUDA device."""
    if config.train.cuda_graphs and device.type != "cuda":
        raise ConfigError(
            f"train.cuda_graphs=true needs a CUDA device, and this run is on {device.type}; set "
            f"train.cuda_graphs=false"
        )
