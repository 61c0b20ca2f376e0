"""Linear scan: the vectorised backend against the plain recurrence, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from scanning import assert_near, exact, linear_inputs, run_linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attamba.ops import linear_scan


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _check(inputs: dict[str, Tensor], starts: Tensor, bound: float = 1e-5) -> None:
    got = run_linear(inputs, starts, "torch")
    assert got["h"].dtype == inputs["b"].dtype and got["state"].dtype == torch.float32
    for name, tensor in inputs.items():
        assert got[f"d{name}"].dtype == tensor.dtype
    assert_near(got, run_linear(exact(inputs), starts, "reference"), bound)


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5, 31, 63, 64, 65, 1000])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_equals_the_recurrence(seq, rate):
    _check(linear_inputs(seq), torch.rand(2, seq) < rate)


def test_the_reference_by_hand():
    a, b = torch.tensor([0.5, 0.25, 2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    starts = torch.tensor([False, False, True, False])
    for backend in ("reference", "torch"):
        h, state = linear_scan(
            a[None, :, None], b[None, :, None], starts, torch.tensor([[8.0]]), True, backend
        )
        assert h.flatten().tolist() == [5.0, 3.25, 3.0, 5.5] and state.item() == 5.5


def test_starts_for_all_rows_at_once_and_no_initial_state():
    inputs, starts = linear_inputs(65), torch.arange(65) % 7 == 3
    each = linear_scan(**inputs, starts=starts.expand(2, -1))
    assert torch.equal(linear_scan(**inputs, starts=starts), each)
    del inputs["initial_state"]
    zeros = linear_scan(**inputs, starts=starts, initial_state=torch.zeros(2, 5))
    assert torch.equal(linear_scan(**inputs, starts=starts), zeros)


def test_a_decay_of_one_sums_and_a_decay_of_zero_forgets():
    b, none = torch.randn(2, 70, 3), torch.zeros(70, dtype=torch.bool)
    summed = linear_scan(torch.ones_like(b), b, none)
    assert torch.allclose(summed, b.cumsum(1), atol=1e-5)
    assert torch.equal(linear_scan(torch.zeros_like(b), b, none), b)
    assert torch.equal(linear_scan(torch.ones_like(b), b, ~none), b)


def test_long_memories_are_kept():
    """A state of long ago comes back whole: decays near 1 are neither lost nor rounded up."""
    seq = 20_000
    a, b = torch.full((1, seq, 1), 1 - 1e-5), torch.zeros(1, seq, 1)
    _, state = linear_scan(a, b, torch.zeros(seq).bool(), torch.ones(1, 1), True)
    assert state.item() == pytest.approx(float(a[0, 0, 0].double() ** seq), rel=1e-3)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, bound):
    _check(linear_inputs(65, dtype=dtype), torch.rand(2, 65) < 0.1, bound)


@pytest.mark.parametrize("cut", [1, 32, 50, 64])
def test_halves_chained_by_the_state_are_the_whole(cut):
    inputs, starts = linear_inputs(65), torch.rand(2, 65) < 0.1
    a, b = inputs["a"], inputs["b"]
    h, last = linear_scan(**inputs, starts=starts, return_final_state=True)
    h1, between = linear_scan(
        a[:, :cut], b[:, :cut], starts[:, :cut], inputs["initial_state"], True
    )
    h2, state = linear_scan(a[:, cut:], b[:, cut:], starts[:, cut:], between, True)
    assert torch.allclose(torch.cat([h1, h2], 1), h, atol=1e-5)
    assert torch.allclose(state, last, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("batch, seq", [(2, 0), (0, 5)])
def test_empty_inputs(backend, batch, seq):
    inputs = linear_inputs(seq, batch)
    starts = torch.zeros(seq, dtype=torch.bool)
    h, state = linear_scan(**inputs, starts=starts, return_final_state=True, backend=backend)
    assert h.shape == (batch, seq, 5) and state.shape == (batch, 5)
    if not seq:
        assert torch.equal(state, inputs["initial_state"])


def test_strided_inputs():
    inputs, starts = linear_inputs(65), torch.rand(2, 65) < 0.1
    wide = torch.randn(2, 65, 12)
    inputs |= {"b": wide[..., 3:8], "a": torch.rand(5, 65, 2).permute(2, 1, 0)}
    assert not inputs["b"].is_contiguous()
    want = linear_scan(**inputs, starts=starts, backend="reference")
    assert torch.allclose(linear_scan(**inputs, starts=starts), want, atol=1e-5)


def test_compiled_equals_eager_at_several_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    for seq in (70, 33, 34):
        inputs, starts = linear_inputs(seq), torch.rand(2, seq) < 0.1
        results = []
        for function in (linear_scan, compiled):
            a = inputs["a"].clone().requires_grad_()
            h, state = function(**{**inputs, "a": a}, starts=starts, return_final_state=True)
            results.append((h, state, torch.autograd.grad(h.square().sum(), a)[0]))
        for got, want in zip(*results):
            assert torch.allclose(got, want, atol=1e-5)
    torch._dynamo.reset()


def test_the_operator_keeps_its_promises():
    from attamba.ops.linear_scan.torch import _forward

    leaves = {n: t.requires_grad_() for n, t in linear_inputs(9).items()}
    starts = torch.rand(1, 9) < 0.2
    torch.library.opcheck(_forward, (leaves["a"], leaves["b"], starts, leaves["initial_state"]))


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_tokens():
    from attamba.ops.linear_scan.torch import _scan

    def calls(seq: int) -> int:
        with _Count() as count:
            _scan(torch.rand(1, seq, 2), torch.rand(1, seq, 2))
        return count.calls

    per_round = calls(2048) - calls(1024)
    assert calls(16_384) == calls(1024) + 4 * per_round


@pytest.mark.parametrize(
    "change, text",
    [
        ({"backend": "torhc"}, "backend='torhc' must be one of: auto, torch, triton, reference"),
        ({"a": torch.zeros(2, 9, 5)}, r"a has shape \[2, 9, 5\], expected \[2, 10, 5\] for b of"),
        ({"b": torch.zeros(2, 10)}, r"b has shape \[2, 10\], expected \[B, T, C\]"),
        ({"starts": torch.zeros(9).bool()}, r"starts has shape \[1, 9\], expected \[2, 10\]"),
        ({"initial_state": torch.zeros(5)}, r"initial_state has shape \[5\], expected \[2, 5\]"),
    ],
)
def test_errors(change, text):
    inputs = {**linear_inputs(10), "starts": torch.zeros(10, dtype=torch.bool)}
    with pytest.raises(ValueError, match=text):
        linear_scan(**{**inputs, **change})
