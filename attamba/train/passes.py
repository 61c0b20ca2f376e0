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

    keeps_gradients = False
    """Must zero_grad leave the gradients' memory where it is?"""

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
        assert self._loss is not None
        loss, self._loss = self._loss, None
        (loss * self._factor).backward()


class CapturedPasses(Passes):
    """The same from two CUDA graphs for each shape of rows and variant: two launches by the host.

    The first call runs the pass a few times as it is, which compiles what is to be compiled, then
    captures it. Gradients stay in place from then on: zero_grad(set_to_none=False). What the
    passes hold between forward and backward keeps its memory, which all graphs share. A pass must
    not look at values on the host.
    """

    keeps_gradients = True

    def __init__(
        self, mean_loss: MeanLoss, factor: float, parameters: Iterable[nn.Parameter]
    ) -> None:
        super().__init__(mean_loss, factor)
        self._parameters = list(parameters)
        self._graphs: dict[Hashable, _Graphs] = {}
        self._now: _Graphs | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def forward(self, rows: Rows, scored: Tensor, variant: Hashable = None) -> Tensor:
        key = (rows.inputs.shape, variant)
        if key not in self._graphs:
            self._warm_up(rows, scored)
            self._graphs[key] = self._capture(rows, scored)
        self._now = graphs = self._graphs[key]
        for held, new in zip((*graphs.rows, graphs.scored), (*rows, scored)):
            held.copy_(new)
        graphs.forward.replay()
        return graphs.loss

    def backward(self) -> None:
        assert self._now is not None
        self._now.backward.replay()
        self._now = None

    def _warm_up(self, rows: Rows, scored: Tensor) -> None:
        """Beside the stream that captures, as PyTorch wants it; gradients are then as before."""
        before = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                super().forward(rows, scored)
                super().backward()
        current.wait_stream(stream)
        for parameter, grad in zip(self._parameters, before):
            if parameter.grad is not None:
                parameter.grad.zero_() if grad is None else parameter.grad.copy_(grad)

    def _capture(self, rows: Rows, scored: Tensor) -> _Graphs:
        held = Rows(*(torch.empty_like(t) for t in rows))
        for empty, full in zip(held, rows):
            empty.copy_(full)
        count = scored.clone()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            loss = super().forward(held, count)
        with torch.cuda.graph(backward, pool=self._pool):
            super().backward()
        return _Graphs(held, count, loss, forward, backward)


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
