"""Activation checkpointing: every operator with gradients runs again in the backward pass.

PyTorch hands out what an operator saved once for each time that it was saved, so that a backward
formula that reads it twice fails here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from scanning import chunk_starts, compress_inputs, linear_inputs, scan_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attamba.ops import chunk_attention, chunk_scan, compress, linear_scan
from attamba.ops.cross_entropy import cross_entropy
from attamba.ops.rotary import rotary_table, with_positions
from attamba.ops.swiglu import gated_product

SEQ = 20
LONGEST_OF_SCAN = 100


def _attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return chunk_attention(q, k, v, chunk_starts(SEQ, 4)[0], 5, backend=backend)


def _compress(*tensors: Tensor, backend: str, longest: int) -> Tensor:
    starts = chunk_starts(SEQ, 4)
    options = {"state_dim": 8, "eps": 1e-5, "longest": longest, "backend": backend}
    return torch.cat(compress(*tensors, starts=starts, **options), -1)


def _compress_chunks(*tensors: Tensor, backend: str) -> Tensor:
    return _compress(*tensors, backend=backend, longest=4)


def _compress_rows(*tensors: Tensor, backend: str) -> Tensor:
    return _compress(*tensors, backend=backend, longest=LONGEST_OF_SCAN)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, backend: str
) -> Tensor:
    return chunk_scan(x, dt, A, B, C, chunk_starts(SEQ, 4), D, state, backend=backend)


def _scan_linearly(a: Tensor, b: Tensor, state: Tensor, backend: str) -> Tensor:
    return linear_scan(a, b, chunk_starts(SEQ, 4), state, backend=backend)


def _rotate(q: Tensor, k: Tensor, v: Tensor, direct: Tensor, backend: str) -> Tensor:
    table = rotary_table(torch.arange(SEQ)[None], 16, 1e4)
    return torch.cat(with_positions(q, k, v, table, direct, backend=backend), 2)


def _score(logits: Tensor, backend: str) -> Tensor:
    return cross_entropy(logits, torch.arange(len(logits)), -100, backend)


def _attention_inputs(seq: int, batch: int) -> dict[str, Tensor]:
    q, *kv = (torch.randn(batch, seq, heads, 16) for heads in (4, 2, 2))
    return {"q": q, **dict(zip("kv", kv))}


def _rotary_inputs(seq: int, batch: int) -> dict[str, Tensor]:
    tensors = _attention_inputs(seq, batch)
    return {**tensors, "direct": torch.randn_like(tensors["k"])}


def _matrices(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {str(shape): torch.randn(shape) for shape in shapes}


_one_head = partial(compress_inputs, heads=1)
OPERATORS = {
    "chunk_attention": (_attend, _attention_inputs),
    "compress": (_compress_chunks, _one_head),
    "compress, fused": (_compress_chunks, partial(_one_head, dtype=torch.float16)),
    "compress, long chunks": (_compress_rows, partial(_one_head, dtype=torch.float16)),
    "chunk_scan": (_scan, partial(scan_inputs, heads=2, groups=1)),
    "linear_scan": (_scan_linearly, linear_inputs),
    "with_positions": (_rotate, _rotary_inputs),
    "gated_product": (gated_product, lambda seq, batch: _matrices((batch, seq, 24), (5, 12))),
    "cross_entropy": (_score, lambda seq, batch: _matrices((seq, 30))),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_those_without_it(name: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    operator, inputs = OPERATORS[name]
    tensors = list(inputs(SEQ, batch=1).values())

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(run(*leaves).square().sum(), leaves)

    def plain(*leaves: Tensor) -> Tensor:
        return operator(*leaves, backend=backend)

    def again(*leaves: Tensor) -> Tensor:
        return checkpoint(plain, *leaves, use_reentrant=False)

    assert all(map(torch.equal, gradients(again), gradients(plain)))
