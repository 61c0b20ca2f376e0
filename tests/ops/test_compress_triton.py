"""The kernels of compressors and scan in Triton's interpreter: any machine, tiny sizes.

The interpreter computes in numpy, where a bfloat16 product is silently wrong, so float32 and
float16 stand for all. What only a compiler can break is tested in tests/gpu.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from scanning import (
    assert_near,
    chunk_starts,
    compress_inputs,
    exact,
    run_compress,
    run_scan,
    scan_inputs,
)

from attamba.ops import chunk_scan, compress
from attamba.ops.chunking import BOUNDARIES, make_boundary, make_span

pytest.importorskip("triton")
OPTIONS = {"state_dim": 8, "eps": 1e-5}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that is not written to is NaN, so what is forgotten shows; short sums of states.

    Whole chunks go through their kernels in float32 too, where the smallest error shows.
    """
    monkeypatch.setattr(import_module("attamba.ops.chunk_scan.triton"), "GROUP", 2)
    module = import_module("attamba.ops.compress.triton")
    monkeypatch.setattr(module, "fits_a_tile", lambda longest, dtype: longest <= 16)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(inputs, starts, bound=2e-5, **options) -> None:
    options = {**OPTIONS, **options}
    got = run_compress(inputs, starts, "triton", **options)
    assert got["y"].dtype == inputs["proj"].dtype
    want = run_compress(exact(inputs), starts, "reference", **options)
    assert_near(got, want, bound)


@pytest.mark.parametrize("seq, chunk_size", [(1, 8), (2, 3), (31, 1), (33, 3), (33, 8)])
def test_short_chunks(seq, chunk_size):
    inputs = compress_inputs(seq)
    check(inputs, chunk_starts(seq, chunk_size, 2, packed=chunk_size > 1), longest=chunk_size)


@pytest.mark.parametrize("longest", [13, 16])
def test_a_chunk_in_a_tile_of_its_own(longest):
    inputs = compress_inputs(50, 1, 1, dtype=torch.float16)
    check(inputs, chunk_starts(50, longest), bound=1e-2, longest=longest)


@pytest.mark.parametrize("longest", [None, 100])
def test_chunks_longer_than_a_tile_pass_states(longest):
    check(compress_inputs(140, 1, 1), chunk_starts(140, 90), longest=longest)


@pytest.mark.parametrize(
    "heads, width, state_dim, taps", [(1, 16, 16, 1), (3, 5, 3, 2), (2, 8, 8, 9)]
)
def test_odd_sizes(heads, width, state_dim, taps):
    inputs = compress_inputs(40, 2, heads, width, state_dim, taps)
    check(inputs, chunk_starts(40, 7), longest=7, state_dim=state_dim)


def test_half_precision():
    check(compress_inputs(50, 1, dtype=torch.float16), chunk_starts(50, 8), bound=1e-2, longest=8)


def test_inputs_that_are_slices():
    inputs = compress_inputs(33)
    wide = torch.randn(2, 33, 200)
    inputs["proj"] = wide[:, :, 3 : 3 + inputs["proj"].shape[2]]
    check(inputs, chunk_starts(33, 8), longest=8)


def test_results_are_the_same_on_every_run():
    inputs, starts = compress_inputs(40, 1, 1), chunk_starts(40, 8)
    first, second = (run_compress(inputs, starts, "triton", **OPTIONS, longest=8) for _ in "ab")
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("seq, rate", [(2, 0.0), (33, 1.0), (100, 0.0), (100, 0.03)])
def test_scan(seq, rate):
    inputs, starts = scan_inputs(seq, heads=2), torch.rand(2, seq) < rate
    got = run_scan(inputs, starts, "triton")
    assert got["state"].dtype == torch.float32
    assert_near(got, run_scan(inputs, starts, "reference"), 2e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.float16, 3e-3)])
def test_scan_of_odd_sizes_without_skip_and_state(dtype, bound):
    inputs = scan_inputs(70, 1, heads=3, groups=1, width=5, state_dim=3, dtype=dtype)
    del inputs["D"], inputs["initial_state"]
    starts = torch.rand(1, 70) < 0.05
    want = run_scan(exact(inputs), starts, "reference")
    assert_near(run_scan(inputs, starts, "triton"), want, bound)


