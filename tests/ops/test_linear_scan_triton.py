"""The kernels of the linear scan in Triton's interpreter: any machine, tiny sizes."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from scanning import assert_near, exact, linear_inputs, run_linear

from attamba.ops import linear_scan

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Memory that is not written to is NaN; small tiles, of which a piece may be one."""
    module = import_module("attamba.ops.linear_scan.triton")
    monkeypatch.setattr(module, "TILE", 4)
    monkeypatch.setattr(module, "WIDTH", 4)
    monkeypatch.setattr(module, "SHORTEST", 1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(inputs, starts, bound=2e-5) -> None:
    got = run_linear(inputs, starts, "triton")
    assert got["h"].dtype == inputs["b"].dtype
    assert_near(got, run_linear(exact(inputs), starts, "reference"), bound)


# 5 channels are two blocks for each of 2 rows; a row is cut into so many pieces as below.
@pytest.mark.parametrize("seq, programs, pieces", [(2, 4, 1), (7, 4, 1), (17, 12, 3), (16, 99, 4)])
def test_equals_the_recurrence(monkeypatch, seq, programs, pieces):
    module = import_module("attamba.ops.linear_scan.triton")
    monkeypatch.setattr(module, "PROGRAMS", programs)
    inputs, starts = linear_inputs(seq), torch.rand(2, seq) < 0.15
    assert module._Call(inputs["a"], inputs["b"], starts).grid == (pieces, 2, 2)
    check(inputs, starts)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_start_and_every_token_a_start(rate):
    check(linear_inputs(9, 1), torch.rand(1, 9) < rate)


def test_one_row_of_starts_for_several_and_slices():
    inputs = linear_inputs(9)
    inputs |= {"a": torch.rand(2, 9, 9)[..., 2:7], "b": torch.randn(5, 9, 2).permute(2, 1, 0)}
    check(inputs, torch.rand(1, 9) < 0.2)


def test_float16():
    check(linear_inputs(9, dtype=torch.float16), torch.rand(2, 9) < 0.1, 2e-3)


def test_the_operator_keeps_its_promises():
    module = import_module("attamba.ops.linear_scan.triton")
    leaves = {n: t.requires_grad_() for n, t in linear_inputs(3, 1).items()}
    starts = torch.rand(1, 3) < 0.2
    inputs = (leaves["a"], leaves["b"], starts, leaves["initial_state"])
    torch.library.opcheck(
        module.scan_forward, inputs, test_utils=("test_schema", "test_faketensor")
    )


def test_a_single_token_and_nothing_at_all_take_no_kernel():
    for batch, seq in ((2, 1), (2, 0), (0, 5)):
        inputs, starts = linear_inputs(seq, batch), torch.zeros(seq, dtype=torch.bool)
        h = linear_scan(**inputs, starts=starts, backend="triton")
        assert torch.equal(h, linear_scan(**inputs, starts=starts, backend="torch"))
