"""Chunk attention: the vectorised backend against the dense mask, outputs and every gradient."""

from __future__ import annotations

from importlib import import_module
from itertools import product

import pytest
import torch
from measuring import LargestTensor
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attamba.ops import chunk_attention
from attamba.ops.chunk_attention.torch import BLOCK

B, H, G, D = 2, 4, 2, 8
LEADS = [0, 1, 64, None]
ENDS = ["none", "[T]", "[B, T]", "[B, G, T]"]


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what an operator forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _qkv(n_queries, n_keys, heads=H, groups=G, dtype=torch.float32):
    q = torch.randn(B, n_queries, heads, D).to(dtype).requires_grad_()
    k, v = (torch.randn(B, n_keys, groups, D).to(dtype).requires_grad_() for _ in range(2))
    return q, k, v


def _ends(kind: str, seq: int, groups: int = G) -> Tensor | None:
    shapes = {"[T]": (seq,), "[B, T]": (B, seq), "[B, G, T]": (B, groups, seq)}
    return torch.rand(shapes[kind]) < 0.2 if kind in shapes else None


def _documents(seq: int) -> Tensor:
    """Packed documents of some ten tokens whose ids alternate, some of them a token long."""
    return (torch.rand(B, seq) < 0.1).long().cumsum(1) % 2


