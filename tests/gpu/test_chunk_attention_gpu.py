"""Chunk attention's Triton kernels on CUDA: outputs and every gradient against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attamba.ops import chunk_attention
from attamba.ops.chunk_attention.tiles import TABLE, override
from attamba.ops.chunking import document_bounds, make_boundary, make_span

DTYPES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = (1, 2, 63, 64, 65, 1000, 4097)
LEADS = (0, 1, 64, None)
NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(seq, dtype, heads=4, groups=2, width=64, batch=2, n_queries=None) -> list[Tensor]:
    n_queries = seq if n_queries is None else n_queries
    shapes = ((n_queries, heads), (seq, groups), (seq, groups), (n_queries, heads))
    return [torch.randn(batch, t, h, width, device="cuda", dtype=dtype) for t, h in shapes]


def run(backend: str, tensors: list[Tensor], ends, lead, doc_ids=None, scale=None) -> list[Tensor]:
    *qkv, weight = tensors
    qkv = [t.detach().requires_grad_() for t in qkv]
    out = chunk_attention(*qkv, ends, lead, doc_ids, scale, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, qkv, weight)]


def check(tensors: list[Tensor], ends, lead, doc_ids=None, bound=None, scale=None) -> None:
    got = run("triton", tensors, ends, lead, doc_ids, scale)
    want = run("reference", [t.float() for t in tensors], ends, lead, doc_ids, scale)
    bound = DTYPES[tensors[0].dtype] if bound is None else bound
    for name, a, b in zip(NAMES, got, want):
        assert a.dtype == tensors[0].dtype and a.isfinite().all(), name
        error = (a.float() - b).norm()
        # one visible key alone has no gradient in q and k but rounding
        assert error <= bound * b.norm() or error < bound * 0.1 * b.numel() ** 0.5, (
            f"{name}: {float(error / b.norm()):.2e}"
        )


def layer_ends(boundary, chunk_size, seq, groups=2, tokens=None, doc_ids=None) -> Tensor:
    policy = make_boundary(
        boundary, chunk_size=chunk_size, layer_idx=1, n_layers=3, n_kv_heads=groups, sink=True
    )
    draw = torch.tensor(3, device="cuda")  # without one, jitter's ends are those of cyclic
    return policy(make_span(seq, draw.device, tokens=tokens, doc_ids=doc_ids, draw=draw))[0]


def documents(batch, seq, rate=0.01) -> Tensor:
    return (torch.rand(batch, seq, device="cuda") < rate).long().cumsum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8, 64, 128])
@pytest.mark.parametrize("lead", LEADS)
def test_is_its_reference(dtype, seq, chunk_size, lead):
    check(inputs(seq, dtype), layer_ends("cyclic", chunk_size, seq), lead)


POLICIES = [
    "uniform",
    "head_cyclic",
    "jitter",
    "random",
    {"type": "separator", "tokens": [1, 2]},
    {"type": "budget", "max_chunks": 20},
]


@pytest.mark.parametrize("boundary", POLICIES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lead", [0, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_policy_and_packed_documents(boundary, packed, lead, dtype):
    seq = 700
    tokens = torch.randint(9, (2, seq), device="cuda")
    doc_ids = documents(2, seq) if packed else None
    ends = layer_ends(boundary, 5, seq, tokens=tokens, doc_ids=doc_ids)
    check(inputs(seq, dtype), ends, lead, doc_ids)


@pytest.mark.parametrize("width", [8, 16, 32, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("heads, groups", [(3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_and_grouped_heads(width, heads, groups, dtype):
    ends = torch.rand(2, groups, 333, device="cuda") < 0.2
    check(inputs(333, dtype, heads, groups, width), ends, 20)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("ends", [None, 0.0, 0.2, 1.0])
@pytest.mark.parametrize("packed", [False, True])
def test_fewer_queries_than_keys(lead, ends, packed):
    ends = None if ends is None else torch.rand(500, device="cuda") < ends
    doc_ids = documents(2, 500, 0.02) if packed else None
    check(inputs(500, torch.float32, n_queries=130), ends, lead, doc_ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    seq, ends = 300, torch.rand(300, device="cuda") < 0.2
    packed = torch.randn(2, seq, 8, 64, device="cuda", dtype=dtype)
    q, k, v = packed.split([4, 2, 2], 2)
    check([q, k, v, torch.randn_like(q)], ends, 20)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    check([*turned, torch.randn_like(q)], ends, 20)
    apart = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]  # last stride > 1
    check([*apart, torch.randn_like(q).expand_as(q)], ends, 20)
    constant = torch.ones(1, 1, 1, 1, device="cuda", dtype=dtype).expand_as(q)  # stride 0
    check([q, k, v, constant], ends, 20)


def test_rows_that_see_nothing_but_themselves():
    q, k, v, weight = inputs(200, torch.float32)
    doc_ids = torch.arange(200, device="cuda").expand(2, -1)
    got = run("triton", [q, k, v, weight], torch.ones(200, device="cuda").bool(), 64, doc_ids)
    assert torch.equal(got[0], v.repeat_interleave(2, 2))
    assert got[1].abs().max() < 1e-4 and got[2].abs().max() < 1e-4


@pytest.mark.parametrize("boundary", ["cyclic", "head_cyclic"])
def test_repeated_runs_are_bit_equal(boundary):
    tensors, ends = inputs(2000, torch.bfloat16), layer_ends(boundary, 8, 2000)
    first = run("triton", tensors, ends, 64)
    for _ in range(5):
        assert all(map(torch.equal, run("triton", tensors, ends, 64), first))


def test_other_scales():
    ends = torch.rand(100, device="cuda") < 0.2
    check(inputs(100, torch.float32), ends, 9, scale=1.7)
    with pytest.raises(ValueError, match="scale=-1"):
        chunk_attention(*inputs(100, torch.float32)[:3], ends, 9, scale=-1.0, backend="triton")


def test_finite_differences():
    q, k, v, weight = inputs(9, torch.float32, 2, 1, 16, batch=1)
    ends = torch.arange(9, device="cuda") % 3 == 1
    _, *gradients = run("triton", [q, k, v, weight], ends, 2)
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)

        def loss(step, i=i, direction=direction):
            moved = [t + step * direction if j == i else t for j, t in enumerate((q, k, v))]
            out = chunk_attention(*moved, ends, 2, backend="triton")
            return (out.double() * weight.double()).sum()

        difference = (loss(1e-2) - loss(-1e-2)) / 2e-2
        slope = (gradient.double() * direction.double()).sum()
        assert abs(difference - slope) < 5e-3 * (1 + abs(slope))


@pytest.mark.parametrize("chip, width", TABLE)
def test_every_tile_that_can_be_chosen(chip, width):
    if torch.cuda.get_device_capability()[0] < chip:
        pytest.skip("tiles for a newer chip")
    ends = layer_ends("head_cyclic", 8, 700)
    for kernel, choices in TABLE[chip, width].items():
        for tile in choices:
            with override(kernel, tile):
                check(inputs(700, torch.bfloat16, width=width), ends, 64)


def test_more_than_two_to_the_31_numbers():
    """Offsets do not overflow: the last row of a tensor of 2**31 numbers and more."""
    seq, batch = 2**17, 33
    q, k, v = (torch.empty(batch, seq, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    small = inputs(seq, torch.bfloat16, 8, 8, batch=1)
    for large, part in zip((q, k, v), small):
        large[-1:] = part
    ends = layer_ends("cyclic", 64, seq, 8)
    out = chunk_attention(q, k, v, ends, 64, backend="triton")
    alone = chunk_attention(*small[:3], ends, 64, backend="triton")
    assert torch.equal(out[-1:], alone)


def test_rows_that_are_far_apart():
    """Offsets within one row of a batch beyond 2**31 numbers."""
    seq, apart = 4097, 2**20
    q, k, v, weight = inputs(seq, torch.bfloat16, 2, 1)
    q, k, v, weight = (t[:1] for t in (q, k, v, weight))
    room = torch.empty(seq * apart, device="cuda", dtype=torch.bfloat16)
    far = room.as_strided((1, seq, 1, 64), (seq * apart, apart, 64, 1))
    far.copy_(k)
    ends = layer_ends("cyclic", 8, seq, 1)
    got, want = (run("triton", [q, t, v, weight], ends, 64) for t in (far, k))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("which", range(4))
def test_heads_that_are_far_apart(which):
    """Heads before tokens, the last of them beyond 2**31 numbers, of q, k, v and out's gradient."""
    heads, apart = 6, 2**29
    near = [t[:1] for t in inputs(300, torch.bfloat16, heads, heads)]
    room = torch.empty(heads * apart, device="cuda", dtype=torch.bfloat16)
    far = list(near)
    far[which] = room.as_strided((1, 300, heads, 64), (heads * apart, 64, apart, 1))
    far[which].copy_(near[which])
    ends = layer_ends("cyclic", 8, 300, heads)
    got, want = (run("triton", tensors, ends, 20) for tensors in (far, near))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("packed", [False, True])
