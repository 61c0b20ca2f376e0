"""Products of few rows on a CPU: the same numbers as the library's, by another way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attamba.modules import layers


@pytest.fixture
def cut(monkeypatch):
    """Makes two threads of one, and tells which products are cut."""
    calls = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: calls.append(args[0].shape) or bmm(*args))
    return calls


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 1, 6), (4, 6), (2, 2, 6)])
def test_few_rows(shape, cut):
    x, weight = torch.randn(shape, dtype=torch.float32), torch.randn(8, 6)
    with torch.no_grad():
        got = layers.product(x, weight)
    assert cut == [(2, 4, 6)]
    assert got.shape == (*shape[:-1], 8) and torch.allclose(got, x @ weight.t(), atol=1e-5)


@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.randn(5, 6), torch.randn(8, 6)),  # many rows
        (torch.randn(0, 6), torch.randn(8, 6)),  # none
        (torch.randn(1, 6), torch.randn(7, 6)),  # rows that do not fit two threads
        (torch.randn(1, 6).bfloat16(), torch.randn(8, 6).bfloat16()),
        (torch.randn(1, 6).double(), torch.randn(8, 6).double()),
    ],
)
def test_all_others_are_the_library_s(x, weight, cut):
    with torch.no_grad():
        assert torch.equal(layers.product(x, weight), nn.functional.linear(x, weight))
    assert not cut


def test_training_and_sharded_weights_are_left_alone(cut):
    class Sharded(torch.Tensor):
        pass

    layer, x = layers.linear(6, 8), torch.randn(1, 6, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0), atol=1e-6)
    with torch.no_grad():
        layers.product(x, layer.weight.detach().as_subclass(Sharded))
    assert not cut
    with torch.no_grad():
        layer(x)
    assert len(cut) == 1
