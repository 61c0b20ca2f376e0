"""Every kernel once on small odd shapes: what compute-sanitizer runs, see benchmarks/README.md."""

from __future__ import annotations

import pytest
import torch
from drawing import VOCAB, build

from attamba.ops import chunk_attention, chunk_scan, compress, linear_scan
from attamba.ops.cross_entropy import cross_entropy
from attamba.ops.rotary import rotary_table, with_positions
from attamba.ops.swiglu import gated_product

DTYPES = [torch.float32, torch.bfloat16]


def backward(out, *inputs):
    for gradient in torch.autograd.grad(out.float().sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_attention(dtype, packed):
    q = torch.randn(2, 131, 4, 40, device="cuda", dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(2, 131, 2, 40, device="cuda", dtype=dtype, requires_grad=True) for _ in "kv"
    )
    ends = torch.rand(2, 2, 131, device="cuda") < 0.4
    doc_ids = (torch.rand(2, 131, device="cuda") < 0.05).long().cumsum(1) if packed else None
    backward(chunk_attention(q, k, v, ends, 7, doc_ids, backend="triton"), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("longest", [5, None])
def test_compress(dtype, longest):
    """Without a longest chunk in enough tiles for two segments, between which states are passed."""
    seq = 67 if longest else 200
    proj = torch.randn(2, seq, 4 * 32 + 4 * 5 + 2 * 2, device="cuda", dtype=dtype)
    proj.requires_grad_()
    weight = torch.randn(2 * 32 + 4 * 5, 4, device="cuda", requires_grad=True)
    A = -torch.rand(2, 2, device="cuda") - 0.01
    bias, skip = (torch.randn(2, 2, device="cuda") for _ in range(2))
    starts = torch.arange(seq, device="cuda") % 5 == 2
    halves = compress(
        proj, weight, A, bias, skip, starts, state_dim=5, longest=longest, backend="triton"
    )
    backward(torch.cat(halves, -1), proj, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direct", [(), (2,)])
def test_positions(dtype, direct):
    q, k, v = (
        torch.randn(2, 37, heads, 42, device="cuda", dtype=dtype, requires_grad=True)
        for heads in (4, 2, 2)
    )
    more = torch.randn(2, 37, *direct, 2, 42, device="cuda", dtype=dtype, requires_grad=True)
    table = rotary_table(torch.arange(37, device="cuda")[None], 42, 1e4)
    backward(torch.cat(with_positions(q, k, v, table, more, "triton"), 2), q, k, v, more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_product_and_cross_entropy(dtype):
    x = torch.randn(2, 19, 2 * 73, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(5003, 73, device="cuda", dtype=dtype, requires_grad=True)
    logits = gated_product(x, weight, "triton").flatten(0, 1)
    targets = torch.arange(38, device="cuda")
    backward(cross_entropy(logits, targets, 3, "triton"), x, weight)


def test_scan():
    x = torch.randn(2, 67, 4, 12, device="cuda", requires_grad=True)
    dt, A = torch.rand(2, 67, 4, device="cuda"), -torch.rand(4, device="cuda")
    B, C = (torch.randn(2, 67, 2, 9, device="cuda", requires_grad=True) for _ in "BC")
    starts = torch.rand(2, 67, device="cuda") < 0.1
    backward(chunk_scan(x, dt, A, B, C, starts, backend="triton"), x, B, C)


def test_linear_scan():
    """In two pieces, between which states are passed."""
    a, b = (torch.rand(2, 513, 40, device="cuda", requires_grad=True) for _ in "ab")
    starts = torch.rand(2, 513, device="cuda") < 0.01
    backward(linear_scan(a, b, starts, backend="triton"), a, b)


@pytest.mark.parametrize("boundary, scope", [("cyclic", "chunk"), ("head_cyclic", "sequence")])
def test_decoding(boundary, scope):
    mixer = {"type": "attamba", "n_heads": 4, "chunk_size": 3, "leading_tokens": 4}
    mixer |= {"boundary": boundary, "ssm_scope": scope, "state_dim": 5, "ssm_heads": 2}
    model = build(mixer, n_layers=1).cuda()
    ids = torch.randint(VOCAB, (3, 30), device="cuda")
    cache = model.new_cache(3)
    out = [model(ids[:, :9], cache=cache)]
    out += [model(ids[:, t : t + 1], cache=cache) for t in range(9, 30)]
    assert torch.cat(out, 1).isfinite().all()
