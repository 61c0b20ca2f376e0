"""Chunk attention's Triton kernels in Triton's interpreter: any machine, tiny sizes.

The interpreter computes in numpy, where a bfloat16 product is silently wrong, so float32 and
float16 stand for all. What only a compiler can break is tested in tests/gpu.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from attamba.ops import chunk_attention
from attamba.ops.chunk_attention import tiles as tiles_module
from attamba.ops.chunk_attention.tiles import KERNELS, LEAST, TINY, Tiles, override, tiles
from attamba.ops.chunking import document_bounds

pytest.importorskip("triton")
NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(backend: str, tensors: list[Tensor], *options) -> list[Tensor]:
    *qkv, weight = tensors
    qkv = [t.detach().requires_grad_() for t in qkv]
    out = chunk_attention(*qkv, *options, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, qkv, weight)]


def check(tensors: list[Tensor], ends, lead, doc_ids=None, bound=1e-5) -> None:
    got = run("triton", tensors, ends, lead, doc_ids)
    want = run("reference", [t.float() for t in tensors], ends, lead, doc_ids)
    for name, a, b in zip(NAMES, got, want):
        assert a.dtype == tensors[0].dtype and a.isfinite().all(), name
        error = (a.float() - b).norm()
        assert error <= bound * b.norm() or error < bound * 0.1 * b.numel() ** 0.5, name


def inputs(seq, dtype=torch.float32, heads=2, groups=1, width=16, n_queries=None) -> list[Tensor]:
    n_queries = seq if n_queries is None else n_queries
    shapes = ((n_queries, heads), (seq, groups), (seq, groups), (n_queries, heads))
    return [torch.randn(2, t, h, width, dtype=dtype) for t, h in shapes]


@pytest.mark.parametrize("seq", [1, 2, 63, 65])
@pytest.mark.parametrize("lead", [0, 1, 20, None])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_is_its_reference(seq, lead, chunk_size):
    check(inputs(seq), torch.arange(1, seq + 1) % chunk_size == 0, lead)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_queries", [110, 40])
def test_documents_ends_of_heads_and_fewer_queries(per_head, packed, n_queries):
    ends = torch.rand((2, 2, 110) if per_head else (2, 110)) < 0.3
    doc_ids = (torch.rand(2, 110) < 0.04).long().cumsum(1) if packed else None
    check(inputs(110, heads=4, groups=2, n_queries=n_queries), ends, 5, doc_ids)


def test_half_precision_and_odd_widths():
    check(inputs(70, torch.float16, width=24), torch.rand(70) < 0.3, 6, bound=3e-3)


def test_no_ends_is_a_sliding_window():
    check(inputs(70), None, 6)


@pytest.mark.parametrize("rows", [16, 64])
def test_any_tiles(rows):
    """A past of several tiles, whole and partly seen, whatever their size."""
    tensors, ends = inputs(80, heads=1), torch.rand(80) < 0.8
    for kernel in KERNELS:
        with override(kernel, Tiles(rows, 16, 16, 4, 1)):
            check(tensors, ends, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_operator_registration(packed):
    from attamba.ops.chunk_attention.triton import _backward, _forward

    q, k, v, weight = inputs(12)
    ends = (torch.arange(12) % 4 == 3)[None, None]
    doc_ids = (torch.arange(12) > 6).long().expand(2, 12)
    bounds = document_bounds(doc_ids) if packed else (None, None)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(_forward, (*leaves, ends, *bounds, 2, 0.3))
    results = [t.detach() for t in _forward(*leaves, ends, *bounds, 2, 0.3)]
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(_backward, (weight, *plain, *results, *bounds, 2, 0.3))


def test_layers_that_are_compiled_find_documents_once():
    """And the backward pass has them, which would otherwise do so twice for each layer."""
    seen: list[Counter[str]] = []

    def count(graph, _):
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.append(Counter(calls))
        return make_boxed_func(graph.forward)

    def two_layers(q, k, v, doc_ids):
        q = chunk_attention(q, k, v, ends, 2, doc_ids, backend="triton")
        return chunk_attention(q, k, v, ends, 3, doc_ids, backend="triton")

    ends = torch.arange(12) % 4 == 3
    q, k, v, _ = inputs(12)
    doc_ids = (torch.arange(12) > 6).long().expand(2, 12)
    backend = aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )  # as Inductor partitions
    out = torch.compile(two_layers, backend=backend)(q.requires_grad_(), k, v, doc_ids)
    out.sum().backward()
    forward, backward = seen
    assert forward["attamba.chunk_attention_triton.default"] == 2
    assert backward["attamba.chunk_attention_triton_backward.default"] == 2
    scans = ("aten.cummax.default", "aten.cummin.default")
    assert [forward[scan] + backward[scan] for scan in scans] == [1, 1]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 3e-3)])
def test_wide_heads_on_a_chip_of_little_shared_memory(dtype, bound, monkeypatch):
    monkeypatch.setattr(tiles_module, "shared_memory", lambda device: 101_376)
    for kernel in KERNELS:
        assert tiles(kernel, 136, 50, dtype, torch.device("cpu")) in (LEAST[kernel], TINY[kernel])
    check(inputs(50, dtype, width=136), torch.rand(50) < 0.3, 6, bound=bound)


def test_what_it_cannot_do_is_an_error(monkeypatch):
    q, k, v, _ = inputs(5, width=512)
    with pytest.raises(ValueError, match=r"width 512 .* backend='torch'"):
        chunk_attention(q, k, v, None, 1, backend="triton")
    q, k, v, _ = inputs(5)
    with pytest.raises(ValueError, match=r"scale=0\.0 must be above 0"):
        chunk_attention(q, k, v, None, 1, scale=0.0, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' cannot run: the tensors are on cpu"):
        chunk_attention(q, k, v, None, 1, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' must be one of"):
        chunk_attention(q, k, v, None, 1, backend="cuda")
