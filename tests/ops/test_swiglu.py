"""The gated product: the kernels against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.modules.layers import SwiGLU
from attamba.ops.swiglu import gated_product

triton = pytest.importorskip("triton")


def with_gradients(x: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = gated_product(*leaves, backend=backend)
    torch.manual_seed(1)
    loss = (y * torch.randn(y.shape).to(y.dtype)).sum()
    return [y, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    "batch, seq, width, outputs", [(2, 17, 136, 40), (1, 1, 7, 3), (3, 16, 128, 64)]
)
def test_the_kernels_are_plain_pytorch(batch, seq, width, outputs):
    x, weight = torch.randn(batch, seq, 2 * width), torch.randn(outputs, width) * width**-0.5
    a, b = x.chunk(2, -1)
    assert torch.equal(gated_product(x, weight, "torch"), F.linear(F.silu(a) * b, weight))
    for got, want in zip(*(with_gradients(x, weight, backend) for backend in ("triton", "torch"))):
        assert torch.allclose(got, want, atol=1e-5)


def test_rows_that_lie_apart_in_memory():
    x, weight = torch.randn(2, 9, 48), torch.randn(5, 16) / 4
    want = with_gradients(x[..., 8:40].contiguous(), weight, "torch")
    for got, exact in zip(with_gradients(x[..., 8:40], weight, "triton"), want):
        assert torch.allclose(got, exact, atol=1e-5)


def test_single_tokens_of_odd_strides():
    """Of a dimension of one: PyTorch calls such a tensor contiguous, whatever its stride is."""
    x, weight = torch.randn(3, 16).as_strided((3, 1, 16), (16, 48, 1)), torch.randn(5, 8)
    got, want = (gated_product(x, weight, backend) for backend in ("triton", "torch"))
    assert torch.allclose(got, want, atol=1e-5)


def test_autocast_around_it_changes_no_type():
    x, weight = torch.randn(2, 3, 16, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_product(x, weight, "triton")
        assert y.dtype == torch.float32
        y.sum().backward()


def test_half_precision():
    x, weight = torch.randn(2, 9, 48).half(), (torch.randn(5, 24) / 5).half()
    want = with_gradients(x.float(), weight.float(), "torch")
    for got, exact in zip(with_gradients(x, weight, "triton"), want):
        assert got.dtype == torch.float16
        error = (got.float() - exact).norm() / exact.norm()
        assert float(error.detach()) < 2e-3


def test_only_the_input_is_kept():
    """Of activations: SiLU and the product are computed anew."""
    x, weight = torch.randn(2, 9, 48, requires_grad=True), torch.randn(5, 24, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_product(x, weight, "triton")
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()


def test_a_frozen_weight():
    x, weight = torch.randn(2, 9, 48, requires_grad=True), torch.randn(5, 24)
    got, want = (
        torch.autograd.grad(gated_product(x, weight, backend).sum(), x)[0]
        for backend in ("triton", "torch")
    )
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_shapes_that_disagree(backend):
    x, weight = torch.randn(2, 9, 16), torch.randn(5, 8)
    match = r"x has shape \[2, 9, 15\]; it must be \[B, T, 2F\], whose last width is even"
    for narrow in (weight, weight[:, :7]):
        with pytest.raises(ValueError, match=match):
            gated_product(x[..., :15], narrow, backend)
    with pytest.raises(ValueError, match=r"x has shape \[9, 16\]; it must be \[B, T, 2F\]"):
        gated_product(x[0], weight, backend)
    for wrong, shape in ((weight[:, :7], r"\[5, 7\]"), (weight[0], r"\[8\]")):
        match = rf"weight has shape {shape}, expected \[N, 8\] for x of shape \[2, 9, 16\]"
        with pytest.raises(ValueError, match=match):
            gated_product(x, wrong, backend)


def test_are_operators():
    from attamba.ops.swiglu import triton as module

    x, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    torch.library.opcheck(module.gated_product_triton, (x, weight))
    torch.library.opcheck(module.gate_backward, (x.detach(), torch.randn(2, 5, 8)))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_feed_forward_part_takes_it(monkeypatch, autocast):
    """As on a GPU; and its last product as a module where a hook waits there."""
    layer, x = SwiGLU(16, 24), torch.randn(2, 5, 16)
    taken: list[str] = []

    def gated(x: Tensor, weight: Tensor) -> Tensor:
        taken.append("gated")
        return gated_product(x, weight, "triton")

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = layer(x)
        assert not taken
        monkeypatch.setattr("attamba.modules.layers.choose", lambda *_: "triton")
        monkeypatch.setattr("attamba.modules.layers.gated_product", gated)
        got = layer(x)
        assert taken == ["gated"] and got.dtype == want.dtype
        assert torch.allclose(got, want, rtol=2e-2, atol=3e-2 if autocast else 1e-6)
        seen: list[tuple[int, ...]] = []
        hook = layer.w2.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
        assert torch.equal(layer(x), want)
        hook.remove()
        forward = layer.w2.forward
        layer.w2.forward = lambda hidden: seen.append(hidden.shape) or forward(hidden)
        assert torch.equal(layer(x), want)
    assert taken == ["gated"] and seen == [(2, 5, 24)] * 2
