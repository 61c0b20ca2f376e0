"""Cross entropy: the kernels against plain PyTorch."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops.cross_entropy import cross_entropy

pytest.importorskip("triton")
IGNORED = -100


def with_gradient(logits: Tensor, targets: Tensor, backend: str) -> list[Tensor]:
    leaf = logits.detach().requires_grad_()
    nats = cross_entropy(leaf, targets, IGNORED, backend)
    return [nats, *torch.autograd.grad((nats * torch.arange(len(nats))).sum(), leaf)]


@pytest.mark.parametrize("rows, width", [(5, 37), (3, 5000), (2, 4096), (1, 1)])
def test_the_kernels_are_plain_pytorch(rows, width):
    logits, targets = 5 * torch.randn(rows, width), torch.randint(width, (rows,))
    targets[0] = IGNORED if rows > 1 else 0
    nats = cross_entropy(logits, targets, IGNORED, "torch")
    assert torch.equal(nats, F.cross_entropy(logits, targets, reduction="none"))
    for got, want in zip(
        with_gradient(logits, targets, "triton"), with_gradient(logits, targets, "torch")
    ):
        assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-5)
    assert rows == 1 or not got[0].any()


def test_logits_far_from_zero_and_minus_infinity():
    """Also where a whole block of columns is -inf, the first one among them."""
    for shift in (-1e4, 0.0, 1e4):
        logits = torch.randn(3, 9000) + shift
        logits[0, 4096:8192] = logits[1, :5000] = -torch.inf
        targets = torch.tensor([17, 8999, 0])
        for got, want in zip(
            with_gradient(logits, targets, "triton"), with_gradient(logits, targets, "torch")
        ):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4), shift


def test_the_lowest_numbers_there_are():
    logits = torch.full((2, 50), torch.finfo(torch.float32).min)
    got = cross_entropy(logits, torch.tensor([0, 49]), IGNORED, "triton")
    assert torch.allclose(got, torch.tensor(50.0).log())


def test_targets_that_do_not_exist():
    nats = cross_entropy(torch.randn(4, 7), torch.tensor([7, -1, 2, IGNORED]), IGNORED, "triton")
    assert nats.isnan().tolist() == [True, True, False, False]


def test_rows_that_lie_apart_in_memory():
    logits, targets = torch.randn(4, 90), torch.tensor([3, 0, 49, IGNORED])
    want = with_gradient(logits[:, 20:70].contiguous(), targets, "torch")
    for apart in (logits[:, 20:70], logits.t().contiguous().t()[:, 20:70]):
        for got, exact in zip(with_gradient(apart, targets, "triton"), want):
            assert torch.allclose(got, exact, atol=1e-5)


def test_half_precision_is_read_as_float32():
    logits, targets = (4 * torch.randn(6, 700)).half(), torch.randint(700, (6,))
    nats, gradient = with_gradient(logits, targets, "triton")
    want = with_gradient(logits.float(), targets, "torch")
    assert nats.dtype == torch.float32 and torch.allclose(nats, want[0], atol=1e-5)
    assert gradient.dtype == torch.float16
    assert torch.allclose(gradient.float(), want[1], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_shapes_that_disagree(backend):
    logits, targets = torch.randn(4, 7), torch.zeros(4, dtype=torch.long)
    for wrong in (targets[:3], targets[:1], targets.repeat(2), targets[:, None], targets[0]):
        match = rf"targets has shape {re.escape(str(list(wrong.shape)))}, expected \[4\] for logits"
        with pytest.raises(ValueError, match=match + r" of shape \[4, 7\]"):
            cross_entropy(logits, wrong, IGNORED, backend)
    with pytest.raises(ValueError, match=r"logits has shape \[2, 2, 7\]; it must be \[R, V\]"):
        cross_entropy(logits.view(2, 2, 7), targets.view(2, 2), IGNORED, backend)


def test_is_an_operator():
    from attamba.ops.cross_entropy import triton as module

    logits, targets = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    torch.library.opcheck(module.cross_entropy_triton, (logits, targets, IGNORED))
    arguments = (logits.detach(), targets, torch.randn(4), torch.randn(4), IGNORED)
    torch.library.opcheck(module.cross_entropy_backward, arguments)
