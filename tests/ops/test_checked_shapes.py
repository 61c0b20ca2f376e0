"""Operators that look at shapes before they choose a backend: compiled, at any batch and length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attamba.ops.chunk_decode import CompressorWeights, compress_step
from attamba.ops.cross_entropy import cross_entropy
from attamba.ops.rotary import with_positions
from attamba.ops.swiglu import gated_product

pytest.importorskip("triton")
Inputs = list[Tensor]
HEADS, STATE, WIDTH, TAPS = 2, 4, 6, 3
CHANNELS = 2 * (HEADS * WIDTH + 2 * STATE)


def _score(logits: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, ...]:
    return (cross_entropy(logits.flatten(0, 1), targets.flatten(), -100, backend),)


def _logits(batch: int, seq: int) -> Inputs:
    return [torch.randn(batch, seq, 11), torch.randint(11, (batch, seq))]


def _gate(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
    return (gated_product(x, weight, backend),)


def _gated(batch: int, seq: int) -> Inputs:
    return [torch.randn(batch, seq, 16), torch.randn(5, 8)]


def _rotate(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *direct: Tensor, backend: str
) -> tuple[Tensor, ...]:
    return with_positions(q, k, v, (cos, sin), *direct, backend=backend)


def _turned(batch: int, seq: int, rows: int, *pair: int) -> Inputs:
    q, *kv = (torch.randn(batch, seq, heads, 8) for heads in (4, 2, 2))
    return [q, *kv, *torch.randn(2, rows, seq, 1, 4), torch.randn(batch, seq, *pair, 2, 8)]


def _shared_table(batch: int, seq: int) -> Inputs:
    return _turned(batch, seq, 1)


def _table_of_each_row(batch: int, seq: int) -> Inputs:
    return _turned(batch, seq, batch, 2)


def _without_direct(batch: int, seq: int) -> Inputs:
    return _turned(batch, seq, 1)[:5]


def _step(
    projected: Tensor, h: Tensor, conv: Tensor, starts: Tensor, *weights: Tensor, backend: str
) -> tuple[Tensor, ...]:
    held = h.clone(), conv.clone()  # "triton" writes over them
    parameters = CompressorWeights(*weights)
    return compress_step(projected, *held, parameters, starts=starts, mask=~starts, backend=backend)


def _states(batch: int, seq: int) -> Inputs:
    return [
        torch.randn(batch, 2 * HEADS * WIDTH + CHANNELS + 2 * HEADS),
        torch.randn(batch, 2 * HEADS, STATE, WIDTH),
        torch.randn(batch, TAPS - 1, CHANNELS),
        torch.arange(batch) % 2 == 0,
        torch.randn(CHANNELS, TAPS),
        *torch.randn(3, 2, HEADS),
    ]


OPERATORS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[[int, int], Inputs]]] = {
    "cross_entropy": (_score, _logits),
    "gated_product": (_gate, _gated),
    "with_positions": (_rotate, _shared_table),
    "with_positions, a table of each row": (_rotate, _table_of_each_row),
    "with_positions, no direct": (_rotate, _without_direct),
    "compress_step": (_step, _states),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_once_more_for_all_other_shapes(name: str, backend: str) -> None:
    """The second batch and length say that there are more, and nothing is compiled after them."""
    operator, inputs = OPERATORS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(operator, fullgraph=True, backend=counter)
    for batch, seq in ((2, 5), (3, 9), (4, 13), (7, 6)):
        tensors = inputs(batch, seq)
        got, want = (run(*tensors, backend=backend) for run in (compiled, operator))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want))
    assert counter.frame_count == 2
    torch._dynamo.reset()
