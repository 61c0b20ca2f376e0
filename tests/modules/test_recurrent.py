"""Mixers mingru, minlstm and hawk: against the recurrences written out, their draw, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attamba
from attamba.config import ConfigError
from attamba.mixers import HawkMixer, Mamba2Mixer, MinGRUMixer, MinLSTMMixer
from attamba.models.registry import build_mixer
from attamba.modules.recurrent import Hawk
from attamba.ops.chunking import make_span

DIM, C, TAPS, BLOCKS = 6, 8, 3, 2
CPU = torch.device("cpu")
CONFIGS = {
    "mingru": MinGRUMixer(hidden_dim=C, conv_width=TAPS),
    "minlstm": MinLSTMMixer(hidden_dim=C, conv_width=TAPS),
    "hawk": HawkMixer(hidden_dim=C, conv_width=TAPS, n_blocks=BLOCKS),
}


def _mixer(name: str) -> nn.Module:
    model = attamba.ModelConfig(vocab_size=3, dim=DIM, n_layers=1, mixer=CONFIGS[name])
    mixer = build_mixer(CONFIGS[name], model, 0)
    with torch.no_grad():  # what starts as zeros must matter
        for parameter_name, parameter in mixer.named_parameters():
            if "bias" in parameter_name:
                parameter.add_(torch.randn_like(parameter) / 2)
    return mixer


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _convolved(p: dict[str, Tensor], x: Tensor, t: int, begin: int) -> Tensor:
    taps = min(TAPS, t - begin + 1)
    total = sum(x[t - i] * p["conv.weight"][:, TAPS - 1 - i] for i in range(taps))
    return total + p["conv.bias"]


def _g(x: Tensor) -> Tensor:
    return torch.stack([c + 0.5 if c >= 0 else _sigmoid(c) for c in x])


def _min_rnn(name: str, p: dict[str, Tensor], u: Tensor, starts: list[int]) -> Tensor:
    out, h, begin = [], torch.zeros(C), 0
    for t in range(len(u)):
        if t in starts:
            h, begin = torch.zeros(C), t
        row = p["in_proj.weight"] @ _convolved(p, u, t, begin) + p["in_bias"]
        candidate = _g(row[-C:])
        if name == "mingru":
            z = _sigmoid(row[:C])
            h = (1 - z) * h + z * candidate
        else:
            f, i = _sigmoid(row[:C]), _sigmoid(row[C : 2 * C])
            h = f / (f + i) * h + i / (f + i) * candidate
        out.append(p["wo.weight"] @ h)
    return torch.stack(out)


def _hawk(p: dict[str, Tensor], u: Tensor, starts: list[int]) -> Tensor:
    out, h, begin, width = [], torch.zeros(C), 0, C // BLOCKS
    rows = u @ p["in_proj.weight"].t()
    for t in range(len(u)):
        if t in starts:
            h, begin = torch.zeros(C), t
        x = _convolved(p, rows[:, C:], t, begin)
        r, i = (
            _sigmoid(torch.block_diag(*p["gate_weight"][gate]).t() @ x + p["gate_bias"][gate])
            for gate in (0, 1)
        )
        assert torch.block_diag(*p["gate_weight"][0]).shape == (BLOCKS * width, C)
        a = _sigmoid(p["Lambda"]) ** (8 * r)
        scale = torch.ones(C) if t in starts else torch.sqrt(1 - a**2)
        h = a * h + scale * (i * x)
        branch = 0.5 * rows[t, :C] * (1 + torch.erf(rows[t, :C] / 2**0.5))
        out.append(p["wo.weight"] @ (branch * h))
    return torch.stack(out)


def _written_out(name: str, m: nn.Module, u: Tensor, starts: list[int]) -> Tensor:
    """One row and one token at a time, from the papers' formulas. u: [T, d] -> [T, d]."""
    p = dict(m.named_parameters())
    return _hawk(p, u, starts) if name == "hawk" else _min_rnn(name, p, u, starts)


def _gradients(m: nn.Module, out: Tensor) -> dict[str, Tensor]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*m.named_parameters())
    grads = torch.autograd.grad((out * cotangent).sum(), parameters)
    return dict(zip(names, grads))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seq", [1, 2, 40])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_formulas_with_every_gradient(name, seq, backend):
    m, u = _mixer(name), torch.randn(seq, DIM)
    m.backend = backend
    doc_ids = (torch.arange(seq) // 15)[None]
    got = m(u[None], make_span(seq, CPU, doc_ids=doc_ids))[0]
    want = _written_out(name, m, u, [0, 15, 30])
    assert torch.allclose(got, want, atol=1e-5)
    if seq > 1:  # at the first token a decay has no effect
        found = _gradients(m, got)
        for parameter, gradient in _gradients(m, want).items():
            assert torch.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-5), parameter