def _run(qkv, *args, backend: str, **kwargs) -> list[Tensor]:
    """Output and gradients of q, k and v for a fixed random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    out = chunk_attention(*leaves, *args, backend=backend, **kwargs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out.float() * weights).sum(), leaves)]


def _relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm().clamp(min=1e-12)) if want.numel() else 0.0


def _check(qkv, *args, bound: float = 1e-5, **kwargs) -> None:
    got = _run(qkv, *args, backend="torch", **kwargs)
    want = _run([t.float() for t in qkv], *args, backend="reference", **kwargs)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        assert a.dtype == qkv[0].dtype
        # Where every query sees itself alone, dq and dk are rounding errors around zero.
        assert _relative_error(a, b) < bound or (a - b).abs().max() < 1e-5, name


@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 127, 128, 129, 130, 300])
@pytest.mark.parametrize("lead", LEADS)
def test_equals_the_dense_mask(seq, lead):
    for kind, packed in product(ENDS, (False, True)):
        doc_ids = _documents(seq) if packed else None
        _check(_qkv(seq, seq), _ends(kind, seq), lead, doc_ids)


@pytest.mark.parametrize("n_queries, n_keys", [(1, 2), (1, 300), (63, 64), (2, 129), (130, 200)])
@pytest.mark.parametrize("lead", LEADS)
def test_the_queries_are_the_last_positions(n_queries, n_keys, lead):
    for kind, packed in product(ENDS, (False, True)):
        doc_ids = _documents(n_keys) if packed else None
        _check(_qkv(n_queries, n_keys), _ends(kind, n_keys), lead, doc_ids)


@pytest.mark.parametrize("size", [1, 16, 512])
def test_blocks_of_any_size(size, monkeypatch):
    """Devices take queries in blocks of their own size; no result depends on it."""
    monkeypatch.setitem(BLOCK, "cpu", size)
    monkeypatch.setattr(import_module("attamba.ops.chunk_attention.torch"), "MASKED", size)
    for lead, packed in product((4, None), (False, True)):
        doc_ids = _documents(60) if packed else None
        _check(_qkv(50, 60), _ends("[B, G, T]", 60), lead, doc_ids)


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 4), (4, 1), (6, 3)])
def test_grouped_heads(heads, groups):
    ends = _ends("[B, G, T]", 130, groups)
    _check(_qkv(130, 130, heads, groups), ends, 5)
    _check(_qkv(130, 130, heads, groups), ends, None)


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 200])
def test_regular_chunks(chunk_size):
    ends = (torch.arange(300) + 1) % chunk_size == 0
    _check(_qkv(300, 300), ends, 8)


def test_chunk_ends_in_one_head_alone():
    ends = torch.zeros(B, G, 150, dtype=torch.bool)
    ends[0, 1, [3, 140]] = True
    _check(_qkv(150, 150), ends, 4)


def test_scale():
    _check(_qkv(65, 65), _ends("[T]", 65), 4, scale=0.7)
    _check(_qkv(65, 65), None, None, scale=0.7)


@pytest.mark.parametrize("lead", LEADS)
def test_empty_input(lead):
    for n_keys in (0, 5):
        q, k, v = _qkv(0, n_keys)
        for ends in (None, torch.ones(n_keys, dtype=torch.bool)):
            out, *gradients = _run((q, k, v), ends, lead, backend="torch")
            assert out.shape == q.shape
            assert all((g == 0).all() for g in gradients)


def test_a_query_that_sees_itself_alone_returns_its_value():
    q, k, v = _qkv(140, 140, heads=2)
    assert torch.allclose(chunk_attention(q, k, v, None, 0), v)
    alone = torch.arange(140).expand(B, -1)  # every token is a document
    ends = torch.ones(140, dtype=torch.bool)
    assert torch.allclose(chunk_attention(q, k, v, ends, 20, alone), v)
    _check((q, k, v), ends, 20, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [0, 64, None])
def test_half_precision(dtype, lead):
    for kind, packed in product(ENDS, (False, True)):
        doc_ids = _documents(130) if packed else None
        _check(_qkv(130, 130, dtype=dtype), _ends(kind, 130), lead, doc_ids, bound=2e-2)


@pytest.mark.parametrize("lead", [3, None])
def test_strided_inputs(lead):
    fused = torch.randn(B, 130, H + 2 * G, D)
    parts = fused.split([H, G, G], 2)
    dense = [t.contiguous() for t in parts]
    ends = (torch.rand(B, 260) < 0.2)[:, ::2]
    want = _run(dense, ends.contiguous(), lead, backend="reference")
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
    for inputs in (parts, transposed):
        assert not any(t.is_contiguous() for t in inputs)
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = chunk_attention(*leaves, ends, lead)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        # a cotangent that is not contiguous either
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
        gradients = torch.autograd.grad(out, leaves, weights)
        for got, expected in zip((out, *gradients), want):
            assert _relative_error(got, expected) < 1e-5


def test_later_keys_leave_no_trace():
    q, k, v = _qkv(300, 300)
    ends = torch.zeros(300, dtype=torch.bool)
    ends[::16] = True
    later = torch.full((B, 1, G, D), 1e30)
    changed = [torch.cat([t[:, :-1], later], 1) for t in (k, v)]
    one = chunk_attention(q, k, v, ends, 20)[:, :-1]
    assert torch.equal(chunk_attention(q, *changed, ends, 20)[:, :-1], one)


# --------------------------------------------------------------------------------------------
# The operator
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_operator_is_registered_soundly(packed):
    q, k, v = _qkv(40, 50)
    doc_ids = _documents(50) if packed else None
    for ends in (torch.rand(1, 1, 50) < 0.2, torch.rand(B, G, 50) < 0.2):
        arguments = (q, k, v, ends, doc_ids, 4, 0.35)
        torch.library.opcheck(torch.ops.attamba.chunk_attention.default, arguments)


def test_compiled_equals_eager_and_does_not_compile_again_at_another_length():
    def attend(q, k, v, ends, doc_ids):
        return chunk_attention(q * 2, k, v, ends, 5, doc_ids).sin()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    for seq in (70, 131, 300):
        qkv, ends, doc_ids = _qkv(seq, seq), _ends("[B, T]", seq), _documents(seq)
        results = []
        for function in (attend, compiled):
            out = function(*qkv, ends, doc_ids)
            results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
        for got, want in zip(results[1], results[0]):
            assert _relative_error(got, want) < 1e-6
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True])
def test_no_square_of_scores_is_ever_made(packed):
    seq = 2048
    q, k, v = (torch.randn(1, seq, 1, D, requires_grad=True) for _ in range(3))
    ends = (torch.arange(seq) + 1) % 8 == 0
    doc_ids = torch.arange(seq)[None] // 1500 if packed else None
    with LargestTensor() as largest:
        chunk_attention(q, k, v, ends, 64, doc_ids).sum().backward()
    assert len(largest.operators) == 2
    assert largest.elements < seq * seq / 4
    # what a block of 128 queries sees: the chunk ends, its window and itself
    assert largest.elements <= 128 * (seq // 8 + 64 + 128)


# --------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, text",
    [
        ({"leading_tokens": -1}, "leading_tokens=-1 must be at least 0, or None for all"),
        (
            {"backend": "trition"},
            "backend='trition' must be one of: auto, torch, triton, reference",
        ),
        ({"ends": torch.zeros(10)}, "ends must be boolean, not torch.float32; use ends.bool()"),
        (
            {"ends": torch.zeros(9).bool()},
            r"ends has shape \[9\]; it must be \[T\], \[B, T\] or \[B, G, T\] with B=2, G=2, T=10",
        ),
        ({"ends": torch.zeros(2, 4, 10).bool()}, r"ends has shape \[2, 4, 10\]"),
        ({"ends": torch.zeros(()).bool()}, r"ends has shape \[\]"),
        ({"k": torch.zeros(2, 10, 2, 6)}, r"k \[2, 10, 2, 6\] and v \[2, 10, 2, 8\] must both be"),
        ({"v": torch.zeros(2, 11, 2, 8)}, r"v \[2, 11, 2, 8\] must both be \[B, Tk, G, D\]"),
        ({"q": torch.zeros(3, 10, 4, 8)}, "with B=3, D=8"),
        ({"q": torch.zeros(2, 11, 4, 8)}, r"q \[2, 11, 4, 8\] has more positions than k"),
        ({"q": torch.zeros(2, 10, 8)}, r"q \[2, 10, 8\] and k .* must be \[B, T, heads, D\]"),
        (
            {"q": torch.zeros(2, 10, 3, 8)},
            "3 heads, which 2 key/value heads do not divide; fit H or G",
        ),
        ({"doc_ids": torch.zeros(10).long()}, r"doc_ids has shape \[10\], expected \[2, 10\]"),
    ],
)
def test_errors(change, text):
    q, k, v = _qkv(10, 10)
    good = {"q": q, "k": k, "v": v, "ends": None, "leading_tokens": 3}
    chunk_attention(**good)
    with pytest.raises(ValueError, match=text):
        chunk_attention(**{**good, **change})
