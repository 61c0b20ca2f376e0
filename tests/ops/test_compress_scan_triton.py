"""The compressors' kernels that pass states between tiles, in Triton's interpreter, at tiny sizes.

float32 too, where the smallest error shows; see test_compress_triton.py for what is tested where.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from scanning import assert_near, chunk_starts, compress_inputs, exact, run_compress

from attamba.ops import compress

pytest.importorskip("triton")
module = import_module("attamba.ops.compress.scan.triton")
OPTIONS = {"state_dim": 8, "eps": 1e-5}
ONE, MANY = 0, 64
"""Programs of a multiprocessor: whole rows, or segments as short as they get."""


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that is not written to is NaN; float32 is not sent elsewhere; short sums of states."""
    monkeypatch.setattr(module, "passes_states", lambda *_: True)
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "SPAN", 32)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(inputs, starts, bound=2e-5, **options) -> None:
    options = {**OPTIONS, **options}
    got = run_compress(inputs, starts, "triton", **options)
    assert got["y"].dtype == inputs["proj"].dtype
    assert_near(got, run_compress(exact(inputs), starts, "reference", **options), bound)


# Rows of two tiles or fewer are one segment in any case.
@pytest.mark.parametrize(
    "seq, programs", [*((seq, ONE) for seq in (1, 2, 15, 16, 17)), (70, ONE), (70, MANY)]
)
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_equals_the_recurrence(monkeypatch, programs, seq, rate):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    check(compress_inputs(seq, heads=1), torch.rand(2, seq) < rate)


@pytest.mark.parametrize("programs", [ONE, MANY])
@pytest.mark.parametrize("at", [15, 16, 17, 32])
def test_a_start_at_a_tile_s_border(monkeypatch, programs, at):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    check(compress_inputs(50, 1, 1), (torch.arange(50) == at)[None])


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_many_starts(rate):
    check(compress_inputs(40, heads=1), torch.rand(2, 40) < rate)


@pytest.mark.parametrize("heads, width, state_dim, taps", [(1, 16, 16, 1), (3, 5, 3, 2)])
def test_odd_sizes(heads, width, state_dim, taps):
    inputs = compress_inputs(40, 2, heads, width, state_dim, taps)
    check(inputs, torch.rand(2, 40) < 0.05, state_dim=state_dim)


@pytest.mark.parametrize("programs", [ONE, MANY])
def test_half_precision(monkeypatch, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    inputs = compress_inputs(70, 1, dtype=torch.float16)
    check(inputs, torch.rand(1, 70) < 0.02, bound=1e-2)


def test_tiles_as_they_are(monkeypatch):
    monkeypatch.undo()
    assert not module.passes_states(torch.float32, 8, 16)
    inputs = compress_inputs(140, 1, 1, dtype=torch.float16)
    check(inputs, chunk_starts(140, 90), bound=1e-2, longest=90)


def test_inputs_that_are_slices():
    inputs = compress_inputs(33)
    wide = torch.randn(2, 33, 200)
    inputs["proj"] = wide[:, :, 3 : 3 + inputs["proj"].shape[2]]
    check(inputs, chunk_starts(33, 20))


def test_results_are_the_same_on_every_run_and_without_gradients(monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", MANY)
    inputs, starts = compress_inputs(70, 1, 1), chunk_starts(70, 50)
    first, second = (run_compress(inputs, starts, "triton", **OPTIONS) for _ in "ab")
    assert all(torch.equal(first[n], second[n]) for n in first)
    alone = torch.cat(compress(**inputs, starts=starts, backend="triton", **OPTIONS), -1)
    assert torch.equal(alone, first["y"])


@pytest.mark.parametrize("keep", [False, True])
def test_operators_keep_their_promises(keep):
    inputs = compress_inputs(20, 1, 1)
    leaves = [t.requires_grad_(keep) for t in inputs.values()]
    torch.library.opcheck(module.scan_forward, (*leaves, chunk_starts(20, 9), 8, 1e-5, keep))


def test_compiled_for_any_length_with_gradients():
    torch._dynamo.reset()
    calls = 0

    def backend(graph, example_inputs):
        nonlocal calls
        calls += 1
        return graph.forward

    compiled = torch.compile(compress, fullgraph=True, backend=backend)
    for seq in (9, 20, 33):
        inputs, starts = compress_inputs(seq, heads=1), chunk_starts(seq, 20)
        for tensor in (inputs["proj"], starts):
            torch._dynamo.mark_dynamic(tensor, 1)
        leaves = {n: t.requires_grad_() for n, t in inputs.items()}
        options = {**OPTIONS, "starts": starts, "backend": "triton"}
        results = []
        for run in (compiled, compress):
            y = torch.cat(run(**leaves, **options), -1)
            results.append([y, *torch.autograd.grad(y.sum(), list(leaves.values()))])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert calls == 1
    torch._dynamo.reset()
