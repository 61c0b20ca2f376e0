"""Rival compressors: keys and values against sums over each chunk, written out; steps; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attamba
from attamba.config import ConfigError
from attamba.modules.attamba import ChunkAttention
from attamba.modules.pooling import running_max
from attamba.ops.backends import interpreted
from attamba.ops.chunking import make_span

DIM, HEADS, VOCAB = 8, 2, 11
CPU = torch.device("cpu")


def _model(compressor: str, **mixer: Any) -> attamba.Decoder:
    settings = {"n_heads": HEADS, "chunk_size": 4, "leading_tokens": 2, "gate_positions": 3}
    mixer = {"type": "attamba", "compressor": compressor, **settings, **mixer}
    config = attamba.ModelConfig(vocab_size=VOCAB, dim=DIM, n_layers=2, ffn_dim=8, mixer=mixer)
    model = attamba.build_model(config)
    with torch.no_grad():  # what starts as zeros or ones must matter
        for name, parameter in model.named_parameters():
            if name.endswith(("position_bias", "norm_weight")):
                parameter.add_(torch.randn_like(parameter))
    return model


def _layer(model: attamba.Decoder) -> ChunkAttention:
    return model.layers[1].mixer


def _chunks(ends: Tensor) -> list[int]:
    """Where the chunk of each token begins."""
    begins, begin = [], 0
    for t, end in enumerate(ends.tolist()):
        begins.append(begin)
        begin = t + 1 if end else begin
    return begins


def _written_out(layer: ChunkAttention, u: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values before positions of one row, one token and one channel at a time."""
    p, width = dict(layer.named_parameters()), layer.n_kv_heads * layer.head_dim
    direct = u.repeat(1, 2) if layer.wkv is None else u @ p["wkv.weight"].t()
    out = []
    for t, begin in enumerate(_chunks(ends)):
        own = slice(begin, t + 1)
        if "compressors.in_proj.weight" not in p:
            out.append(direct[own].mean(0))
            continue
        projected = u[own] @ p["compressors.in_proj.weight"].t()
        content, score = projected[:, : 2 * width], projected[:, 2 * width :]
        place = [min(i, 2) for i in range(t + 1 - begin)]
        weights = torch.softmax(score + p["compressors.position_bias"][place], 0)
        pooled = (weights * content).sum(0).view(2, width)
        root = torch.sqrt(pooled.square().mean(1, keepdim=True) + 1e-5)
        normed = pooled / root * p["compressors.norm_weight"]
        out.append(direct[t] + normed.flatten())
    k, v = torch.stack(out).split(width, 1)
    return k, v


@pytest.mark.parametrize("compressor", ["mean", "gated"])
@pytest.mark.parametrize("kv_proj", [{}, {"kv_proj": True, "n_kv_heads": 1}])
@pytest.mark.parametrize("boundary", ["cyclic", "random"])
@pytest.mark.parametrize("seq", [1, 33])
def test_equals_sums_over_chunks_with_every_gradient(compressor, kv_proj, boundary, seq):
    layer = _layer(_model(compressor, boundary=boundary, **kv_proj))
    u, span = torch.randn(1, seq, DIM), make_span(seq, CPU)
    ends, _ = layer.boundary(span)
    got = layer._keys_and_values(u, ends, span, None)
    want = _written_out(layer, u[0], ends[0, 0])
    leaves = [p for n, p in layer.named_parameters() if n.startswith(("wkv", "compressors"))]
    cotangents = torch.randn(2, seq, layer.n_kv_heads * layer.head_dim)
    gradients = []
    for pair in ([t[0] for t in got], want):
        for t, expected in zip(pair, want):
            assert torch.allclose(t, expected, atol=1e-5)
        loss = sum((t * cotangent).sum() for t, cotangent in zip(pair, cotangents))
        if leaves:
            gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*gradients) if gradients else ():
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compressor", ["mean", "gated"])
def test_values_of_very_different_size_do_not_overflow(compressor):
    """Scores of +-1000, in chunks that go up and down: a softmax that goes on stays exact."""
    model = _model(compressor)
    layer = _layer(model)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("in_proj.weight"):
                parameter.mul_(300)
    u, span = torch.randn(1, 64, DIM), make_span(64, CPU)
    ends, _ = layer.boundary(span)
    got, want = layer._keys_and_values(u, ends, span, None), _written_out(layer, u[0], ends[0, 0])
    for a, b in zip(got, want):
        assert torch.allclose(a[0], b, atol=1e-3)