def test_scan_in_halves_chained_by_the_state_is_the_whole():
    inputs, starts = scan_inputs(65, heads=2), torch.rand(2, 65) < 0.05
    want, last = chunk_scan(**inputs, starts=starts, return_final_state=True, backend="triton")
    inputs["starts"] = starts
    timed, parts = {"x", "dt", "B", "C", "starts"}, []
    for cut in (slice(0, 40), slice(40, 65)):
        part = {n: t[:, cut] if n in timed else t for n, t in inputs.items()}
        y, inputs["initial_state"] = chunk_scan(**part, return_final_state=True, backend="triton")
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), want, atol=1e-5)
    assert torch.allclose(inputs["initial_state"], last, atol=1e-5)


def test_scan_with_extreme_decays():
    inputs = scan_inputs(70, 1, 1, 1)
    inputs["dt"] = torch.ones_like(inputs["dt"])
    for rate in (-1e4, -1e-4, 0.0):
        inputs["A"] = torch.full_like(inputs["A"], rate)
        got = run_scan(inputs, torch.zeros(1, 70).bool(), "triton")
        assert_near(got, run_scan(inputs, torch.zeros(1, 70).bool(), "reference"), 1e-3)


def test_operators_keep_their_promises():
    """Schema, fake tensors, autograd registration."""
    from attamba.ops.chunk_scan.triton import scan_forward
    from attamba.ops.compress.triton import compress_backward, compress_forward

    leaves = {n: t.requires_grad_() for n, t in compress_inputs(9, 1, 1).items()}
    inputs = (*leaves.values(), chunk_starts(9, 4))
    torch.library.opcheck(compress_forward, (*inputs, 8, 1e-5))
    inputs = tuple(t.detach() for t in inputs)
    y_k, y_v, rstd = compress_forward(*inputs, 8, 1e-5)
    torch.library.opcheck(compress_backward, (y_v, y_k, *inputs, y_k, y_v, rstd, 8))
    leaves = {n: t.requires_grad_() for n, t in scan_inputs(9, 1, 2, 1).items()}
    state, D = leaves.pop("initial_state"), leaves.pop("D")
    torch.library.opcheck(scan_forward, (*leaves.values(), chunk_starts(9, 4), D, state))


@pytest.mark.parametrize("longest", [8, None])
def test_compiled_for_any_length(longest):
    torch._dynamo.reset()
    calls = 0

    def backend(graph, example_inputs):
        nonlocal calls
        calls += 1
        return graph.forward

    compiled = torch.compile(compress, fullgraph=True, backend=backend)
    for seq in (9, 20, 33):
        inputs, starts = compress_inputs(seq, heads=1), chunk_starts(seq, 8)
        for tensor in (inputs["proj"], starts):
            torch._dynamo.mark_dynamic(tensor, 1)
        options = {**OPTIONS, "longest": longest, "backend": "triton"}
        got = compiled(**inputs, starts=starts, **options)
        want = compress(**inputs, starts=starts, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert calls == 1
    torch._dynamo.reset()


OPTIONS_OF = {"separator": {"tokens": [1, 2], "max_chunk": 9}, "budget": {"max_chunks": 9}}


@pytest.mark.parametrize("name", [n for n, p in BOUNDARIES.items() if n != "given" and p.causal])
@pytest.mark.parametrize("sink", [False, True])
def test_no_chunk_is_longer_than_its_policy_says(name, sink):
    seq, draw = 500, torch.tensor(3)
    policy = make_boundary(
        {"type": name, **OPTIONS_OF.get(name, {})},
        chunk_size=6, layer_idx=1, n_layers=3, n_kv_heads=2, sink=sink,
    )  # fmt: skip
    if policy.longest is None:
        assert name in ("random", "budget")
        return
    ids, documents = torch.randint(20, (2, seq)), (torch.rand(2, seq) < 0.01).long().cumsum(1)
    for doc_ids in (None, documents):
        span = make_span(seq, ids.device, tokens=ids, doc_ids=doc_ids, draw=draw)
        ends, _ = policy(span)
        for row in ends.flatten(0, 1):
            last = torch.cat([torch.tensor([-1]), row.nonzero().flatten()])
            assert last.diff().max() <= policy.longest or doc_ids is not None
        starts = torch.zeros(ends.shape[0], seq, dtype=torch.bool)
        starts[:, 1:] = ends[:, 0, :-1]
        starts = starts | (span.positions == 0)
        for row in starts:
            assert row.nonzero().flatten().diff().max() <= policy.longest
