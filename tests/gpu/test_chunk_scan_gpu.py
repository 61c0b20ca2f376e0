"""The kernels of compressors and scan on CUDA: outputs and every gradient against the reference."""

from __future__ import annotations

import pytest
import torch
from drawing import HEADS, VOCAB, build
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

DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
LENGTHS = [1, 2, 31, 33, 63, 64, 65, 300]


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check_compress(inputs, starts, longest, peer="torch", **options) -> None:
    options = {"state_dim": 8, "longest": longest, **options}
    got = run_compress(inputs, starts, "triton", **options)
    want = run_compress(exact(inputs), starts, peer, **options)
    assert got["y"].dtype == inputs["proj"].dtype
    assert_near(got, want, DTYPES[inputs["proj"].dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 24, 64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_compress_is_vectorised_torch(dtype, seq, chunk_size, packed):
    starts = chunk_starts(seq, chunk_size, 2, packed, "cuda")
    check_compress(compress_inputs(seq, dtype=dtype, device="cuda"), starts, chunk_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("longest", [8, None])
def test_compress_is_its_reference(dtype, longest):
    inputs = compress_inputs(100, dtype=dtype, device="cuda")
    check_compress(inputs, chunk_starts(100, 8, 2, True, "cuda"), longest, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, width, state_dim", [(8, 32, 32), (3, 5, 4), (2, 64, 64), (4, 16, 128)]
)
@pytest.mark.parametrize("chunk_size", [4, 24])
def test_compress_of_any_size(dtype, heads, width, state_dim, chunk_size):
    inputs = compress_inputs(200, 1, heads, width, state_dim, dtype=dtype, device="cuda")
    starts = chunk_starts(200, chunk_size, device="cuda")
    check_compress(inputs, starts, chunk_size, state_dim=state_dim)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_compress_of_slices(taps):
    inputs = compress_inputs(77, taps=taps, device="cuda")
    wide = torch.randn(2, 77, 200, device="cuda")
    inputs["proj"] = wide[:, :, 3 : 3 + inputs["proj"].shape[2]]
    check_compress(inputs, chunk_starts(77, 8, device="cuda"), 8)


def test_many_tokens():
    """More than one tile for every program, and results that do not change from run to run."""
    inputs = compress_inputs(40_000, 1, 8, 32, 32, dtype=torch.bfloat16, device="cuda")
    starts = chunk_starts(40_000, 8, packed=True, device="cuda")
    check_compress(inputs, starts, 8, state_dim=32)
    options = {"state_dim": 32, "longest": 8}
    runs = [run_compress(inputs, starts, "triton", **options) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(other[n], runs[0][n]) for n in runs[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [2, 31, 33, 64, 65, 300, 1000])
@pytest.mark.parametrize("rate", [0.0, 0.02, 1.0])
def test_scan_is_vectorised_torch(dtype, seq, rate):
    inputs = scan_inputs(seq, dtype=dtype, device="cuda")
    starts = torch.rand(2, seq, device="cuda") < rate
    want = run_scan(exact(inputs), starts, "torch")
    assert_near(run_scan(inputs, starts, "triton"), want, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, groups, width, state_dim",
    [
        *((16, 2, 32, 32), (3, 1, 5, 4), (2, 2, 64, 128)),
        *((4, 2, 32, 128), (4, 1, 16, 128), (4, 2, 32, 64), (4, 1, 16, 64)),
    ],
)
def test_scan_of_any_size(dtype, heads, groups, width, state_dim):
    inputs = scan_inputs(150, 1, heads, groups, width, state_dim, dtype, "cuda")
    starts = torch.rand(1, 150, device="cuda") < 0.02
    want = run_scan(exact(inputs), starts, "reference")
    assert_near(run_scan(inputs, starts, "triton"), want, DTYPES[dtype])


def test_auto_is_triton_and_operators_keep_their_promises():
    from attamba.ops.chunk_scan.triton import scan_forward
    from attamba.ops.compress.triton import compress_forward

    leaves = {n: t.requires_grad_() for n, t in compress_inputs(9, 1, device="cuda").items()}
    starts = chunk_starts(9, 4, device="cuda")
    options = {"starts": starts, "state_dim": 8, "longest": 4}
    pairs = zip(compress(**leaves, **options), compress(**leaves, **options, backend="triton"))
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.library.opcheck(compress_forward, (*leaves.values(), starts, 8, 1e-5))
    leaves = {n: t.requires_grad_() for n, t in scan_inputs(9, 1, device="cuda").items()}
    auto = chunk_scan(**leaves, starts=starts)
    assert torch.equal(auto, chunk_scan(**leaves, starts=starts, backend="triton"))
    state, D = leaves.pop("initial_state"), leaves.pop("D")
    torch.library.opcheck(scan_forward, (*leaves.values(), starts, D, state))


@pytest.mark.parametrize("scope", ["chunk", "sequence"])
def test_a_training_step_of_the_model_is_the_torch_backend_s(scope):
    """Compiled without a graph break, for several lengths, against eager vectorised PyTorch."""
    options = {"state_dim": 4, "ssm_heads": 2, "ssm_scope": scope, "leading_tokens": 8}
    models = [
        build({"type": "attamba", "n_heads": HEADS, **options, "backend": backend}).cuda()
        for backend in ("triton", "torch")
    ]
    forwards = [torch.compile(models[0].requires_grad_(True), fullgraph=True), models[1]]
    models[1].requires_grad_(True)
    for seq in (33, 130):
        ids, results = torch.randint(VOCAB, (2, seq), device="cuda"), []
        for model, forward in zip(models, forwards):
            model.zero_grad()
            torch.nn.functional.cross_entropy(forward(ids).flatten(0, 1), ids.flatten()).backward()
            results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        assert_near(*results, 1e-3)
