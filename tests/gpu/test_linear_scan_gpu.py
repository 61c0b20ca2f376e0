"""The kernels of the linear scan on CUDA: outputs and every gradient against the reference."""

from __future__ import annotations

import pytest
import torch
from scanning import assert_near, exact, linear_inputs, run_linear

from attamba.ops import linear_scan

DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(inputs, starts, peer="torch") -> None:
    got = run_linear(inputs, starts, "triton")
    assert got["h"].dtype == inputs["b"].dtype
    assert_near(got, run_linear(exact(inputs), starts, peer), DTYPES[inputs["b"].dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [1, 2, 31, 33, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("rate", [0.0, 0.02, 1.0])
def test_equals_vectorised_torch(dtype, seq, rate):
    inputs = linear_inputs(seq, channels=200, dtype=dtype, device="cuda")
    check(inputs, torch.rand(2, seq, device="cuda") < rate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [65, 600])
def test_equals_the_recurrence(dtype, seq):
    inputs = linear_inputs(seq, channels=70, dtype=dtype, device="cuda")
    check(inputs, torch.rand(2, seq, device="cuda") < 0.02, "reference")


@pytest.mark.parametrize("batch, channels", [(1, 1), (40, 1000), (3, 64)])
def test_any_number_of_rows_and_channels(batch, channels):
    """Rows cut into many pieces, and rows that are one each."""
    inputs = linear_inputs(1500, batch, channels, device="cuda")
    check(inputs, torch.rand(1, 1500, device="cuda") < 0.01)


def test_slices():
    inputs = linear_inputs(300, 2, 96, device="cuda")
    wide = torch.randn(2, 300, 200, device="cuda")
    inputs |= {"b": wide[..., 3:99], "a": torch.rand(96, 300, 2, device="cuda").permute(2, 1, 0)}
    check(inputs, torch.rand(2, 300, device="cuda") < 0.02)


def test_auto_is_triton_and_does_not_change_from_run_to_run():
    inputs = linear_inputs(4097, 1, 64, device="cuda")
    starts = torch.rand(1, 4097, device="cuda") < 0.01
    auto = linear_scan(**inputs, starts=starts)
    for _ in range(3):
        assert torch.equal(auto, linear_scan(**inputs, starts=starts, backend="triton"))


def test_the_operator_keeps_its_promises():
    from attamba.ops.linear_scan.triton import scan_forward

    leaves = {n: t.requires_grad_() for n, t in linear_inputs(600, 1, device="cuda").items()}
    starts = torch.rand(1, 600, device="cuda") < 0.1
    torch.library.opcheck(scan_forward, (leaves["a"], leaves["b"], starts, leaves["initial_state"]))