def test_hawk_s_decays_are_drawn_as_in_the_paper():
    m = Hawk(HawkMixer(hidden_dim=20_000, n_blocks=20_000), 1)
    decay = torch.sigmoid(m.Lambda.detach().double()) ** 8
    assert decay.min() >= 0.9 and decay.max() <= 0.9991
    assert float(decay.mean()) == pytest.approx((0.9 + 0.999) / 2, abs=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_saturated_gates_have_finite_gradients(name, size):
    """Decays of exactly 0 and 1, and the root of 1 - a^2 at its infinite slope."""
    m = _mixer(name)
    u = torch.randn(1, 50, DIM) * size
    with torch.no_grad():
        for parameter in m.parameters():
            if parameter.ndim > 1 and size > 1:
                parameter.mul_(size)
    out = m(u, make_span(50, CPU))
    assert out.isfinite().all()
    for parameter, gradient in _gradients(m, out).items():
        assert gradient.isfinite().all(), parameter


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("width", [1, 4])
def test_padding_freezes_state_and_convolution(name, width):
    m = _mixer(name).requires_grad_(False)
    cache = m.new_cache(2, torch.float32, CPU)
    m(torch.randn(2, 5, DIM), make_span(5, CPU, offsets=torch.zeros(2, dtype=torch.long)), cache)
    before = {n: t.clone() for n, t in cache.state.tensors().items()}
    mask = torch.tensor([[True], [False]]).expand(2, width)
    span = make_span(width, CPU, mask=mask, offsets=torch.tensor([5, 5]))
    m(torch.randn(2, width, DIM), span, cache)
    for tensor_name, tensor in cache.state.tensors().items():
        assert torch.equal(tensor[1], before[tensor_name][1]), tensor_name
        assert not torch.equal(tensor[0], before[tensor_name][0]), tensor_name


MODELS = {**CONFIGS, "mamba2": Mamba2Mixer(head_dim=4, state_dim=3, conv_width=TAPS)}


@pytest.mark.parametrize("name", MODELS)
def test_one_truth(name):
    """All at once = in pieces = token by token = padded = packed; and nothing looks ahead."""
    config = attamba.ModelConfig(vocab_size=11, dim=DIM, n_layers=2, mixer=MODELS[name])
    model = attamba.build_model(config).requires_grad_(False)
    ids = torch.randint(11, (2, 37))
    full = model(ids)
    for cuts in ([1] * 37, [1, 20, 2, 14], [36, 1]):
        cache = model.new_cache(2)
        parts = [model(piece, cache=cache) for piece in ids.split(cuts, 1)]
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5), cuts
    padded = torch.cat([torch.randint(11, (2, 5)), ids], 1)
    mask = torch.arange(42).expand(2, -1) >= 5
    assert torch.allclose(model(padded, attention_mask=mask)[:, 5:], full, atol=1e-5)
    cache = model.new_cache(2)
    model(padded[:, :9], attention_mask=mask[:, :9], cache=cache)
    assert torch.allclose(model(padded[:, 9:], cache=cache), full[:, 4:], atol=1e-5)
    packed = model(ids.flatten()[None], doc_ids=torch.arange(2).repeat_interleave(37)[None])
    assert torch.allclose(packed[0].view_as(full), full, atol=1e-5)
    changed = torch.cat([ids[:, :20], (ids[:, 20:] + 1) % 11], 1)
    assert torch.allclose(model(changed)[:, :20], full[:, :20], atol=1e-6)
    assert not torch.allclose(model(changed)[:, 20:], full[:, 20:], atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_bfloat16_and_autocast_keep_the_state_in_float32(name):
    config = attamba.ModelConfig(vocab_size=11, dim=DIM, n_layers=2, mixer=CONFIGS[name])
    model, ids = attamba.build_model(config).requires_grad_(False), torch.arange(30)[None] % 11
    full = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(ids).float(), full, atol=0.1)
    model = model.bfloat16()
    cache = model.new_cache(1)
    out = model(ids, cache=cache)
    assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), full, atol=0.1)
    assert all(layer.state.h.dtype == torch.float32 for layer in cache.layers)
    assert all(layer.state.conv.dtype == torch.bfloat16 for layer in cache.layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    m, u, span = _mixer(name), torch.randn(2, 33, DIM), make_span(33, CPU)
    compiled = torch.compile(lambda x: m(x, span), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(u), m(u, span), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"type": "mingru", "hidden_dim": 0}, r"mixer\.hidden_dim=0 must be at least 1"),
        ({"type": "minlstm", "conv_width": 0}, r"mixer\.conv_width=0 must be at least 1"),
        ({"type": "hawk", "n_blocks": 0}, r"mixer\.n_blocks=0 must be at least 1"),
        ({"type": "hawk", "hidden_dim": 20}, r"mixer\.n_blocks=8 does not divide hidden_dim=20"),
        ({"type": "mingru", "hiden_dim": 4}, r"did you mean 'hidden_dim'\?"),
        ({"type": "mingur"}, r"is not a mixer .* did you mean 'mingru'\?"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ConfigError, match=text):
        attamba.ModelConfig(dim=16, mixer=options)


def test_default_widths():
    assert MinGRUMixer().inner(512) == 704 and MinLSTMMixer().inner(512) == 512
    assert HawkMixer().inner(512) == 704 and HawkMixer(n_blocks=16).inner(512) == 768
    assert MinGRUMixer().inner(48) == 64 and MinGRUMixer(hidden_dim=5).inner(48) == 5
