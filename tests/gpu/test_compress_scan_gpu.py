"""The compressors' kernels that pass states between tiles, on CUDA, against float32 PyTorch."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from scanning import assert_near, compress_inputs, exact, run_compress

from attamba.ops import compress

pytest.importorskip("triton")
module = import_module("attamba.ops.compress.scan.triton")
DTYPES = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
ONE, MANY = 0, 10**6
"""Programs of a multiprocessor: whole rows, or segments as short as they get."""


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(inputs, starts, state_dim=8, peer="torch") -> None:
    options = {"state_dim": state_dim}
    got = run_compress(inputs, starts, "triton", **options)
    assert got["y"].dtype == inputs["proj"].dtype
    want = run_compress(exact(inputs), starts, peer, **options)
    assert_near(got, want, DTYPES[inputs["proj"].dtype])


def starts_of(kind: str, seq: int) -> torch.Tensor:
    """bool [1 or 2, T] of a kind; "border": at, before and after the borders of tiles."""
    if kind == "border":
        at = torch.arange(seq, device="cuda")
        near = [(at % 64 == offset) & (at // 64 % 3 == i) for i, offset in enumerate((63, 0, 1))]
        return torch.stack(near).any(0)[None]
    rate = {"none": 0.0, "some": 0.01, "all": 1.0}[kind]
    return torch.rand(2, seq, device="cuda") < rate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("kind", ["none", "some", "border", "all"])
@pytest.mark.parametrize("programs", [ONE, MANY])
def test_is_vectorised_torch(monkeypatch, dtype, seq, kind, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    check(compress_inputs(seq, dtype=dtype, device="cuda"), starts_of(kind, seq))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [ONE, MANY])
def test_is_its_reference(monkeypatch, dtype, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    starts = torch.rand(2, 200, device="cuda") < 0.02
    check(compress_inputs(200, dtype=dtype, device="cuda"), starts, peer="reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, width, state_dim, taps",
    [(8, 32, 32, 4), (3, 5, 4, 2), (1, 1, 1, 1), (2, 64, 64, 4), (4, 16, 128, 5), (2, 48, 20, 4)],
)
@pytest.mark.parametrize("programs", [ONE, MANY])
def test_of_any_size(monkeypatch, dtype, heads, width, state_dim, taps, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    inputs = compress_inputs(300, 2, heads, width, state_dim, taps, dtype, "cuda")
    check(inputs, torch.rand(2, 300, device="cuda") < 0.01, state_dim)


@pytest.mark.parametrize("columns", [200, 256])
def test_of_slices(columns):
    inputs = compress_inputs(177, dtype=torch.bfloat16, device="cuda")
    wide = torch.randn(2, 177, columns, device="cuda", dtype=torch.bfloat16)
    inputs["proj"] = wide[:, :, 3 : 3 + inputs["proj"].shape[2]]
    check(inputs, torch.rand(1, 177, device="cuda") < 0.02)


@pytest.mark.parametrize("programs", [ONE, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(monkeypatch, programs, dtype):
    """Results are right, and do not change from run to run."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    inputs = compress_inputs(8000, 4, 8, 32, 32, dtype=dtype, device="cuda")
    starts = torch.rand(4, 8000, device="cuda") < 1e-3
    check(inputs, starts, 32)
    runs = [run_compress(inputs, starts, "triton", state_dim=32) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(other[n], runs[0][n]) for n in runs[0])


def test_one_compiled_graph_and_kernels_serve_every_length():
    torch._dynamo.reset()
    graphs = 0

    def backend(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    kernels = (module.kernels.segment_outputs, module.backward.scan_gradients)
    compiled = torch.compile(compress, fullgraph=True, backend=backend)
    counts = set()
    for batch, seq in ((2, 65), (3, 130), (2, 1000), (5, 2048)):
        inputs = compress_inputs(seq, batch, dtype=torch.bfloat16, device="cuda")
        starts = torch.rand(batch, seq, device="cuda") < 0.01
        for tensor in (inputs["proj"], starts):
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(tensor, dim)
        leaves = {n: t.requires_grad_() for n, t in inputs.items()}
        results = []
        for run in (compiled, compress):
            y = torch.cat(run(**leaves, starts=starts, state_dim=8), -1)
            results.append([y, *torch.autograd.grad(y.float().sum(), list(leaves.values()))])
        assert all(torch.equal(a, b) for a, b in zip(*results))
        device = torch.cuda.current_device()
        counts.add(tuple(len(kernel.device_caches[device][0]) for kernel in kernels))
    assert graphs == 1 and len(counts) == 1
    torch._dynamo.reset()


def test_operators_keep_their_promises():
    inputs = compress_inputs(70, 1, dtype=torch.bfloat16, device="cuda")
    leaves = [t.requires_grad_() for t in inputs.values()]
    starts = torch.rand(1, 70, device="cuda") < 0.05
    torch.library.opcheck(module.scan_forward, (*leaves, starts, 8, 1e-5, True))
