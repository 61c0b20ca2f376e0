"""The product of few rows on CUDA: the kernel against plain float32, alone and in a chain."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from attamba.ops.rotary import rotary_table, step_table
from attamba.ops.thin_linear import Norm, normed_linear, thin_linear

CUDA = torch.device("cuda")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(1, 512, 1680), (8, 1536, 512), (17, 200, 70), (32, 512, 3072), (130, 4096, 96)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows, inputs, outputs", SHAPES)
def test_the_kernel_is_the_reference(dtype, rows, inputs, outputs):
    for parts, with_norm, gate, with_residual in itertools.product((0, 2), *[(False, True)] * 3):
        sides = (parts,) if parts else ()
        x = torch.randn(rows, *sides, inputs, device=CUDA, dtype=dtype)
        weight = torch.randn(*sides, outputs, inputs, device=CUDA, dtype=dtype) * inputs**-0.5
        shape = (rows, *sides, outputs // 2 if gate else outputs)
        options = {
            "norm": Norm(torch.randn(*sides, inputs, device=CUDA, dtype=dtype), 1e-5)
            if with_norm
            else None,
            "residual": torch.randn(shape, device=CUDA, dtype=dtype) if with_residual else None,
            "gate": gate,
        }
        got = thin_linear(x, weight, backend="triton", **options)
        want = thin_linear(x, weight, backend="reference", **options)
        assert got.shape == shape and relative(got, want) < LIMITS[dtype], (parts, gate)


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_normed_input_is_given_too(dtype):
    x, weight = (torch.randn(n, 200, device=CUDA, dtype=dtype) for n in (5, 50))
    gain = torch.randn(200, device=CUDA, dtype=dtype)
    made, normed = normed_linear(x, weight, Norm(gain, 1e-5), backend="triton")
    want = torch.nn.functional.rms_norm(x.float(), (200,), gain.float(), 1e-5)
    assert relative(normed, want) < LIMITS[dtype]
    assert relative(made, normed.float() @ weight.float().t()) < LIMITS[dtype]


def test_a_long_chain_in_a_graph():
    """Kernels that start while their predecessor ends see all that earlier ones wrote."""
    torch.manual_seed(0)
    weights = [torch.randn(512, 512, device=CUDA, dtype=torch.bfloat16) / 23 for _ in range(100)]
    norm = Norm(torch.ones(512, device=CUDA, dtype=torch.bfloat16), 1e-5)
    x = torch.randn(8, 512, device=CUDA, dtype=torch.bfloat16)

    def chain(backend: str) -> torch.Tensor:
        first, out = x, x
        for i, weight in enumerate(weights):
            residual = first if i % 3 else out  # what the one before made, or an older one
            first, out = (
                out,
                thin_linear(out, weight, norm=norm, residual=residual, backend=backend),
            )
        return out

    eager = chain("triton")
    assert relative(eager, chain("torch")) < 3e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain("triton")
    for _ in range(50):
        x.normal_()
        graph.replay()
        assert torch.equal(captured, chain("triton"))


def test_the_rotary_table_of_a_step():
    positions = torch.tensor([[0], [5], [200_003], [8_000_000]], device=CUDA)
    for got, want in zip(step_table(positions, 64, 1e4), rotary_table(positions.cpu(), 64, 1e4)):
        assert got.shape == want.shape
        assert torch.allclose(got.cpu(), want, rtol=0, atol=1e-6)


def test_operators_say_what_they_make():
    importlib.import_module("attamba.ops.thin_linear.triton")  # which registers them
    x, weight = torch.randn(3, 40, device=CUDA), torch.randn(6, 40, device=CUDA)
    gain, residual = torch.randn(40, device=CUDA), torch.randn(3, 3, device=CUDA)
    torch.library.opcheck(torch.ops.attamba.thin_linear, (x, weight, gain, residual, 1e-5, True))
    torch.library.opcheck(torch.ops.attamba.normed_linear, (x, weight, gain, 1e-5))
