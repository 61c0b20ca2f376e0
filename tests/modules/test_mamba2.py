"""Mixer mamba2: against the recurrence written out, its draw, documents, steps, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attamba
from attamba.config import ConfigError
from attamba.mixers import Mamba2Mixer
from attamba.modules.mamba2 import Mamba2
from attamba.ops.chunking import make_span

DIM, E, W, N, S, TAPS = 6, 12, 3, 5, 4, 3
CPU = torch.device("cpu")


def _mixer() -> Mamba2:
    config = Mamba2Mixer(ssm_dim=E, head_dim=W, state_dim=N, conv_width=TAPS)
    mixer = Mamba2(config, DIM, norm_eps=1e-5)
    with torch.no_grad():  # what starts as ones must matter
        for parameter in (mixer.D_skip, mixer.norm.weight):
            parameter.add_(torch.randn_like(parameter) / 3)
    return mixer


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _written_out(m: Mamba2, u: Tensor, starts: list[int]) -> Tensor:
    """One row, one token and one head at a time, from the paper's formulas. u: [T, d] -> [T, d]."""
    p = dict(m.named_parameters())
    rows = u @ p["in_proj.weight"].t()
    z, xbc, dt = rows[:, :E], rows[:, E : 2 * E + 2 * N], rows[:, 2 * E + 2 * N :]
    out, h, begin = [], [torch.zeros(N, W)] * S, 0
    for t in range(len(u)):
        if t in starts:
            h, begin = [torch.zeros(N, W)] * S, t
        seen = range(min(TAPS, t - begin + 1))
        taps = [xbc[t - i] * p["conv.weight"][:, TAPS - 1 - i] for i in seen]
        convolved = _silu(sum(taps) + p["conv.bias"])
        x, B, C = convolved[:E], convolved[E : E + N], convolved[E + N :]
        y = []
        for s in range(S):
            step = torch.log1p(torch.exp(dt[t, s] + p["dt_bias"][s]))
            own = x[s * W : (s + 1) * W]
            h[s] = torch.exp(-torch.exp(p["A_log"][s]) * step) * h[s] + step * torch.outer(B, own)
            y.append(C @ h[s] + p["D_skip"][s] * own)
        gated = torch.cat(y) * _silu(z[t])
        normed = gated / torch.sqrt(gated.square().mean() + 1e-5) * p["norm.weight"]
        out.append(p["wo.weight"] @ normed)
        h = list(h)
    return torch.stack(out)


def _gradients(m: nn.Module, out: Tensor) -> dict[str, Tensor]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*m.named_parameters())
    grads = torch.autograd.grad((out * cotangent).sum(), parameters)
    return dict(zip(names, grads))


@pytest.mark.parametrize("seq", [1, 2, 40])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_formulas_with_every_gradient(seq, backend):
    m, u = _mixer(), torch.randn(seq, DIM)
    m.backend = backend
    doc_ids = (torch.arange(seq) // 15)[None]
    got = m(u[None], make_span(seq, CPU, doc_ids=doc_ids))[0]
    want = _written_out(m, u, [0, 15, 30])
    assert torch.allclose(got, want, atol=1e-5)
    found = _gradients(m, got)
    for name, gradient in _gradients(m, want).items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name


def test_rates_and_steps_are_drawn_as_in_the_paper_s_code():
    m = Mamba2(Mamba2Mixer(ssm_dim=20_000, head_dim=1, state_dim=1), 2, 1e-5)
    rates, steps = m.A_log.detach().exp(), nn.functional.softplus(m.dt_bias.detach())
    assert rates.min() >= 1 and rates.max() <= 16
    assert float(rates.mean()) == pytest.approx(8.5, rel=0.02)
    assert steps.min() >= 0.99e-3 and steps.max() <= 1.01e-1
    middle = (math.log(1e-3) + math.log(1e-1)) / 2
    assert float(steps.log().mean()) == pytest.approx(middle, rel=0.02)
    assert (m.D_skip == 1).all() and (m.norm.weight == 1).all()


def test_vectors_do_not_decay():
    from attamba.train.optim import parameter_groups

    m = _mixer()
    decayed, plain = (group["params"] for group in parameter_groups(m, 0.1))
    vectors = (m.A_log, m.dt_bias, m.D_skip, m.norm.weight, m.conv.bias)
    assert {id(p) for p in plain} == {id(p) for p in vectors}
    assert len(decayed) == 3


@pytest.mark.parametrize("width", [1, 4])
def test_padding_freezes_state_and_convolution(width):
    m = _mixer().requires_grad_(False)
    cache = m.new_cache(2, torch.float32, CPU)
    m(torch.randn(2, 5, DIM), make_span(5, CPU, offsets=torch.zeros(2, dtype=torch.long)), cache)
    before = {n: t.clone() for n, t in cache.state.tensors().items()}
    mask = torch.tensor([[True], [False]]).expand(2, width)
    span = make_span(width, CPU, mask=mask, offsets=torch.tensor([5, 5]))
    m(torch.randn(2, width, DIM), span, cache)
    for name, tensor in cache.state.tensors().items():
        assert torch.equal(tensor[1], before[name][1]), name
        assert not torch.equal(tensor[0], before[name][0]), name


def test_the_state_is_float32_in_a_model_of_bfloat16():
    config = attamba.ModelConfig(
        vocab_size=11, dim=16, n_layers=2, mixer={"type": "mamba2", "head_dim": 8, "state_dim": 4}
    )
    model = attamba.build_model(config).bfloat16().requires_grad_(False)
    cache = model.new_cache(1)
    out = model(torch.zeros(1, 9, dtype=torch.long), cache=cache)
    assert out.dtype == torch.bfloat16
    assert all(layer.state.h.dtype == torch.float32 for layer in cache.layers)
    assert all(layer.state.conv.dtype == torch.bfloat16 for layer in cache.layers)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    m, u = _mixer(), torch.randn(2, 33, DIM)
    span = make_span(33, CPU)
    compiled = torch.compile(lambda x: m(x, span), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(u), m(u, span), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"head_dim": 5}, r"mixer\.head_dim=5 does not divide ssm_dim=32"),
        ({"ssm_dim": 0}, r"mixer\.ssm_dim=0 must be at least 1"),
        ({"state_dim": 0}, r"mixer\.state_dim=0 must be at least 1"),
        ({"conv_width": 0}, r"mixer\.conv_width=0 must be at least 1"),
        ({"n_heads": 4}, r"mixer\.n_heads is not a key of type=mamba2, which has: type, ssm_dim"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ConfigError, match=text):
        attamba.ModelConfig(dim=16, mixer={"type": "mamba2", "head_dim": 8, **options})
