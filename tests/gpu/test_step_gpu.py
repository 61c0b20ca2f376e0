"""What stands around attention and compressors in a training step: positions, the gated product
and the cross entropy, against float32 on CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from drawing import VOCAB, build
from torch import Tensor

from attamba.ops.cross_entropy import cross_entropy
from attamba.ops.rotary import rotary_table, with_positions
from attamba.ops.swiglu import gated_product

CUDA = torch.device("cuda")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
Operator = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _exact_and_poisoned():
    """Products of float32 in float32; memory that is not written to is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)


def results(operator: Operator, tensors: list[Tensor], backend: str) -> list[Tensor]:
    """Outputs, and gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = operator(*leaves, backend=backend)
    torch.manual_seed(1)
    loss = sum((y.float() * torch.randn(y.shape, device=CUDA)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def check(operator: Operator, tensors: list[Tensor], dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in tensors]
    got = results(operator, tensors, "triton")
    again = results(operator, tensors, "triton")
    for ours, twice, exact in zip(
        got, again, results(operator, [t.float() for t in tensors], "torch")
    ):
        assert torch.equal(ours, twice)
        assert float((ours.float() - exact).norm() / exact.norm()) < LIMITS[dtype]


def positions(
    batch: int, seq: int, heads: tuple[int, int], width: int, direct: int
) -> tuple[Operator, list[Tensor]]:
    table = rotary_table(3 + torch.arange(seq, device=CUDA)[None], width, 1e4)
    sides = [(heads[0],), *[(heads[1],)] * 2]
    if direct:
        sides.append((2, heads[1]) if direct == 2 else (heads[1],))

    def operator(*tensors: Tensor, backend: str) -> tuple[Tensor, ...]:
        q, k, v, *rest = tensors
        return with_positions(q, k, v, table, *rest, backend=backend)

    return operator, [torch.randn(batch, seq, *side, width, device=CUDA) for side in sides]


def gated(*tensors: Tensor, backend: str) -> tuple[Tensor, ...]:
    return (gated_product(*tensors, backend=backend),)


def scored(targets: Tensor) -> Operator:
    def operator(logits: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (cross_entropy(logits, targets, -100, backend),)

    return operator


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("direct", [0, 1, 2])
@pytest.mark.parametrize(
    "batch, seq, heads, width",
    [(3, 1000, (8, 8), 64), (2, 65, (8, 2), 42), (1, 1, (1, 1), 14), (1, 130, (16, 1), 256)],
)
def test_positions(batch, seq, heads, width, direct, dtype):
    check(*positions(batch, seq, heads, width, direct), dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(2, 77, 136, 40), (3, 64, 1536, 512), (1, 1, 7, 3)])
def test_gated_product(shape, dtype):
    batch, seq, width, outputs = shape
    x = torch.randn(batch, seq, 2 * width, device=CUDA)
    check(gated, [x, torch.randn(outputs, width, device=CUDA) * width**-0.5], dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows, width", [(50, 32000), (3, 128256), (129, 257), (1, 2)])
def test_cross_entropy(rows, width, dtype):
    targets = torch.randint(width, (rows,), device=CUDA)
    targets[rows // 2 + 1 :: 7] = -100
    check(scored(targets), [3 * torch.randn(rows, width, device=CUDA)], dtype)


def test_more_numbers_than_an_int32_counts():
    rows, width = 70_000, 32_000
    targets = torch.randint(width, (rows,), device=CUDA)
    logits = torch.zeros(rows, width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    nats = cross_entropy(logits, targets, -100)
    nats.sum().backward()
    assert torch.allclose(nats, torch.full_like(nats, 10.37349), atol=1e-4)
    chosen = logits.grad[torch.arange(rows, device=CUDA), targets]
    assert torch.equal(chosen, torch.full_like(chosen, 1 / width - 1))
    del logits, nats, chosen

    x = torch.ones(1, 2**18 + 8, 2 * 4128, device=CUDA, dtype=torch.bfloat16)
    weight = torch.full((4, 4128), 1 / 4128, device=CUDA, dtype=torch.bfloat16)
    y = gated_product(x, weight)
    assert torch.allclose(y, torch.full_like(y, 0.7311), atol=5e-3)


def test_a_compiled_model_takes_them_at_any_length():
    """Without a graph break; compiled anew once, when a second length says that there are more."""
    mixers = [
        {"type": "attamba", "n_heads": 4, "chunk_size": 4, "leading_tokens": 8},
        {"type": "transformer", "n_heads": 4, "n_kv_heads": 2},
    ]
    torch.compiler.reset()
    model = build(mixers, n_layers=2).cuda().requires_grad_(True)
    compiled = torch.compile(model, fullgraph=True)

    def gradients(forward: Callable[[Tensor], Tensor], ids: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(forward(ids).square().mean(), model.parameters()))

    lengths = [(2, 64), (3, 96), (4, 160), (5, 224)]
    for i, shape in enumerate(lengths):
        ids = torch.randint(VOCAB, shape, device=CUDA)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            got = gradients(compiled, ids)
        for ours, exact in zip(got, gradients(model, ids)):
            assert float((ours - exact).norm()) < 1e-3 * float(exact.norm()) + 1e-7