def test_operator_registration(packed):
    from attamba.ops.chunk_attention.triton import _backward, _forward

    q, k, v, weight = inputs(70, torch.float32, width=16)
    ends = layer_ends("head_cyclic", 4, 70)
    bounds = document_bounds(documents(2, 70, 0.05)) if packed else (None, None)
    args = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), ends, *bounds, 6, 0.3)
    torch.library.opcheck(_forward, args)
    results = [t.detach() for t in _forward(*args)]
    plain = [t.detach() for t in (q, k, v)]
    torch.library.opcheck(_backward, (weight, *plain, *results, *bounds, 6, 0.3))


def test_one_compiled_graph_for_all_lengths():
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def step(q, k, v, ends):
        return chunk_attention(q, k, v, ends, 8, backend="triton").float().sum()

    for batch, seq in ((5, 100), (3, 211), (7, 64)):  # no size twice at first
        q, k, v, _ = inputs(seq, torch.bfloat16, batch=batch)
        step(*(t.requires_grad_() for t in (q, k, v)), layer_ends("cyclic", 4, seq)).backward()
        assert q.grad.isfinite().all()
    assert graphs == 1


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    q, k, v, weight = inputs(150, torch.float32)
    ends = layer_ends("cyclic", 8, 150)

    def loss(saved):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]

        def op(*t):
            return chunk_attention(*t, ends, 9, backend="triton")

        out = checkpoint(op, *leaves, use_reentrant=False) if saved else op(*leaves)
        return torch.autograd.grad(out, leaves, weight)

    assert all(map(torch.equal, loss(True), loss(False)))