def test_the_mean_of_a_chunk_of_one_is_the_token_itself():
    layer = _layer(_model("mean", chunk_size=1))
    u, span = torch.randn(1, 9, DIM), make_span(9, CPU)
    k, v = layer._keys_and_values(u, layer.boundary(span)[0], span, None)
    assert torch.equal(k, u) and torch.equal(v, u)
    assert not list(layer.compressors.parameters())


@pytest.mark.parametrize("compressor", ["mean", "gated"])
@pytest.mark.parametrize("boundary", ["cyclic", "random", {"type": "separator", "tokens": [1]}])
def test_prefill_pieces_steps_and_padding_agree(compressor, boundary):
    """As tests/test_invariants.py, with biases and gains that are not those of a new model."""
    model = _model(compressor, boundary=boundary).requires_grad_(False).eval()
    ids = torch.randint(VOCAB, (2, 40))
    full = model(ids)
    for cuts in ([13, 1, 1, 9, 16], [1] * 40):
        cache, begin, parts = model.new_cache(2), 0, []
        for size in cuts:
            parts.append(model(ids[:, begin : begin + size], cache=cache))
            begin += size
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded).bool()
    mask[:, :5] = False
    assert torch.allclose(model(padded, attention_mask=mask)[:, 5:], full, atol=1e-5)
    packed = model(ids.flatten()[None], doc_ids=torch.arange(2).repeat_interleave(40)[None])
    assert torch.allclose(packed[0].view_as(full), full, atol=1e-5)


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("compressor", ["mean", "gated"])
def test_a_step_in_attention_s_kernels_is_that_of_the_plain_path(compressor):
    pytest.importorskip("triton")
    model, ids = _model(compressor).requires_grad_(False), torch.randint(VOCAB, (2, 11))
    full, cache = model(ids), model.new_cache(2)
    parts = [model(ids[:, :8], cache=cache)]
    for held, layer in zip(cache.layers, model.layers):
        held.kv.backend = "triton"
        assert layer.mixer.stacked_projections() is None
    assert cache.by_kernel
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(8, 11)]
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)


@pytest.mark.parametrize("compressor, numbers", [("mean", DIM + 1), ("gated", 3 * 2 * DIM + 1)])
def test_the_state_is_float32_and_has_the_size_of_the_formula(compressor, numbers):
    model = _model(compressor).bfloat16().requires_grad_(False)
    cache = model.new_cache(3)
    model(torch.randint(VOCAB, (3, 7)), cache=cache)
    for layer in cache.layers:
        tensors = layer.state.tensors().values()
        assert all(t.dtype == torch.float32 for t in tensors)
        assert sum(t.numel() for t in tensors) == 3 * numbers


@pytest.mark.parametrize("compressor", ["mean", "gated"])
def test_weights_serve_any_chunk_size(compressor):
    """As those of ssm: a trained model runs at another P."""
    model, other = _model(compressor), _model(compressor, chunk_size=9)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(VOCAB, (1, 30))
    assert not torch.allclose(model(ids), other(ids), atol=1e-3)


@pytest.mark.parametrize("longest", [3, None])
def test_running_max(longest):
    x, starts = torch.randn(2, 23, 4), torch.rand(2, 23) < 0.2
    starts[:, 2::3] = True
    initial = torch.randn(2, 4)
    got = running_max(x, starts, initial, longest)
    for row in range(2):
        top = initial[row]
        for t in range(23):
            top = x[row, t] if starts[row, t] else torch.maximum(top, x[row, t])
            assert torch.equal(got[row, t], top)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model, ids = _model("gated"), torch.randint(VOCAB, (2, 33))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(ids), model(ids), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"compressor": "max"}, r"mixer\.compressor='max' must be one of: ssm, mean, gated"),
        ({"compressor": "mean", "ssm_scope": "sequence"}, r"ssm_scope=sequence needs mixer\.comp"),
        (
            {"compressor": "gated", "ssm_scope": "sequence", "boundary": "head_cyclic"},
            r"ssm_scope=sequence needs mixer\.compressor=ssm; gated pools the tokens of a chunk "
            r"alone, and goes with mixer\.ssm_scope=chunk and mixer\.boundary=cyclic$",
        ),
        (
            {"compressor": "mean", "boundary": "head_cyclic"},
            r"boundary=head_cyclic needs mixer\.compressor=ssm; .* with mixer\.boundary=cyclic$",
        ),
        ({"gate_positions": 0}, r"mixer\.gate_positions=0 must be at least 1"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ConfigError, match=text):
        attamba.ModelConfig(dim=16, mixer={"type": "attamba", "n_heads": 2, **options})
