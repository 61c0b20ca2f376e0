"""Positions applied, and what is added before: the kernel against plain PyTorch."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from attamba.ops.rotary import rotary_table, rotate, with_direct, with_positions

pytest.importorskip("triton")
NAMES = ["q", "k", "v", "direct"]


def inputs(
    batch: int, seq: int, heads: tuple[int, int], width: int, direct: int, dtype=torch.float32
) -> list[Tensor]:
    """q, k, v and direct: none, one for keys and values, or one for each."""
    n_heads, n_kv_heads = heads
    tensors = [torch.randn(batch, seq, n, width, dtype=dtype) for n in (n_heads, *[n_kv_heads] * 2)]
    if direct:
        pair = (2,) if direct == 2 else ()
        tensors.append(torch.randn(batch, seq, *pair, n_kv_heads, width, dtype=dtype))
    return tensors


def with_gradients(backend: str, tensors: list[Tensor], table: tuple[Tensor, Tensor]):
    leaves = [t.detach().requires_grad_() for t in tensors]
    q, k, v, *direct = leaves
    outputs = with_positions(q, k, v, table, *direct, backend=backend)
    torch.manual_seed(1)
    loss = sum((y * torch.randn(y.shape)).sum() for y in outputs)
    return outputs, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("per_row", [False, True], ids=["shared table", "table of each row"])
@pytest.mark.parametrize("direct", [0, 1, 2])
@pytest.mark.parametrize(
    "batch, seq, heads, width", [(2, 37, (4, 2), 16), (1, 1, (1, 1), 6), (3, 20, (2, 2), 42)]
)
def test_the_kernel_is_plain_pytorch(batch, seq, heads, width, direct, per_row):
    tensors = inputs(batch, seq, heads, width, direct)
    positions = 5 + torch.arange(seq)[None]
    if per_row:
        positions = positions + 11 * torch.arange(batch)[:, None]
    table = rotary_table(positions, width, 1e4)
    for got, want in zip(
        with_gradients("triton", tensors, table), with_gradients("torch", tensors, table)
    ):
        for name, ours, theirs in zip(NAMES, got, want):
            assert torch.allclose(ours, theirs, atol=1e-6), name


def test_one_head_by_the_formula():
    """A pair of numbers is a complex one that turns by position * theta^(-2i/D)."""
    q, k, v, direct = inputs(1, 9, (1, 1), 4, 1)
    turned_q, turned_k, sums = with_positions(
        q, k, v, rotary_table(torch.arange(9)[None], 4, 100.0), direct, backend="triton"
    )
    angle = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.1])
    turn = torch.polar(torch.ones_like(angle), angle)
    for plain, got in ((q, turned_q), (k + direct, turned_k)):
        want = torch.complex(*plain[0, :, 0].chunk(2, -1)) * turn
        assert torch.allclose(got[0, :, 0], torch.cat([want.real, want.imag], -1), atol=1e-5)
    assert torch.equal(sums, v + direct)


@pytest.mark.parametrize("direct", [0, 1, 2])
def test_rows_that_lie_apart_in_memory(direct):
    """Parts of wider rows, transposed tables, and a view that no stride describes: copies."""
    tensors = inputs(2, 21, (4, 2), 8, direct)
    table = rotary_table(torch.arange(21)[None], 8, 1e4)
    want = with_positions(*tensors[:3], table, *tensors[3:], backend="torch")
    for apart in (
        lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    ):
        q, k, v, *rest = (apart(t) for t in tensors)
        got = with_positions(q, k, v, table, *rest, backend="triton")
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want))


def test_half_precision_rounds_once():
    tensors = inputs(2, 19, (4, 2), 16, 2, torch.float16)
    table = rotary_table(torch.arange(19)[None], 16, 1e4)
    q, k, v, direct = tensors
    got = with_positions(q, k, v, table, direct, backend="triton")
    k, v = with_direct(k.float(), v.float(), direct.float())
    want = rotate(q.float(), table), rotate(k, table), v
    for ours, exact in zip(got, want):
        assert ours.dtype == torch.float16
        assert torch.allclose(ours.float(), exact, rtol=2**-10, atol=1e-6)


def test_no_tokens():
    for direct in (0, 1):
        q, k, v, *rest = inputs(2, 0, (2, 1), 8, direct)
        table = rotary_table(torch.arange(0)[None], 8, 1e4)
        got = with_positions(q, k, v, table, *rest, backend="triton")
        assert [t.shape for t in got] == [q.shape, k.shape, v.shape]


def _raises(match: str, backend: str, *tensors: Tensor, table: tuple[Tensor, Tensor]) -> None:
    q, k, v, *direct = tensors
    with pytest.raises(ValueError, match=match):
        with_positions(q, k, v, table, *direct, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tables_that_do_not_fit(backend):
    tensors = inputs(3, 7, (4, 2), 8, 0)
    fits = rotary_table(torch.arange(7)[None], 8, 1e4)
    expected = r", expected \[B or 1, T, 1, D/2\] with B=3, T=7, D=8"
    for wrong, shape in (
        (rotary_table(torch.arange(6)[None], 8, 1e4), r"\[1, 6, 1, 4\]"),
        (rotary_table(torch.arange(8)[None], 8, 1e4), r"\[1, 8, 1, 4\]"),
        (rotary_table(torch.arange(1)[None], 8, 1e4), r"\[1, 1, 1, 4\]"),
        (rotary_table(torch.arange(14).view(2, 7), 8, 1e4), r"\[2, 7, 1, 4\]"),
        (rotary_table(torch.arange(7)[None], 6, 1e4), r"\[1, 7, 1, 3\]"),
        ((fits[0], fits[1][:, :5]), r"\[1, 5, 1, 4\]"),
        ((fits[0][:, :, 0], fits[1]), r"\[1, 7, 4\]"),
    ):
        _raises(f"rotary has {shape}{expected}", backend, *tensors, table=wrong)
    mixed = (fits[0].expand(3, -1, -1, -1), fits[1])
    match = r"a cosine of \[3, 7, 1, 4\] and a sine of \[1, 7, 1, 4\]; they must have one shape"
    _raises(match, backend, *tensors, table=mixed)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_shapes_that_disagree(backend):
    q, k, v = inputs(3, 7, (4, 2), 8, 0)
    table = rotary_table(torch.arange(7)[None], 8, 1e4)
    must = r"must both be \[B, T, G, D\] with B=3, T=7, D=8, as q is"
    for more in ((), (k,)):
        match = rf"k \[3, 5, 2, 8\] and v \[3, 5, 2, 8\] {must}"
        _raises(match, backend, q, k[:, :5], v[:, :5], *more, table=table)
        match = rf"k \[3, 7, 2, 8\] and v \[1, 7, 2, 8\] {must}"
        _raises(match, backend, q, k, v[:1], *more, table=table)
        match = r"q has shape \[3, 7, 4, 7\]; it must be \[B, T, H, D\] with D even"
        _raises(match, backend, q[..., :7], k, v, *more, table=table)
    for pair in ((), (2,)):
        for batch, seq, heads in ((3, 6, 2), (3, 8, 2), (1, 7, 2), (3, 7, 1)):
            direct = torch.randn(batch, seq, *pair, heads, 8)
            found = re.escape(str(list(direct.shape)))
            match = rf"direct has {found}, expected \[3, 7, 2, 8\] as k, or \[3, 7, 2, 2, 8\]"
            _raises(match, backend, q, k, v, direct, table=table)


@pytest.mark.parametrize("direct", [0, 1, 2])
def test_are_operators(direct):
    from attamba.ops.rotary import triton as module

    table = rotary_table(torch.arange(5)[None], 8, 1e4)
    leaves = [t.requires_grad_() for t in inputs(2, 5, (2, 1), 8, direct)]
    if direct:
        torch.library.opcheck(module.rotate_sums, (*leaves, *table))
        gradients = [torch.randn(t.shape) for t in leaves[:3]]
        torch.library.opcheck(module.rotate_sums_backward, (*gradients, *table, direct == 1))
    else:
        torch.library.opcheck(module.rotate_pair, (*leaves[:2], *table, False))
