"""The product of few rows: every backend against plain float32."""

from __future__ import annotations

import pytest
import torch

from attamba.ops.backends import interpreted
from attamba.ops.thin_linear import Norm, normed_linear, thin_linear

kernel = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
BACKENDS = ["torch", pytest.param("triton", marks=kernel)]


def near(got: torch.Tensor, want: torch.Tensor, limit: float) -> bool:
    return float((got.float() - want.float()).norm() / want.float().norm()) < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    "rows, parts, inputs, outputs", [(1, 0, 40, 6), (3, 2, 96, 34), (20, 0, 600, 34)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backends_are_the_reference(backend, norm, gate, rows, parts, inputs, outputs, dtype):
    sides = (parts,) if parts else ()
    x = torch.randn(rows, *sides, inputs, dtype=dtype)
    weight = (torch.randn(*sides, outputs, inputs) * inputs**-0.5).to(dtype)
    options = {"norm": Norm(torch.randn(*sides, inputs, dtype=dtype), 1e-3) if norm else None}
    options["gate"] = gate
    shape = (rows, *sides, outputs // 2 if gate else outputs)
    for residual in (None, torch.randn(shape, dtype=dtype)):
        got = thin_linear(x, weight, residual=residual, backend=backend, **options)
        want = thin_linear(x, weight, residual=residual, backend="reference", **options)
        assert got.shape == shape and got.dtype == dtype
        assert near(got, want, 1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_spread_out_and_more_than_a_tile(backend):
    """Views of a wider matrix, rows and outputs that fill no tile, inputs of several."""
    x = torch.randn(70, 300)[:, 20:250]
    weight, gain = torch.randn(50, 230) / 15, torch.rand(230)
    residual = torch.randn(70, 60)[:, :50]
    norm = Norm(gain, 1e-5)
    got = thin_linear(x, weight, norm=norm, residual=residual, backend=backend)
    want = thin_linear(x, weight, norm=norm, residual=residual, backend="reference")
    assert near(got, want, 1e-5)
    made, normed = normed_linear(x, weight, norm, backend=backend)
    assert near(normed, torch.nn.functional.rms_norm(x, (230,), gain, 1e-5), 1e-5)
    assert near(made, normed @ weight.t(), 1e-5)


def test_shapes_that_disagree():
    x, weight = torch.zeros(2, 8), torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"x \[2, 8\] and weight \[6, 7\]"):
        thin_linear(x, weight[:, :7])
    with pytest.raises(ValueError, match="x has 2 parts and weight 3"):
        thin_linear(torch.zeros(2, 2, 8), torch.zeros(3, 6, 8))
    with pytest.raises(ValueError, match=r"norm.gain is \[7\], expected \[8\]"):
        thin_linear(x, weight, norm=Norm(torch.ones(7), 1e-5))
    with pytest.raises(ValueError, match="halves the outputs, but weight has 5 rows"):
        thin_linear(x, weight[:5], gate=True)
    with pytest.raises(ValueError, match=r"residual is \[2, 5\], expected \[2, 6\]"):
        thin_linear(x, weight, residual=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"x has shape \[2, 2, 8\]; it must be \[R, K\]"):
        normed_linear(torch.zeros(2, 2, 8), torch.zeros(2, 6, 8), Norm(torch.ones(2, 8), 1e-5))


@kernel
def test_the_rotary_table_of_a_step():
    from attamba.ops.rotary import _kept_frequencies, rotary_table
    from attamba.ops.rotary.triton import step_table_triton

    positions = torch.tensor([[0], [5], [200_003], [8_000_000]])
    got = step_table_triton(positions, _kept_frequencies(24, 1e4, positions.device))
    for ours, want in zip(got, rotary_table(positions, 24, 1e4)):
        assert ours.shape == want.shape and torch.allclose(ours, want, rtol=0, atol=1e-6)
